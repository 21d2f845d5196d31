"""A Ray cluster of two nodes, as processes of their own, with dashboard and token, for tests of what is submitted."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 120.0
TOKEN = "a" * 64
# FOLDER COMMAND...: run a command with a view of the disk of its own, in which the folder is empty.
AS_ROOT = () if os.geteuid() == 0 else ("--map-root-user",)
UNSHARE = ("unshare", "--mount", *AS_ROOT, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')


class RayCluster:
    """A head with one CPU, and a node with one CPU that says it has an A100.

    environment:  for processes that are to reach it
    unshared:     a folder in which the second node sees nothing of what the first one has there, as on two machines;
                  None where this machine lets nobody make such a view
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = bare | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "COLUMNS": "200",
        }
        gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        # Of their own, as on two machines: nodes that share one unpack what is submitted over each other.
        first, second = folder / "1", folder / "2"
        (folder / "unshared").mkdir()
        self.unshared = folder / "unshared" if _can_unshare(folder / "unshared") else None
        self._start(
            "--temp-dir", str(first), "--head", "--num-cpus=1", f"--port={gcs}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        self._wait_for(dashboard)
        self._start(
            f"--address=127.0.0.1:{gcs}", "--num-cpus=1", "--num-gpus=1", '--resources={"accelerator_type:A100": 1}',
            "--labels=disk=fast", "--temp-dir", str(second), unshared=self.unshared,
        )  # fmt: skip

    def _start(self, *options: str, unshared: Path | None = None) -> None:
        common = (
            "--block", "--disable-usage-stats", "--object-store-memory=100000000", "--min-worker-port=0",
            "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        with (self._folder / f"node-{len(self._processes)}.log").open("wb") as log:
            command = [str(Path(sys.executable).with_name("ray")), "start", *common, *options]
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
            assert self._processes[0].poll() is None, (self._folder / "node-0.log").read_text()
            assert time.monotonic() < end_s, "the head did not start"
            try:
                return socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:
                time.sleep(0.2)

    def moray(self, *args: str, timeout_s: float = PATIENCE_S, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return self.python("-m", "jobs.cli", *args, timeout_s=timeout_s, **variables)

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
