"""Tests of the kernels compiled for GPUs from Ampere to Blackwell, which this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_ahead.py")


TARGETS = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        (["--quick", "--target=90"], {90}),
        pytest.param(["--quick"], set(TARGETS), marks=pytest.mark.slow),
        pytest.param([], set(TARGETS), marks=pytest.mark.slow),
    ],
    ids=["one GPU", "largest variants", "all"],
)
def test_no_program_has_a_fault(tmp_path: Path, options: list[str], targets: set[int]) -> None:
    """It runs in a separate process, because kernels cannot be compiled under the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options, "--json", str(tmp_path / "programs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    programs = json.loads((tmp_path / "programs.json").read_text())
    assert {program["target"] for program in programs} == targets
    assert not [program["name"] for program in programs if program["faults"]]
