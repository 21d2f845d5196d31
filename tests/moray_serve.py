"""`moray serve` as a process of its own, watched from outside."""

import os
import re
import signal
import subprocess
import sys
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
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self._lines: list[str] = []  # that were read
        self.url = f"http://127.0.0.1:{port}"
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [MORAY, "serve", "--port", str(port), *arguments],
            env=bare | dict(environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        self.wait_for(lambda: "is served at" in self._line())

    def wait_for(self, what: Callable[[], object]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, f"moray serve ended: {self.process.returncode}\n{self._output()}"
            assert time.monotonic() < end_s, "moray serve hangs"
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
        """Exit code and what was printed that nobody read."""
        self.process.send_signal(number)
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, output

    def kill(self) -> None:
        """End it and all processes of its group at once, as a machine that fails would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _output(self) -> str:
        """Return all that it has printed, once it has ended."""
        assert self.process.stdout is not None
        return "".join([*self._lines, *self.process.stdout])

    def _line(self) -> str:
        assert self.process.stdout is not None
        self._lines.append(self.process.stdout.readline())
        return self._lines[-1]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
