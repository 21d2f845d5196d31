"""Every kernel, at every tile of the tables, as the compiler makes it for Ampere and Hopper."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_ahead.py")


def test_no_program_has_a_fault(tmp_path: Path) -> None:
    """In a process of its own: under the interpreter, kernels cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "programs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    programs = json.loads((tmp_path / "programs.json").read_text())
    assert {program["target"] for program in programs} == {80, 90}
    assert not [program["name"] for program in programs if program["faults"]]
