"""Make the forecast of a planned job, for `moray plan` and for the file that a job's first run writes."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moray.batch.forecast.collect_sample import collect_sample
from moray.batch.forecast.forecast import Forecast, WorkerPool, expect_generated, make_forecast
from moray.batch.forecast.sample import PromptSample
from moray.batch.forecast.sample_plan import choose_rows
from moray.batch.forecast.speed import MeasuredLoad, Speed, generated_per_row, speed_of_benchmark, speed_of_earlier_run
from moray.batch.ledger import Counts
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.plan.planner import PlannedJob
from moray.engine.core.step_limits import DEFAULTS
from moray.engine.errors import OutputError
from moray.engine.text.tokenizer import Tokenizer

FORECAST = f"{JOB}/forecast.json"


@dataclass(frozen=True)
class ForecastOptions:
    """Holds what the forecast is for.

    gpu:           model of GPU, by Ray's names; None = the spec's, if it names one
    workers:       number of workers; None = the spec's, its minimum where that is auto
    gpus:          GPUs of a worker; None = the spec's
    tokens_per_s:  throughput of one worker; None = as it was measured
    price:         USD per GPU-hour, or per worker-hour without GPUs
    """

    gpu: str | None = None
    workers: int | None = None
    gpus: float | None = None
    tokens_per_s: float | None = None
    price: float | None = None


def sample_job(job: PlannedJob) -> PromptSample:
    """Read and tokenize a sample of the job's rows. Raises UserError where input or tokenizer cannot be read."""
    sample_plan = choose_rows(job.input, job.spec)
    with TemporaryDirectory(prefix="moray-") as parent:
        tokenizer = Tokenizer(job.model.metadata_folder(Path(parent)))
        return collect_sample(
            sample_plan, job.spec, job.input.filesystem, job.input.root, job.input.layout, tokenizer, job.config
        )


def forecast_job(
    job: PlannedJob,
    sample: PromptSample,
    folder: OutputFolder,
    committed: Mapping[int, Counts],
    options: ForecastOptions,
) -> Forecast:
    """Make the forecast of a job.

    committed: counts of the shards that earlier runs have finished, by shard
    """
    pool = choose_workers(job, sample, folder, committed, options)
    is_scoring = job.spec.is_scoring
    per_row = None if is_scoring else generated_per_row(committed)
    return make_forecast(sample, pool, is_scoring=is_scoring, per_row=per_row, price=options.price)


def choose_workers(
    job: PlannedJob,
    sample: PromptSample,
    folder: OutputFolder,
    committed: Mapping[int, Counts],
    options: ForecastOptions,
) -> WorkerPool:
    """Choose the workers of the forecast, with their speed as far as it is known."""
    spec = job.spec.workers
    gpu = options.gpu or spec.accelerator
    max_workers = spec.min if spec.max == "auto" else spec.max
    workers = max(1, min(options.workers or max_workers, len(job.plan.shards)))
    own_gpus = job.spec.gpus_per_worker(has_gpus=gpu is not None)
    gpus = own_gpus if options.gpus is None else options.gpus
    speed: Speed | None
    if options.tokens_per_s is not None:
        speed = Speed(options.tokens_per_s, f"{options.tokens_per_s:,.0f} tokens/s a worker, as given")
    else:
        is_alike = gpu == spec.accelerator and gpus == own_gpus
        speed = speed_of_earlier_run(folder) if committed and is_alike else None
        if speed is None and gpus <= 1:  # the benchmarks' results are of one GPU
            speed = _speed_of_benchmark(job, sample, committed, gpu)
    if speed is None:
        return WorkerPool(workers, gpus)
    return WorkerPool(workers, gpus, round(speed.tokens_per_s * workers, 1), speed.source)


def _speed_of_benchmark(
    job: PlannedJob, sample: PromptSample, committed: Mapping[int, Counts], gpu: str | None
) -> Speed | None:
    running = sum(row.error is None for row in sample.rows)
    if gpu is None or not running or job.spec.is_scoring:
        return None
    answers = expect_generated(sample, generated_per_row(committed))
    load = MeasuredLoad(
        prompt=sum(row.prefill_tokens for row in sample.rows) / running,
        output=(answers.high if answers.expected is None else answers.expected) / max(1, sample.input_rows),
        max_num_seqs=job.spec.engine_config().max_num_seqs or DEFAULTS["cuda"].max_num_seqs,
    )
    return speed_of_benchmark(job.config, job.model_info.dtype, gpu, load)


def write_forecast(folder: OutputFolder, forecast: Forecast) -> None:
    """Write the forecast to the job folder. A store's error is ignored: no job needs its forecast."""
    with suppress(OSError):
        folder.write(FORECAST, forecast.to_json().encode(), durable=False)


def read_forecast(folder: OutputFolder) -> Forecast | None:
    """Read the forecast of the job's first run; None where there is none that can be read."""
    try:
        content = folder.read(FORECAST)
        return None if content is None else Forecast.from_json(content)
    except (OutputError, ValueError, TypeError, KeyError):
        return None
