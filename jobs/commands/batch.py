"""`moray batch`: answer a file of requests, as the Batch API does, without an endpoint and without Ray."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import Any

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Ledger, Progress, SignalReceived, State
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder
from moray.batch.output.lease import hold_lease
from moray.batch.plan.model_info import read_config, read_model_info
from moray.batch.plan.provenance import pinned_path
from moray.batch.run_events import WORKER, ActorReady, ActorStarted, RunEvent
from moray.batch.runtime.signals import catch_signals
from moray.batch.status.status import Reporter
from moray.batch.status.workers import Workers
from moray.batch.units import count
from moray.batch.worker.stats import WorkerStats
from moray.engine.async_engine import AsyncEngine
from moray.engine.checkpoint.digest import weights_digest
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import InputError, JobError, OutputError, Problem, SettingsError
from moray.engine.platform.cpus import available_cores
from moray.jobs.batches.answers import START_ROWS
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.export import export_lines
from moray.jobs.batches.job import BatchJob, RequestLine
from moray.jobs.batches.lines import HashingReader, read_lines
from moray.jobs.batches.run import BatchRun
from moray.jobs.batches.validate import Rules, check_lines
from moray.jobs.commands.serve import check_gpu
from moray.jobs.views.progress_bar import ProgressDisplay
from moray.serve.args import EndpointArgs
from moray.serve.batches import LineAnswer, ReplicaFailedError
from moray.serve.endpoint import Endpoint
from moray.serve.openai.line_answers import LineAnswerer, LineRequest
from moray.serve.openai.requests import ROUTES

PARTS = ".parts"  # what the job folder of an output file has after its name
SHOWN = 20  # wrong lines that a message lists, at most
POLL_S = 0.2
ACTOR = "engine"
# Settings that change answers, beside the model's: they are part of the fingerprint.
ANSWERING = ("dtype", "max_model_len", "max_tokens_cap", "reasoning")
# Those that this command has: all others are of an endpoint.
SETTINGS = {
    *ANSWERING, "model", "name", "device", "quantization", "max_num_seqs", "max_num_batched_tokens",
    "max_num_bulk_tokens", "kv_cache_memory", "kv_cache_dtype", "tensor_parallel", "expert_parallel", "num_threads",
    "num_gpus", "max_batch_requests", "max_body_bytes",
}  # fmt: skip


def run_batch(args: EndpointArgs, input_: str, output: str) -> int:
    """Answer the requests of a file that have no answer yet, write the output file, and return the exit code.

    What is done is in the folder OUTPUT.parts: when the command ends early, it goes on there the next time.

    Raises UserError for what is wrong with the model, the file or the folder, before the model is loaded. Raises
    JobError where the engine fails.
    """
    if unknown := sorted(args.model_fields_set - SETTINGS):
        raise SettingsError([Problem(name, "is a setting of an endpoint; moray batch has none") for name in unknown])
    folder = OutputFolder(output + PARTS)
    job = _plan(args, input_, folder)
    check_folder(folder, job.plan)
    with ProgressDisplay(starting="loading the model") as display, hold_lease(folder, token_hex(4), display.note):
        folder.remove_abandoned()
        job.write()
        ledger = Ledger([shard.num_rows for shard in job.plan.shards], job.committed())
        run = _Run(args, job, ledger, display)
        if ledger.is_complete:
            display.note(f"{input_}: all {count(ledger.num_rows, 'request')} are answered already")
        else:
            with catch_signals(run.on_signal):
                asyncio.run(run.run())
        if ledger.is_complete:
            _write_output(job, output)
            display.note(f"  answers: {output}")
        return run.exit_code


def _plan(args: EndpointArgs, input_: str, parts: OutputFolder) -> BatchJob:
    """Check the model and the file, and plan the job. Raises UserError."""
    model = ModelSource(args.model)
    config = read_config(model, args.quantization, args.chosen_kv_cache_dtype)
    info = read_model_info(model, config, args.dtype)
    check_gpu(args, config, info)
    head, _, name = input_.rpartition("/")
    folder = OutputFolder(head or ("/" if input_.startswith("/") else "."))
    rules = Rules(tuple(ROUTES), args.model_name, args.max_batch_requests, args.max_body_bytes)
    digest = sha256()
    try:
        with folder.open(name) as file:
            checked = check_lines(read_lines(HashingReader(file, digest), args.max_body_bytes), rules)
    except OSError as error:
        raise InputError(folder.explain(error, name, done="read")) from None
    if checked.errors:
        lines = [
            f"{input_}{'' if error.line is None else f' line {error.line}'}: {error.message}"
            for error in checked.errors[:SHOWN]
        ]
        more = len(checked.errors) - SHOWN
        raise InputError("\n".join([*lines, *([f"... and {count(more, 'more mistake')}"] if more > 0 else [])]))
    others: dict[str, Any] = {"task": "batch", "model.name": args.model_name, "model.files": weights_digest(model)}
    others |= {f"model.{name}": value for name in ANSWERING if (value := getattr(args, name)) is not None}
    if info.quantization is not None:
        others["model.quantization"] = info.quantization
    if info.kv_cache is not None:
        others["model.kv_cache_dtype"] = info.kv_cache
    fingerprint = Fingerprint({PurePosixPath(name).name: digest.hexdigest()}, others)
    origin = {"moray": version("moray"), "model": pinned_path(model), "quantization": info.quantization}
    return BatchJob.of(parts, (folder, name), checked, fingerprint, args.max_body_bytes, origin)


class _Run:
    """Runs a job on an engine of this process, and shows how far it is."""

    def __init__(self, args: EndpointArgs, job: BatchJob, ledger: Ledger, display: ProgressDisplay) -> None:
        self._args = args
        self._job = job
        self._ledger = ledger
        self._display = display
        self._workers = Workers()
        name = PurePosixPath(job.input[1]).name
        run_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(2)}"
        self._reporter = Reporter(name, run_name, ledger, job.folder, time.monotonic, self._workers)
        self._budget = RowBudget(START_ROWS)
        self._run = BatchRun(job, ledger, self._answer, self._budget, self._reporter)
        self._first_rows = [shard.slices[0].first_row for shard in job.plan.shards]
        self._answerer: LineAnswerer | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def exit_code(self) -> int:
        return self._reporter.status().exit_code

    def on_signal(self, name: str) -> None:
        """Start nothing more at the first signal; break off what is in flight at the second."""
        if self._ledger.stopping_reason is None:
            self._ledger.handle(SignalReceived(name))
            self._run.stop()
        elif self._running is not None:
            self._running.cancel()
        else:
            sys.exit(128 + signal.Signals[name])

    async def run(self) -> None:
        """Load the model, answer, and write the last status. Raises JobError where the engine fails."""
        from moray.engine.engine import Engine  # brings torch

        self._display.note(f"Loading {self._args.model}")
        self._record(ActorStarted(WORKER, ACTOR, "here"))
        config = self._args.engine_config(num_threads=available_cores())
        engine = await AsyncEngine.start(lambda: Engine(self._args.model, config))
        try:
            self._record(ActorReady(WORKER, ACTOR, os.getpid(), "here"))
            self._answerer = LineAnswerer(Endpoint(self._args, engine))
            self._budget.target = self._answerer.max_rows
            self._running = asyncio.create_task(self._run.run())
            while not self._running.done():
                await asyncio.wait({self._running}, timeout=POLL_S)
                self._update(engine)
            if not self._running.cancelled():
                self._running.result()
        except JobError as error:
            self._run.end(str(error))
            raise
        finally:
            engine.close()
        self._workers.end(time.monotonic())
        self._run.end()
        self._display.update(self._reporter.status())

    def _record(self, event: RunEvent) -> None:
        self._workers.on_event(event, time.monotonic())
        self._reporter.record(event)

    def _update(self, engine: AsyncEngine) -> None:
        stats, now_s = engine.stats(), time.monotonic()
        rows = self._ledger.rows_done - self._ledger.ok - self._ledger.failed
        sample = WorkerStats(
            now_s,
            rows,
            engine.num_seqs,
            stats.waiting_seqs,
            stats.free_blocks,
            stats.blocks,
            stats.max_num_seqs,
            stats.max_num_batched_tokens,
            stats.totals,
        )
        self._workers.update_stats(ACTOR, sample, now_s)
        self._reporter.record_stats()
        status = self._reporter.status()
        self._reporter.write(status)
        if status.state is not State.PENDING:  # some line is answered
            self._display.update(status)

    async def _answer(self, requests: Sequence[RequestLine]) -> Sequence[LineAnswer]:
        """Answer the requests of a shard one by one, so that progress is seen line by line."""
        assert self._answerer is not None
        answerer, shard = self._answerer, bisect_right(self._first_rows, requests[0].row) - 1
        rows = prompt = generated = 0

        async def answer(request: RequestLine) -> LineAnswer:
            nonlocal rows, prompt, generated
            seed = f"{self._job.plan.fingerprint.hexdigest} {request.number}"
            answered = await answerer.answer([LineRequest(request.url, request.body, seed)])
            (found,) = answered.answers
            rows, prompt = rows + 1, prompt + (found.num_prompt_tokens or 0)
            generated += found.num_generated_tokens or 0
            self._ledger.handle(Progress(shard, rows, prompt, generated))
            return found

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(request)) for request in requests]
        except* ReplicaFailedError:
            raise JobError("the engine failed; what is committed is kept, run the command again to go on") from None
        return [task.result() for task in tasks]


def _write_output(job: BatchJob, output: str) -> None:
    """Write the answers to the output file, in the order of the input; it appears whole or not at all.

    Raises OutputError where it cannot be written.
    """
    committed = {shard.index for shard in job.plan.shards}
    head, _, name = output.rpartition("/")
    folder = OutputFolder(head or ("/" if output.startswith("/") else "."))
    try:
        with tempfile.NamedTemporaryFile(dir=folder.root if folder.is_local else None, delete=False) as file:
            try:
                for line in export_lines(job, job.plan.fingerprint.short, committed, None):
                    file.write(line.text)
                file.flush()
                if folder.is_local:
                    os.chmod(file.name, 0o666 & ~_umask())
                    os.replace(file.name, f"{folder.root}/{name}")
                else:  # from a file, since a stream that fails would leave a short object
                    with (
                        open(file.name, "rb") as source,
                        folder.filesystem.open_output_stream(f"{folder.root}/{name}") as sink,
                    ):
                        shutil.copyfileobj(source, sink, 1 << 20)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(folder.explain(error, name)) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
