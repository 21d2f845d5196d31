"""WorkerActor: the Ray actor that holds the model. It takes blocks of token ids and returns blocks of token ids."""

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

from moray.batch.ledger import Command
from moray.batch.run_events import WORKER
from moray.batch.runtime.monitor_client import MonitorClient, journal_path
from moray.batch.runtime.stage_config import StageConfig
from moray.batch.runtime.worker_reports import WorkerReport
from moray.batch.stages.generate import Generate
from moray.batch.worker.journal import Journal
from moray.batch.worker.quarantine import WorkerExit
from moray.batch.worker.shard_executor import ShardExecutor
from moray.engine.config import EngineConfig
from moray.engine.errors import JobError
from moray.engine.platform.cpus import available_cores

if TYPE_CHECKING:
    from moray.engine.engine import Engine

REPORT_EVERY_S = 1.0  # seconds between two reports to the monitor


class WorkerActor:
    """Runs Generate, and reports every second how its engine is doing.

    Ray calls it several times at once, each time with one shard in a thread of its own.
    """

    def __init__(self, config: StageConfig) -> None:
        journal = Journal(journal_path(config.monitor))
        self._monitor = MonitorClient(config.monitor, WORKER, journal.lost_rows)
        self._log = _Log()
        logging.getLogger("moray").addHandler(self._log)
        logging.getLogger("moray").setLevel(logging.INFO)
        # Ray gives the actor a fraction of a CPU, and so one thread; but the whole machine is meant for it.
        engine_config = replace(config.engine, num_threads=config.engine.num_threads or available_cores())
        with self._monitor.starting():
            self._executor = ShardExecutor(
                lambda: self._load(config.model_path, engine_config),
                journal.write,
                self._monitor.clear,
                config.spec.limits.row_timeout_s,
                self._end_process,
                dedup=config.spec.engine.dedup == "auto",
            )
        self._stage = Generate(self._executor, self._monitor.admit)
        self._report_lock = Lock()  # reports are sent in the order in which they are made
        engine = self._executor.engine
        dtype = str(engine.dtype).removeprefix("torch.")
        if (kv_cache := engine.model_config.kv_cache) is not None:
            dtype += f", KV cache {kv_cache.label}"
        devices = (engine_config.tensor_parallel or 1) if engine_config.device == "cuda" else 1
        details = {"device": engine.device_name, "dtype": dtype, "products": engine.products}
        self._monitor.ready(reports=True, host=gethostname(), devices=devices, **details)
        Thread(target=self._report, name="report", daemon=True).start()

    def _load(self, model_path: str, config: EngineConfig) -> "Engine":
        # imported here, because it imports torch, which the driver does not need
        from moray.engine.engine import Engine

        return Engine(model_path, config)

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._monitor.report_errors():
            generated = self._stage(block)
            if generated.num_rows and not self._executor.progress():  # the job may end with this shard
                self._send_report()
            return generated

    def _report(self) -> None:
        """Send a report every REPORT_EVERY_S until the monitor's answer is to abort."""
        try:
            while self._send_report()() is not Command.ABORT:
                time.sleep(REPORT_EVERY_S)
            self._executor.fail(JobError("the job was aborted"))
        except Exception as failure:  # without the monitor nobody could stop the job
            self._executor.fail(failure)
        self._monitor.end_with_job()

    def _end_process(self, failure: BaseException) -> None:
        """End the process after an exception in the engine.

        Neither the state of such an engine nor the row at fault is known. The rows in the journal are tried again
        alone, in a new process. Returns, instead of ending the process, where the monitor is gone.
        """
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        logging.getLogger("moray").error("%s", "".join(traceback.format_exception(failure)))
        try:
            self._send_report()
            self._monitor.expect_exit(WorkerExit.failed(reason))
        except Exception:  # the job is over
            return
        os._exit(1)

    def _send_report(self) -> Callable[[], Command | None]:
        """Send a report of this worker; returns a function that waits for the monitor's command."""
        executor = self._executor
        with self._report_lock:
            stats, expert_tokens = executor.stats(), executor.pop_expert_tokens()
            report = WorkerReport(executor.progress(), self._log.pop_lines(), stats, executor.stalled_s, expert_tokens)
            return self._monitor.report(report)


class _Log(logging.Handler):
    """Keeps log lines until they are sent to the monitor."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[str] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def pop_lines(self) -> list[str]:
        """Return the lines since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]
