"""Stage: a stage's side of the monitor, in the actor that runs it."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from batch.faults.process import start_time
from batch.faults.quarantine import Ending, InFlight, Suspect
from batch.forecast.sample import Sample
from batch.ledger import Order, Progress
from batch.watch.figures import Figures
from engine.errors import JobError, MorayError

LOOK_EVERY_S = 3.0  # whether the job still runs
ASK_EVERY_S = 0.5  # whether shards may still start; the driver tells no oftener


def journal_path() -> Path:
    """Of this actor: in Ray's folder on this machine, which goes with the session. It keeps its name when the actor is
    started again on the same node; a node that is lost says nothing against a row, even if it comes back as another."""
    context = ray.get_runtime_context()
    name = f"moray-{context.get_actor_id()}-{context.get_node_id()}.rows"
    return Path(context.get_temp_dir(), context.get_session_name(), name)


class Stage:
    """Of the actor that it is made in."""

    def __init__(self, monitor: str, stage: str, died: InFlight | None = None) -> None:
        """died: what this actor's last process left. Raises JobError where this actor has died too often."""
        context = ray.get_runtime_context()
        self._monitor = ray.get_actor(monitor)
        self._stage = stage
        self._actor, self._node = context.get_actor_id(), context.get_node_id()
        self._is_open, self._asked_at_s = True, float("-inf")
        with self.telling():
            ray.get(self._monitor.start.remote(self._actor, stage, self._node, died))

    def ready(self, *, reports: bool = False, **about: str) -> None:
        """
        reports: from now on; silence is then taken for a hang
        about:   more to say of this actor
        """
        gc.freeze()  # else full collections walk all objects of torch and transformers, which takes 8 ms a shard
        pid = os.getpid()
        started = start_time(pid) if reports else ""
        ray.get(self._monitor.ready.remote(self._actor, self._stage, pid, self._node, about, started))
        if not reports:
            Thread(target=self.end_with_job, name="end", daemon=True).start()

    def end_with_job(self) -> None:
        """Wait until the monitor is gone, which ends with its job; then end this actor. Ray Data keeps those of a
        pipeline that failed as long as the driver's process lives."""
        while self._has_monitor():
            time.sleep(LOOK_EVERY_S)
        ray.kill(ray.get_runtime_context().current_actor)

    def _has_monitor(self) -> bool:
        """One that cannot be reached for a moment is not gone."""
        try:
            ray.get(self._monitor.is_open.remote())
        except ActorUnavailableError:
            pass
        except Exception:
            return False
        return True

    def is_open(self) -> bool:
        """Whether new shards may start, as it was lately; `admit` knows for sure."""
        now_s = time.monotonic()
        if now_s - self._asked_at_s > ASK_EVERY_S:
            self._is_open, self._asked_at_s = bool(ray.get(self._monitor.is_open.remote())), now_s
        return self._is_open

    def admit(self, shard: int) -> dict[int, Suspect] | None:
        suspects: Any = ray.get(self._monitor.admit.remote(shard))
        return None if suspects is None else dict(suspects)

    def clear(self, shard: int, row: int) -> None:
        ray.get(self._monitor.clear.remote(shard, row))

    def report(
        self,
        progress: Sequence[Progress],
        log: Sequence[str],
        figures: Figures,
        stalled_s: float,
        experts: list[list[int]] | None,
    ) -> Callable[[], Order | None]:
        """What is returned waits for the monitor's answer, which is what the worker is to do."""
        answer: Any = self._monitor.report.remote(self._actor, progress, log, figures, stalled_s, experts)

        def wait() -> Order | None:
            order: Any = ray.get(answer)
            return None if order is None else Order(order)

        return wait

    def expect_end(self, ending: Ending) -> None:
        """Say why this process is about to end."""
        ray.get(self._monitor.expect_end.remote(self._actor, ending))

    def sample(self, take: Callable[[], Sample]) -> None:
        """Take the job's sample, unless another actor does. Rows that cannot be read are no failure: not yet."""
        if not ray.get(self._monitor.claim_sample.remote()):
            return
        try:
            found: tuple[Sample | None, str] = take(), ""
        except Exception as error:
            found = None, f"{type(error).__name__}: {error}"
        ray.get(self._monitor.give_sample.remote(*found))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the driver of an exception; Ray passes on only its text, and not always."""
        try:
            yield
        except Exception as error:
            told = error if isinstance(error, MorayError) else JobError(f"{type(error).__name__}: {error}")
            ray.get(self._monitor.fail.remote(told))
            raise
