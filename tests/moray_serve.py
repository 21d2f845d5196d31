"""`moray serve` as a process of its own, watched from outside."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from patience import PATIENCE_S
from ports import free_port

MORAY = Path(sys.executable).with_name("moray")


class MorayServe:
    """An endpoint in a process group of its own, as a shell would start it.

    environment:  variables that are set for it
    url:          where it listens
    lines:        what it has printed so far
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self.lines: list[str] = []
        self.url = f"http://127.0.0.1:{port}"
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [MORAY, "serve", "--port", str(port), *arguments],
            env=bare | dict(environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        # A thread, since a read has no deadline, and since a process whose pipe is full waits for its reader.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        self.wait_for(lambda: any("is served at" in line for line in self.lines))

    def wait_for(self, what: Callable[[], object]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, f"moray serve ended: {self.process.returncode}\n{self._output()}"
            assert time.monotonic() < end_s, f"moray serve hangs\n{''.join(self.lines)}"
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE_S) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)

    def replicas(self, deployment: str = "moray") -> list[int]:
        """Process ids of the replicas of a deployment: of the endpoint, or of `batches`."""
        children = defaultdict(list)
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                children[int(status.read_text().rpartition(")")[2].split()[1])].append(int(status.parent.name))
            except OSError:
                continue
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            todo += children[pid]
            if re.match(rf"ray::ServeReplica:[^:]*:{deployment}\b", _command(pid)):
                found.append(pid)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send it a signal, and wait until it has ended; see end()."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Wait until it has ended; return its exit code and all that it has printed."""
        try:
            self.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, self._output()

    def kill(self) -> None:
        """End it and all processes of its group at once, as a machine that fails would, unless it has ended already."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _output(self) -> str:
        """Return all that it has printed, once it has ended."""
        self._reader.join(PATIENCE_S)  # the pipe closes with the last process that has it
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
