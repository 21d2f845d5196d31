"""Forecasts from a sample and a speed, and the file that holds them."""

import json
from dataclasses import replace
from pathlib import Path

from made_jobs import TINY, make_spec, write_input
from watcher import Watcher

from moray.batch.forecast.estimate import EstimatedRange
from moray.batch.forecast.forecast import Forecast, WorkerPool, make_forecast
from moray.batch.forecast.forecast_text import describe_forecast
from moray.batch.forecast.job_forecast import ForecastOptions, choose_workers, read_forecast, sample_job, write_forecast
from moray.batch.forecast.sample import PromptSample, SampledPrompt
from moray.batch.ledger import Counts, Ledger
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.plan.nodes import Node
from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.plan.resources import choose_resources
from moray.batch.runtime.progress_reporting import ProgressReporter
from moray.batch.runtime.run_context import RunContext
from moray.batch.runtime.run_forecast import RunForecast
from moray.engine.text.tokenizer import Tokenizer

ROW = SampledPrompt(prompt_tokens=10, prefill_tokens=10, min_generated=0, max_generated=32, sequence_tokens=42)
LONG = SampledPrompt(prompt_tokens=5000, error="too_long")
SAMPLE = PromptSample(4, ((ROW, ROW, ROW, SampledPrompt(None, error="null_input")),))


def make_run_forecast(
    job: PlannedJob, folder: OutputFolder, watcher: Watcher, committed: dict[int, Counts] | None = None
) -> RunForecast:
    context = RunContext(job, folder, Ledger([shard.num_rows for shard in job.plan.shards], committed))
    forecast = RunForecast(context, ProgressReporter(context, watcher))
    forecast.resources = choose_resources(job.spec, job.plan, [Node({"CPU": 2.0}, {})], can_grow=False)
    return forecast


def test_the_file_has_these_keys(tmp_path: Path) -> None:
    pool = WorkerPool(2, 1.0, 60.0, "as given")
    forecast = make_forecast(SAMPLE, pool, is_scoring=False, per_row=20.0, price=3.0)
    assert json.loads(forecast.to_json()) == {
        "rows": 4,
        "prompt_tokens": {"expected": 30, "low": 30, "high": 30},
        "generated_tokens": {"expected": 60, "low": 0, "high": 96},
        "error_rows": {"null_input": 1},
        "tokens_per_s": 60.0,
        "source": "as given",
        "seconds": 1.0,
        "card_hours": round(2 / 3600, 4),
        "price": round(3 * 2 / 3600, 4),
        "warnings": [],
    }
    folder = OutputFolder(str(tmp_path))
    assert read_forecast(folder) is None
    write_forecast(folder, forecast)
    assert read_forecast(folder) == forecast == Forecast.from_json(forecast.to_json())
    folder.write(f"{JOB}/forecast.json", b'{"rows": 4')
    assert read_forecast(folder) is None


def test_a_job_that_has_its_forecast_keeps_it(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"] * 40})
    job, folder = plan_job(make_spec(tmp_path)), OutputFolder(str(tmp_path / "out"))
    watcher = Watcher()
    first = make_run_forecast(job, folder, watcher)
    drawn = first.start()
    assert drawn is not None and drawn.input_rows == 40
    first.on_sample(sample_job(job))
    there = folder.read(f"{JOB}/forecast.json")
    assert make_run_forecast(job, folder, watcher, {0: Counts(ok=15, failed=1)}).start() is None
    assert folder.read(f"{JOB}/forecast.json") == there is not None
    tokens = job.input.num_rows * len(Tokenizer(TINY).encode_prompt("a"))
    assert watcher.notes == [
        "test: 40 rows in 1 file, 3 shards, at most 320 tokens to generate",
        f"test: {tokens} prompt tokens",
        "test: 40 rows in 1 file, 3 shards, at most 320 tokens to generate; 16 rows done already",
        f"test: {tokens} prompt tokens",
    ]


def test_warnings_of_the_sample_are_kept_for_later_runs(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"] * 40})
    job, folder = plan_job(make_spec(tmp_path)), OutputFolder(str(tmp_path / "out"))
    sample, first, second = replace(sample_job(job), double_bos=3), Watcher(), Watcher()
    make_run_forecast(job, folder, first).on_sample(sample)
    warnings = [f"Warning: {warning}." for warning in sample.warnings]
    assert [note for note in first.notes if note in warnings] == warnings and "3 of 40 rows begin with two" in warnings[
        0
    ]
    make_run_forecast(job, folder, second).start()
    assert [note for note in second.notes if note in warnings] == warnings


def test_a_forecast_that_cannot_be_written_is_told_all_the_same(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    (tmp_path / "out/_job/forecast.json").mkdir(parents=True)
    job, watcher = plan_job(make_spec(tmp_path)), Watcher()
    first = make_run_forecast(job, OutputFolder(str(tmp_path / "out")), watcher)
    assert first.start() is not None
    first.on_sample(sample_job(job))
    assert watcher.notes[1].startswith("test: ") and "prompt token" in watcher.notes[1]


def test_a_forecast_in_a_line() -> None:
    pool = WorkerPool(2, 1.0, 60.0, "as given")
    sample = PromptSample(4000, ((ROW, ROW), (ROW, LONG)))
    forecast = make_forecast(sample, pool, is_scoring=False, per_row=20.0, price=3.0)
    low, high = forecast.prompt_tokens.low, forecast.prompt_tokens.high
    assert describe_forecast("job", forecast) == (
        f"job: about 30,000 prompt tokens ({low:,} to {high:,}), 1,000 rows will fail (too_long 1,000), "
        "17 minutes at 60 tokens/s, 1.67 USD"
    )


def test_nothing_is_said_that_is_not_known() -> None:
    without_speed = make_forecast(SAMPLE, WorkerPool(1, 1.0), is_scoring=False, per_row=20.0, price=3.0)
    assert (without_speed.tokens_per_s, without_speed.seconds, without_speed.price) == (None, None, None)
    without_length = make_forecast(SAMPLE, WorkerPool(1, 1.0, 60.0, "x"), is_scoring=False)
    assert without_length.generated_tokens == EstimatedRange(None, 0, 96) and without_length.seconds is None


def test_a_job_that_scores_takes_as_long_as_what_it_reads() -> None:
    row = SampledPrompt(prompt_tokens=10, prefill_tokens=15, sequence_tokens=14)
    forecast = make_forecast(PromptSample(2, ((row, row),)), WorkerPool(1, 0.0, 10.0, "x"), is_scoring=True, price=36.0)
    assert (forecast.prompt_tokens.expected, forecast.generated_tokens) == (30, EstimatedRange(0, 0, 0))
    assert (forecast.seconds, forecast.card_hours, forecast.price) == (3.0, None, 0.03)


def test_the_workers_are_those_the_spec_wants(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"] * 100})
    folder = OutputFolder(str(tmp_path / "out"))

    def choose(options: ForecastOptions, **workers: object) -> WorkerPool:
        return choose_workers(plan_job(make_spec(tmp_path, workers=workers)), SAMPLE, folder, {}, options)

    assert choose(ForecastOptions()) == WorkerPool(1, 0.0)
    assert choose(ForecastOptions(gpu="H200"), max=3) == WorkerPool(3, 1.0)
    assert choose(ForecastOptions(), max=100, accelerator="L4") == WorkerPool(7, 1.0), "no more than there are shards"
    found = choose(ForecastOptions(tokens_per_s=50.0), min=2)
    assert (found.workers, found.tokens_per_s, found.source) == (2, 100.0, "50 tokens/s a worker, as given")
