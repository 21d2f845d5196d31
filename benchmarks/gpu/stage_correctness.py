"""Check that what is measured is right: kernels at real shapes, the engine against itself, and the kernels' tests."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu import checks_engine, checks_kernels, checks_quantized
from gpu.setup import Row, Setup

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("tests/kernels/gpu", "tests/engine/gpu")


def run(setup: Setup) -> Iterator[Row]:
    yield from checks_kernels.run(setup)
    yield from checks_engine.run(setup)
    yield from checks_quantized.run(setup)
    if not setup.is_dry and setup.find(check="tests") is None:  # in a dry run they are the test suite itself
        yield run_tests(setup.seconds_left)


def run_tests(limit_s: float) -> Row:
    """Run the kernels' tests, which use the GPU where there is one, in several processes, as most compile."""
    if importlib.util.find_spec("pytest") is None:
        return {"check": "tests", "ok": None, "error": "pytest is not installed here"}
    command = [sys.executable, "-m", "pytest", *SUITES, "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += ["--ignore=tests/kernels/gpu/test_compile_ahead.py", "--maxfail=20"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    environment.pop("TRITON_INTERPRET", None)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else str(late.stdout)
        late_row = {"check": "tests", "ok": None, "stopped": True, "error": f"stopped after {limit_s:.0f} s"}
        return late_row | {"tail": text[-1500:]}
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return {
        "check": "tests",
        "ok": done.returncode == 0,
        **counts,
        "failed_tests": failed[:20],
        "tail": done.stdout[-800:],
    }
