"""`moray run` as a process of its own, watched from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch.spec import JobSpec

MORAY = Path(sys.executable).with_name("moray")
PATIENCE_S = 240.0


class MorayRun:
    """A job in a process group of its own, as a shell would start it. folder: has the spec's `out`."""

    def __init__(self, folder: Path, spec: JobSpec) -> None:
        self.folder = folder
        path = folder / "job.yaml"
        path.write_text(spec.to_yaml())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [MORAY, "run", path],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def parts(self) -> set[str]:
        return {path.name for path in (self.folder / "out").glob("part-*.parquet")}

    def events(self) -> list[dict[str, Any]]:
        """Of the latest run."""
        files = sorted((self.folder / "out/_job/events").glob("*.jsonl"))
        return [json.loads(line) for line in files[-1].read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        """status.json, once it is known to add up."""
        status: dict[str, Any] = json.loads((self.folder / "out/_job/status.json").read_text())
        assert status["input_rows"] == status["ok_rows"] + status["failed_rows"] + status["pending_rows"]
        return status

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until it is so; not if the job ends before."""
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, f"the job ended early:\n{self.end()[1]}"
            assert time.monotonic() < end_s, "the job hangs"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output
