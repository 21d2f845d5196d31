"""Worker: the Ray actor that holds the model. Token ids in, token ids out."""

import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from socket import gethostname
from threading import Lock, Thread
from typing import TYPE_CHECKING

import pyarrow as pa

from batch.faults.quarantine import Ending
from batch.ledger import Order
from batch.stages.answers import answers, read_rows
from batch.stages.engine_thread import EngineThread
from batch.stages.journal import Journal
from batch.stages.rows import GENERATED, shard_of
from batch.stages.shard_run import ShardRun
from batch.stages.stage import Stage, journal_path
from engine.config import EngineConfig
from engine.cores import available_cores
from engine.errors import JobError

if TYPE_CHECKING:
    from engine.engine import Engine

REPORT_EVERY_S = 1.0


class Worker:
    """Runs shards through one engine; several calls at once, each in a thread of its own, each with its shard.

    monitor:  name of the job's Monitor actor
    """

    def __init__(self, model_path: str, config: EngineConfig, row_timeout_s: float | None, monitor: str) -> None:
        journal = Journal(journal_path())
        self._stage = Stage(monitor, "worker", journal.died)
        self._log = _Log()
        logging.getLogger("engine").addHandler(self._log)
        logging.getLogger("engine").setLevel(logging.INFO)
        # Ray gives the actor a fraction of a CPU, and so one thread; the machine is there for it.
        config = replace(config, num_threads=config.num_threads or available_cores())
        with self._stage.telling():
            self._engine = EngineThread(
                lambda: self._load(model_path, config), journal.write, self._stage.clear, row_timeout_s, self._end
            )
        self._entrance = Lock()
        self._telling = Lock()  # what was taken first is told first
        engine = self._engine.engine
        dtype = str(engine.dtype).removeprefix("torch.")
        self._stage.ready(reports=True, host=gethostname(), device=engine.device_name, dtype=dtype)
        Thread(target=self._report, name="report", daemon=True).start()

    def _load(self, model_path: str, config: EngineConfig) -> "Engine":
        from engine.engine import Engine  # and torch, which the driver has no use for

        return Engine(model_path, config)

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._stage.telling():
            run = self._start(block) if block.num_rows else None
            if run is None:
                return GENERATED.empty_table()
            run.wait()
            if not self._engine.progress():  # with this shard the job may end
                self._tell()
            return answers(block, run)

    def _start(self, block: pa.Table) -> ShardRun | None:
        """Admit a shard when there is room for it; None where it may not start any more."""
        with self._entrance:  # what one brings the next one sees
            self._engine.wait_for_room()
            shard, *_ = shard_of(block)
            suspects = self._stage.admit(shard)
            if suspects is None:
                return None
            run = ShardRun(shard, list(read_rows(block)), suspects=suspects)
            self._engine.start(run)
            return run

    def _report(self) -> None:
        """Tell the monitor how far the shards are, and do what it says."""
        try:
            while self._tell()() is not Order.ABORT:
                time.sleep(REPORT_EVERY_S)
            self._engine.fail(JobError("the job was aborted"))
        except Exception as failure:  # without a monitor nobody could stop the job
            self._engine.fail(failure)
        self._stage.end_with_job()

    def _end(self, failure: BaseException) -> None:
        """End the process: nobody knows what state an engine is in that has raised, nor which row is at fault. What the
        journal says was in it is tried again alone, in a new process. Returns where there is nobody to tell."""
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        logging.getLogger("engine").error("%s", "".join(traceback.format_exception(failure)))
        try:
            self._tell()
            self._stage.expect_end(Ending.failed(reason))
        except Exception:  # the job is over
            return
        os._exit(1)

    def _tell(self) -> Callable[[], Order | None]:
        """See Stage.report."""
        engine = self._engine
        with self._telling:
            figures, experts = engine.figures(), engine.take_expert_tokens()
            return self._stage.report(engine.progress(), self._log.take(), figures, engine.stalled_s, experts)


class _Log(logging.Handler):
    """Keeps what was logged until the monitor is told."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[str] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def take(self) -> list[str]:
        return [self._lines.popleft() for _ in range(len(self._lines))]
