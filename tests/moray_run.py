"""`moray run` as a process of its own, watched from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

import left_behind
from patience import PATIENCE_S

from moray.batch.processes.descendants import find_descendants
from moray.batch.spec import JobSpec

MORAY = Path(sys.executable).with_name("moray")


class MorayRun:
    """A job in a process group of its own, as a shell would start it.

    folder:       has the spec's `out`
    address:      of a cluster; None starts Ray here, in a temporary folder of its own
    environment:  to reach that cluster
    cwd:          where it is started
    terminal:     for its output, in place of a pipe
    """

    def __init__(
        self,
        folder: Path,
        spec: JobSpec,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        terminal: int | None = None,
    ) -> None:
        self.folder = folder
        self.tag = uuid4().hex
        self.ray_folder = Path(mkdtemp(prefix="ray-", dir="/tmp"))  # not in pytest's: a socket's path must be short
        path = folder / "job.yaml"
        path.write_text(spec.to_yaml())
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {left_behind.TAG: self.tag, "RAY_TMPDIR": str(self.ray_folder)}
        own |= {} if terminal is None else {"TERM": "xterm"}
        self.process = subprocess.Popen(
            [MORAY, "run", path, *(() if address is None else ("--address", address))],
            env=bare | own | dict(environment or {}),
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=cwd,
        )  # fmt: skip

    def parts(self) -> set[str]:
        return {path.name for path in (self.folder / "out").glob("part-*.parquet")}

    def events(self) -> list[dict[str, Any]]:
        """Return the events of the latest run."""
        files = sorted((self.folder / "out/_job/events").glob("*.jsonl"))
        return [json.loads(line) for line in files[-1].read_text().splitlines()]

    def pids(self, stage: str) -> list[int]:
        """Return the process ids of the stage's actors that are ready."""
        found: dict[str, int] = {}
        for event in self.events():
            if event["event"] == "actor_ready" and event["stage"] == stage:
                found[event["actor"]] = event["pid"]
            elif event["event"] == "actor_lost":
                found.pop(event["actor"], None)
        return list(found.values())

    @property
    def driver(self) -> int:
        """Process id of the driver, which is a child of the command."""
        self.wait_for(lambda: self.lease() is not None)
        return int((self.lease() or {})["pid"])

    def lease(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / "out/_job/lease.json").read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def ray_is_starting(self) -> bool:
        """Return whether the local Ray has made its folder of logs: ray.init is at work then."""
        try:
            return any(self.ray_folder.glob("moray-*/session_*/logs"))
        except FileNotFoundError:  # a folder that was only made to see whether one can be
            return False

    def ray_process(self, name: str) -> int:
        """Process id of a part of the local Ray: raylet or gcs_server."""
        (found,) = self.ray_processes(name)
        return found

    def ray_processes(self, name: str) -> list[int]:
        """Return the processes of a part of Ray, none before it is started."""
        return [pid for pid in find_descendants(self.process.pid) if command_name(pid) == name]

    def all_events(self) -> list[dict[str, Any]]:
        """Return the events of all runs, in order."""
        files = sorted((self.folder / "out/_job/events").glob("*.jsonl"))
        return [json.loads(line) for path in files for line in path.read_text().splitlines()]

    def told_commits(self) -> set[int]:
        """Shards of which the events of all runs say that they are committed."""
        return {event["shard"] for event in self.all_events() if event["event"] == "committed"}

    def status(self) -> dict[str, Any]:
        """status.json, once it is known to add up."""
        status: dict[str, Any] = json.loads((self.folder / "out/_job/status.json").read_text())
        assert status["input_rows"] == status["ok_rows"] + status["failed_rows"] + status["pending_rows"]
        return status

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Wait until it is so; fail if the job ends before."""
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, f"the job ended early:\n{self.end()[1]}"
            assert time.monotonic() < end_s, "the job hangs"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def left(self, *, logs: bool = False) -> list[str]:
        """Return what a run that is over has left behind, once its processes are gone.

        logs: those of a failure may stay
        """
        left_behind.wait_until_gone(self.tag)
        found = left_behind.temporaries(self.folder / "out")
        return found if logs else [*found, *left_behind.sessions(self.ray_folder)]

    def clean(self) -> None:
        """End what still runs, when the test is over."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


def command_name(pid: int) -> str:
    """The file name of what the process runs; empty where it is dead."""
    try:
        return Path(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])).name
    except OSError:
        return ""
