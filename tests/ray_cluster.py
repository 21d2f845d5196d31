"""A Ray cluster of two nodes, as processes of their own, with dashboard and token, for tests of what is submitted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import left_behind
from patience import PATIENCE_S
from ports import free_port

TOKEN = "a" * 64
TOKENS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
# FOLDER COMMAND...: run a command with a view of the disk of its own, in which the folder is empty.
AS_ROOT = () if os.geteuid() == 0 else ("--map-root-user",)
UNSHARE = ("unshare", "--mount", *AS_ROOT, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')


class RayNodes:
    """A cluster with nothing but its head, of one CPU, until others are added.

    environment:  for processes that are to reach it
    gcs_address:  for drivers
    has_token:    whether who joins needs a token
    unshared:     a folder in which nodes that are added so see nothing of what the head has there, as on two machines;
                  None where this machine lets nobody make such a view
    """

    def __init__(self, folder: Path, *head: str, has_token: bool = True) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self.tag = uuid4().hex
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = bare | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **(TOKENS if has_token else {"RAY_AUTH_MODE": "disabled"}),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MORAY_DEVICE": "cpu",  # nodes only say that they have GPUs
            "COLUMNS": "200",
            left_behind.TAG: self.tag,
        }
        (folder / "unshared").mkdir()
        self.unshared = folder / "unshared" if _can_unshare(folder / "unshared") else None
        gcs, agent = free_port(), free_port()
        self.gcs_address = f"127.0.0.1:{gcs}"
        self._start(
            "--head", "--num-cpus=1", f"--port={gcs}", f"--ray-client-server-port={free_port()}", *head, agent=agent
        )
        self._wait_for(gcs)
        self._wait_for(agent)  # the last of a node's processes; without it no job can be submitted

    def add(self, *options: str, unshared: Path | None = None) -> None:
        """A node, with one CPU if nothing else is said."""
        self._start(f"--address={self.gcs_address}", "--num-cpus=1", *options, unshared=unshared)

    def last_raylet(self) -> int:
        """The process of the node that came last, once it is there."""
        parent, end_s = self._processes[-1].pid, time.monotonic() + PATIENCE_S
        while not (
            found := [pid for pid, its_parent, name in _processes() if (its_parent, name) == (parent, "raylet")]
        ):
            assert time.monotonic() < end_s, "the node did not start"
            time.sleep(0.1)
        return found[0]

    def kill_last(self) -> None:
        """The node that came last, as a machine that goes away: its raylet gets no time for anything."""
        os.kill(self.last_raylet(), signal.SIGKILL)
        self._processes.pop().wait(PATIENCE_S)  # it takes the rest of its node with it

    def _start(self, *options: str, unshared: Path | None = None, agent: int | None = None) -> None:
        common = (
            "--block", "--disable-usage-stats", "--object-store-memory=100000000", "--min-worker-port=0",
            "--max-worker-port=0", f"--dashboard-agent-listen-port={agent or free_port()}",
        )  # fmt: skip
        # Folders of their own, as on two machines: nodes that share one unpack what is submitted over each other.
        self._started += 1
        own = ("--temp-dir", str(self._folder / str(self._started)))
        with (self._folder / f"node-{self._started}.log").open("wb") as log:
            command = [str(Path(sys.executable).with_name("ray")), "start", *common, *own, *options]
            if unshared is not None:
                command = [*UNSHARE, str(unshared), *command]
            self._processes.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
                )
            )

    def _wait_for(self, port: int) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while True:
            assert self._processes[0].poll() is None, (self._folder / "node-1.log").read_text()
            assert time.monotonic() < end_s, "the head did not start"
            try:
                return socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                time.sleep(0.2)

    def moray(self, *args: str, timeout_s: float = PATIENCE_S, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return self.python("-m", "moray.jobs.cli", *args, timeout_s=timeout_s, **variables)

    def python(self, *args: str, timeout_s: float = PATIENCE_S, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args], env=self.environment | variables, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def stop(self) -> None:
        """`ray start --block` takes its node's processes with it."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _can_unshare(folder: Path) -> bool:
    return subprocess.run([*UNSHARE, str(folder), "true"], capture_output=True, check=False).returncode == 0


class RayCluster(RayNodes):
    """A head with one CPU and a dashboard, and a node with one CPU that says it has an A100."""

    def __init__(self, folder: Path) -> None:
        dashboard = free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        super().__init__(folder, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
        self._wait_for(dashboard)
        self.add(
            "--num-gpus=1", '--resources={"accelerator_type:A100": 1}', "--labels=disk=fast", unshared=self.unshared
        )


def parent_of(pid: int) -> int | None:
    return next((parent for found, parent, _ in _processes() if found == pid), None)


def _processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent, name) of all."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        yield int(path.parent.name), int(fields.split()[1]), name
