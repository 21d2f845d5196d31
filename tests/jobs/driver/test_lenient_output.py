"""Output that cannot be written ends nothing, and comes back when it can be written again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

SCRIPT = """
import os, sys
from moray.jobs.driver.lenient_output import make_output_lenient
make_output_lenient()
for text in ("lost", "lost too", "seen"):
    if text == "seen":
        os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 1)
    print(text, flush=True)
    print(os.readlink("/proc/self/fd/1"), file=sys.stderr)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full, a disk that is always full")
def test_a_disk_that_was_full_for_a_while_is_written_to_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(log)], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S
        )
    assert (done.returncode, done.stderr.split()) == (0, ["/dev/full", "/dev/full", str(log)])
    assert log.read_text() == "seen\n"


def test_output_that_nobody_reads_goes_nowhere_from_then_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "log")],
            stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    assert (done.returncode, done.stderr.split()[:2]) == (0, ["/dev/null", "/dev/null"])
