"""Tests that kernels are interpreted whatever tests were collected before them."""

import os
import subprocess
import sys

import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT

TESTS = ROOT / "tests"


@pytest.mark.slow  # where it breaks, triton_interpreter.repair says so when all tests are collected
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs the kernels")
def test_triton_may_be_imported_before_the_first_kernel() -> None:
    """torch._dynamo imports it, which the tests of the CPU's kernels load."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = "import conftest, triton, triton_device"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
