"""Compile every kernel variant for GPUs this machine need not have, and look at what the compiler made of it.

    python tests/kernels/gpu/compile_ahead.py [--target 90] [--only NAME] [--json FILE]

Needs nothing but the triton wheel, which brings ptxas and nvdisasm. The same script checks another Triton: put it first
on PYTHONPATH (`make aot`). Must not run under Triton's interpreter.
"""

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton 3.6 does; newer ones differ among themselves
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

import kernels.gpu
from kernels.gpu.aot import Variant

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may take


@dataclass(frozen=True)
class Inspection:
    """registers: a thread; spills, stack, shared: bytes; the rest: instructions of that kind in the program."""

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


def variants() -> list[Variant]:
    """All that the kernels of this folder say they launch."""
    found: list[Variant] = []
    for module in pkgutil.iter_modules(kernels.gpu.__path__):
        listed = getattr(importlib.import_module(f"kernels.gpu.{module.name}"), "aot_variants", None)
        found += listed() if listed else []
    return found


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
        len(re.findall(r"\bHGMMA\.", program)),
        len(re.findall(r"\bHMMA\.", program)),
    )
    seen.faults.extend(_faults(variant, seen, usage))
    return seen


def _faults(variant: Variant, seen: Inspection, usage: str) -> list[str]:
    faults = []
    if seen.spills or seen.stack:
        faults.append(f"{seen.spills} bytes of spills, a stack of {seen.stack}")
    if seen.shared > SHARED_MEMORY[seen.target]:
        faults.append(f"{seen.shared} bytes of shared memory; the card gives {SHARED_MEMORY[seen.target]}")
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
    """What ptxas says of its registers, called as Triton calls it."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, choices=list(SHARED_MEMORY), help="compute capability (default: all)")
    parser.add_argument("--only", default="", metavar="NAME", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, help="write the inspections there")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print(f"{'variant':60} sm  regs spills shared  wide wgmma   mma")
    seen: list[Inspection] = []
    for variant in (v for v in variants() if args.only in v.name):
        for target in (t for t in variant.targets if args.target in (None, t)):
            seen.append(one := inspect_variant(variant, target))
            row = f"{one.registers:5} {one.spills:6} {one.shared:6} {one.wide_loads:5} {one.wgmma:5} {one.mma:5}"
            print(f"{one.name:60} {target} {row}  {'; '.join(one.faults)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in seen]))
    faulty = sum(bool(one.faults) for one in seen)
    print(f"{len(seen)} programs, {faulty} with faults")
    return 1 if faulty or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
