"""Tests of the kernels compiled for GPUs from Ampere to Blackwell, which this machine need not have."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moray.engine.quantization.scheme import ON_LOAD_KINDS
from moray.kernels.gpu import experts_down, experts_up, linear
from moray.kernels.gpu.aot import GPUS, Variant
from moray.kernels.gpu.tuning import Gpu

SCRIPT = Path(__file__).with_name("compile_ahead.py")
LIMIT_S = 3000  # for all programs of one GPU, on a core that others use too


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
def test_the_largest_programs_have_no_fault(tmp_path: Path, target: int) -> None:
    check(tmp_path, "--quick", target)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("target", GPUS)
def test_no_program_has_a_fault(tmp_path: Path, target: int) -> None:
    check(tmp_path, None, target)


def check(tmp_path: Path, option: str | None, target: int) -> None:
    """Compile in a separate process, because kernels cannot be compiled under the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), f"--target={target}", "--json", str(tmp_path / "programs.json")]
    command += [] if option is None else [option]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    programs = json.loads((tmp_path / "programs.json").read_text())
    assert {program["target"] for program in programs} == {target}
    assert not [program["name"] for program in programs if program["faults"]]


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("listed", [experts_up.aot_variants, experts_down.aot_variants, linear.aot_variants])
def test_every_format_is_compiled_for_every_gpu_that_multiplies_it(
    listed: Callable[[Gpu], list[Variant]], target: int
) -> None:
    found: dict[str, set[str]] = {}  # format -> dtypes of the model
    for variant in listed(GPUS[target]):
        if (format := variant.constexprs.get("FORMAT")) is not None:
            found.setdefault(format, set()).add(variant.signature["bias"].removesuffix(":16"))
    both = {"*bf16", "*fp16"}
    expected = {"dense": {*both, "*fp32"}, **dict.fromkeys(ON_LOAD_KINDS, both)}
    if listed != linear.aot_variants:  # experts alone are published in fp4
        expected["fp4"] = {"*bf16"}
    assert found == expected | ({"fp8_fp8": {"*bf16"}} if target >= 89 else {})
