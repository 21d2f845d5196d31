"""Compile every kernel variant for GPUs that this machine need not have, and inspect the compiled code.

    python tests/kernels/gpu/compile_ahead.py [--target 90] [--only NAME] [--quantized] [--quick] [--json FILE]

It needs only the triton wheel, which includes ptxas and nvdisasm. The same script checks another version of Triton: put
that first on PYTHONPATH (`make aot`). It must not run under Triton's interpreter.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton 3.6; newer versions differ
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

import moray.kernels.gpu
from moray.kernels.gpu.aot import GPUS, Variant
from moray.kernels.gpu.tuning import Gpu


@dataclass(frozen=True)
class Inspection:
    """The properties of a compiled program.

    registers:             per thread
    spills, stack, shared: bytes
    other fields:          number of instructions of that kind
    """

    name: str
    target: int
    registers: int
    spills: int
    stack: int
    shared: int
    wide_loads: int
    wgmma: int
    mma: int
    faults: list[str] = field(default_factory=list)


def variants(gpu: Gpu) -> list[Variant]:
    """Return all variants that the kernels of this folder launch on such a GPU."""
    found: list[Variant] = []
    for module in pkgutil.iter_modules(moray.kernels.gpu.__path__):
        listed = getattr(importlib.import_module(f"moray.kernels.gpu.{module.name}"), "aot_variants", None)
        found += listed(gpu) if listed else []
    return found


def representative(listed: list[Variant]) -> list[Variant]:
    """Return, for each kernel in 16 bits, in fp32 and of quantized weights, the variant with the largest blocks.

    It is the hardest to compile.
    """
    largest: dict[object, Variant] = {}
    for variant in listed:
        first = next(kind for kind in variant.signature.values() if kind.startswith("*"))
        key = variant.kernel, first.startswith("*fp32"), is_quantized(variant)
        if key not in largest or _size(variant) > _size(largest[key]):
            largest[key] = variant
    return list(largest.values())


def is_quantized(variant: Variant) -> bool:
    """Return whether the program multiplies quantized weights, or quantizes what it multiplies them by."""
    return variant.constexprs.get("FORMAT", "dense") != "dense" or variant.name.startswith("quantize_rows")


def _size(variant: Variant) -> int:
    return math.prod(value for name, value in variant.constexprs.items() if name.startswith("BLOCK"))


def inspect_variant(variant: Variant, target: int) -> Inspection:
    compiled = triton.compile(
        _source(variant),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    usage = _assemble(compiled.asm["ptx"], target)
    program = _disassemble(compiled.asm["cubin"])
    registers = re.search(r"Used (\d+) registers", usage)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    stack = re.search(r"(\d+) bytes stack frame", usage)
    assert registers and spills and stack, usage
    seen = Inspection(
        variant.name,
        target,
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        int(stack[1]),
        compiled.metadata.shared,
        len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128|\bUTMALDG", program)),
        len(re.findall(r"\b[HQ]GMMA\.", program)),
        len(re.findall(r"\b[HQ]MMA\.", program)),
    )
    seen.faults.extend(_faults(variant, seen, usage))
    return seen


def _faults(variant: Variant, seen: Inspection, usage: str) -> list[str]:
    faults = []
    if (seen.spills or seen.stack) and not variant.may_spill:
        faults.append(f"{seen.spills} bytes of spills, a stack of {seen.stack}")
    if seen.shared > (limit := GPUS[seen.target].shared_memory):
        faults.append(f"{seen.shared} bytes of shared memory; the card gives {limit}")
    if variant.has_wide_loads and not seen.wide_loads:
        faults.append("no 128-bit loads")
    if variant.wants_wgmma and seen.target == 90 and not seen.wgmma:
        faults.append("no warp-group MMA")
    if "serializ" in usage.lower():
        faults.append("warp-group MMA is serialized")
    return faults


def _source(variant: Variant) -> ASTSource:
    types: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in variant.constexprs:
            types[name] = "constexpr"
            continue
        kind, _, divisible = variant.signature[name].partition(":")
        types[name] = kind
        if divisible:
            attributes[(i,)] = [["tt.divisibility", int(divisible)]]
    return ASTSource(variant.kernel, types, dict(variant.constexprs), attributes)


def _assemble(ptx: str, target: int) -> str:
    """Return what ptxas reports about its registers, called in the way Triton calls it."""
    level = ["--regAllocOptLevel=2"] if "regAllocOptLevel" in inspect.getsource(nvidia) else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        gpu = nvidia.sm_arch_from_capability(target)
        command = [nvidia.get_ptxas(target).path, "-v", *level, "--gpu-name", gpu, str(path), "-o", f"{path}.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the assemblers that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, choices=list(GPUS), help="compute capability (default: all)")
    parser.add_argument("--only", default="", metavar="NAME", help="variants whose name contains this")
    parser.add_argument("--quantized", action="store_true", help="programs of quantized weights alone")
    parser.add_argument("--quick", action="store_true", help="of each kernel the largest variants alone")
    parser.add_argument("--json", type=Path, help="write the inspections there")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print(f"{'variant':60} sm  regs spills shared  wide wgmma   mma")
    seen: list[Inspection] = []
    for target, gpu in GPUS.items():
        if args.target not in (None, target):
            continue
        listed = representative(variants(gpu)) if args.quick else variants(gpu)
        listed = [one for one in listed if args.only in one.name and (is_quantized(one) or not args.quantized)]
        started, used = time.time(), _cpu_seconds()
        for variant in listed:
            seen.append(one := inspect_variant(variant, target))
            row = f"{one.registers:5} {one.spills:6} {one.shared:6} {one.wide_loads:5} {one.wgmma:5} {one.mma:5}"
            print(f"{one.name:60} {target} {row}  {'; '.join(one.faults)}", flush=True)
        seconds = f"{time.time() - started:.0f} s, {_cpu_seconds() - used:.0f} of them on a core"
        print(f"{target}: {len(listed)} programs in {seconds}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in seen]))
    faulty = sum(bool(one.faults) for one in seen)
    print(f"{len(seen)} programs, {faulty} with faults")
    return 1 if faulty or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
