"""CrashTracker: records which processes of actors ended, and which rows may be the cause. Pure."""

from collections.abc import Callable

from moray.batch.run_events import ActorLost, RunEvent
from moray.batch.worker.quarantine import KILLED, Quarantine, RowsInFlight, Suspect, WorkerExit


class CrashTracker:
    """Keeps why a process ends until its actor starts again, and the quarantine of the rows that were in it.

    emit:  called with each event of the run that follows
    """

    def __init__(self, emit: Callable[[RunEvent], None]) -> None:
        self._emit = emit
        self._pids: dict[str, int] = {}  # by actor that is ready
        self._expected_exits: dict[str, WorkerExit] = {}  # by worker that is about to exit
        self._quarantine = Quarantine()

    def ready(self, actor: str, pid: int) -> None:
        """Record the process of an actor that is ready."""
        self._pids[actor] = pid

    def was_ready(self, actor: str) -> bool:
        """Return whether an actor that starts has lost a process that was ready."""
        return actor in self._pids

    def expect_exit(self, actor: str, worker_exit: WorkerExit) -> None:
        """Record why a worker is about to exit."""
        self._expected_exits[actor] = worker_exit

    def forget(self, actor: str) -> None:
        """Drop the expected exit of a worker that is gone for good."""
        self._expected_exits.pop(actor, None)

    def start(self, actor: str, stage: str, lost_rows: RowsInFlight | None) -> None:
        """Record that an actor starts: its last process, where that was ready, has ended.

        lost_rows:  the rows that were in that process, where this is known; they become suspects

        Raises JobError where workers end whatever row is alone in them.
        """
        worker_exit = self._expected_exits.pop(actor, KILLED)
        if not self.was_ready(actor):
            return
        pid = self._pids.pop(actor)
        reason = None if worker_exit.reason is None else f"it {worker_exit.verb}: {worker_exit.reason}"
        if lost_rows is None:
            self._emit(ActorLost(stage, actor, pid, reason))
            return
        self._quarantine.record_crash(lost_rows, worker_exit)
        shard, row = lost_rows.rows[0]
        self._emit(ActorLost(stage, actor, pid, reason, rows=len(lost_rows.rows), shard=shard, row=row))

    def suspects(self, shard: int) -> dict[int, Suspect]:
        """Return the suspects of a shard by row."""
        return self._quarantine.suspects(shard)

    def clear(self, shard: int, row: int) -> None:
        """Clear a suspect whose worker survived it."""
        self._quarantine.clear((shard, row))
