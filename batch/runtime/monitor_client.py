"""MonitorClient: how the actor of a stage talks to the job's monitor."""

import gc
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from threading import Thread
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moray.batch.forecast.sample import PromptSample
from moray.batch.ledger import Command
from moray.batch.processes.process import start_time
from moray.batch.run_events import ActorReady
from moray.batch.runtime.worker_reports import WorkerReport
from moray.batch.worker.quarantine import RowsInFlight, Suspect, WorkerExit
from moray.engine.errors import JobError, MorayError, NodeError

BEAT_EVERY_S = 3.0  # seconds between heartbeats, which fail when the job is over
REMOVAL_TIMEOUT_S = 10.0  # seconds allowed for removing all journals of a finished job
POLL_EVERY_S = 0.5  # seconds between checks whether shards may still start; the driver updates it no more often


def journal_path(monitor: str) -> Path:
    """Return the path of this actor's journal, in Ray's session folder on this machine.

    The name stays the same when the actor is started again on the same node. Losing a node does not make its rows
    suspects, even if the machine comes back as another node.

    monitor:  name of the job's monitor actor
    """
    context = ray.get_runtime_context()
    return _ray_folder() / f"{monitor}-{context.get_actor_id()}-{context.get_node_id()}.rows"


def remove_journals(monitor: str, nodes: Collection[str]) -> None:
    """Remove the journals of a finished job from Ray's folder on the given nodes, as far as these can be reached."""

    def remove() -> None:
        for path in _ray_folder().glob(f"{monitor}-*.rows"):
            path.unlink(missing_ok=True)

    remote: Any = ray.remote
    removed = []
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        removed.append(remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(remove).remote())
    if removed:
        ray.wait(removed, num_returns=len(removed), timeout=REMOVAL_TIMEOUT_S)


def _ray_folder() -> Path:
    """Return the folder of Ray's session on this machine, which is removed with the session."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name())


class MonitorClient:
    """Connects the actor that it is made in to the job's monitor."""

    def __init__(self, monitor: str, stage: str, lost_rows: RowsInFlight | None = None) -> None:
        """Report the start of this actor.

        monitor:    name of the job's monitor actor
        stage:      name of the actor's stage
        lost_rows:  the rows that this actor's last process left in flight

        Raises JobError where this actor has died too often.
        """
        context = ray.get_runtime_context()
        self._monitor = ray.get_actor(monitor)
        self._stage = stage
        self._actor, self._node = str(context.get_actor_id()), context.get_node_id()
        self._is_open, self._polled_at_s = True, float("-inf")
        with self.report_errors():
            ray.get(self._monitor.start.remote(self._actor, stage, self._node, lost_rows))

    def ready(self, *, reports: bool = False, **details: Any) -> None:
        """Report that this actor is ready.

        reports:  whether it sends reports from now on; a silence is then treated as a hang
        details:  more fields of ActorReady
        """
        gc.freeze()  # without this, full collections walk all objects of torch and transformers: 8 ms per shard
        pid = os.getpid()
        event = ActorReady(self._stage, self._actor, pid, self._node, **details)
        ray.get(self._monitor.ready.remote(event, start_time(pid) if reports else ""))
        if not reports:
            Thread(target=self.end_with_job, name="end", daemon=True).start()

    def end_with_job(self) -> None:
        """Send heartbeats until the monitor is gone, which ends with its job; then end this actor.

        Ray Data keeps the actors of a failed pipeline as long as the driver's process lives.
        """
        while self._beat():
            time.sleep(BEAT_EVERY_S)
        ray.kill(ray.get_runtime_context().current_actor)

    def _beat(self) -> bool:
        """Send a heartbeat. Returns whether the monitor exists; one that cannot be reached for a moment does."""
        try:
            ray.get(self._monitor.beat.remote(self._actor))
        except ActorUnavailableError:
            pass
        except Exception:
            return False
        return True

    def is_open(self) -> bool:
        """Return whether new shards may start, as of at most POLL_EVERY_S ago. Only `admit` is exact."""
        now_s = time.monotonic()
        if now_s - self._polled_at_s > POLL_EVERY_S:
            self._is_open, self._polled_at_s = bool(ray.get(self._monitor.is_open.remote())), now_s
        return self._is_open

    def admit(self, shard: int) -> dict[int, Suspect] | None:
        """Admit a shard; see MonitorActor.admit."""
        suspects: Any = ray.get(self._monitor.admit.remote(shard))
        return None if suspects is None else dict(suspects)

    def clear(self, shard: int, row: int) -> None:
        """Clear a suspect; see MonitorActor.clear."""
        ray.get(self._monitor.clear.remote(shard, row))

    def report(self, report: WorkerReport) -> Callable[[], Command | None]:
        """Send a worker's report.

        Returns a function that waits for the monitor's answer, which is the command that the worker is to follow.
        """
        pending_command: Any = self._monitor.report.remote(self._actor, report)

        def wait() -> Command | None:
            command: Any = ray.get(pending_command)
            return None if command is None else Command(command)

        return wait

    def expect_exit(self, worker_exit: WorkerExit) -> None:
        """Report why this process is about to exit."""
        ray.get(self._monitor.expect_exit.remote(self._actor, worker_exit))

    def sample(self, collect: Callable[[], PromptSample]) -> None:
        """Collect the job's sample of the input, unless another actor does.

        Rows that cannot be read are not a failure here: they fail when their shard is prepared.
        """
        if not ray.get(self._monitor.claim_sample.remote()):
            return
        try:
            result: tuple[PromptSample | None, str] = collect(), ""
        except Exception as error:
            result = None, f"{type(error).__name__}: {error}"
        ray.get(self._monitor.submit_sample.remote(*result))

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Report an exception while the actor starts.

        What the user gave is wrong on every machine and ends the job. Anything else may be this machine's fault, or may
        pass: the process exits, and Ray starts the actor again.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, MorayError) and not isinstance(error, NodeError):
                ray.get(self._monitor.fail.remote(error))
                raise
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, MorayError) else str(error)
            pause_s: Any = ray.get(
                self._monitor.report_failed_start.remote(
                    self._actor, self._stage, self._node, f"{gethostname()}: {reason}"
                )
            )
            time.sleep(pause_s)
            os._exit(1)

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """Report an exception to the driver; Ray itself passes on only its text, and not always."""
        try:
            yield
        except Exception as error:
            reported = error if isinstance(error, MorayError) else JobError(f"{type(error).__name__}: {error}")
            ray.get(self._monitor.fail.remote(reported))
            raise
