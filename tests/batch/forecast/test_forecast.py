"""Forecasts: what follows from a sample and a speed, and the file that others read."""

import json
from pathlib import Path

from made_jobs import TINY, make_spec, write_input

from batch.forecast.brief import brief_forecast
from batch.forecast.estimate import Range
from batch.forecast.first import FirstForecast
from batch.forecast.forecast import Crew, Forecast, make_forecast
from batch.forecast.of_job import Wanted, choose_crew, read_forecast, sample_job, write_forecast
from batch.forecast.sample import Sample, SampledRow
from batch.ledger import Counts, Ledger
from batch.output.folder import JOB, OutputFolder
from batch.placement.nodes import Node
from batch.placement.resources import choose_resources
from batch.planning.planner import plan_job
from engine.tokenizer import Tokenizer

ROW = SampledRow(prompt_tokens=10, counted=10, least=0, most=32, sequence=42)
LONG = SampledRow(prompt_tokens=5000, error="too_long")
SAMPLE = Sample(4, ((ROW, ROW, ROW, SampledRow(None, error="null_input")),))


def test_the_file_has_these_keys(tmp_path: Path) -> None:
    crew = Crew(2, 1.0, 60.0, "as given")
    forecast = make_forecast(SAMPLE, crew, is_scoring=False, per_row=20.0, price=3.0)
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
    shards = [shard.num_rows for shard in job.plan.shards]
    notes: list[str] = []
    first = FirstForecast(job, folder, notes.append)
    drawn = first.start(Ledger(shards, {}, None))
    assert drawn is not None and drawn.input_rows == 40
    first.take(sample_job(job), choose_resources(job.spec, job.plan, [Node({"CPU": 2.0}, {})], can_grow=False))
    there = folder.read(f"{JOB}/forecast.json")
    assert FirstForecast(job, folder, notes.append).start(Ledger(shards, {0: Counts(ok=15, failed=1)}, None)) is None
    assert folder.read(f"{JOB}/forecast.json") == there is not None
    tokens = job.input.num_rows * len(Tokenizer(TINY).encode_prompt("a"))
    assert notes == [
        "test: 40 rows in 1 file, 3 shards, at most 320 tokens to generate",
        f"test: {tokens} prompt tokens",
        "test: 40 rows in 1 file, 3 shards, at most 320 tokens to generate; 16 rows done already",
        f"test: {tokens} prompt tokens",
    ]


def test_a_forecast_that_cannot_be_written_is_told_all_the_same(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    (tmp_path / "out/_job/forecast.json").mkdir(parents=True)
    job, notes = plan_job(make_spec(tmp_path)), list[str]()
    first = FirstForecast(job, OutputFolder(str(tmp_path / "out")), notes.append)
    assert first.start(Ledger((1,), {}, None)) is not None
    first.take(sample_job(job), choose_resources(job.spec, job.plan, [Node({"CPU": 2.0}, {})], can_grow=False))
    assert notes[1].startswith("test: ") and "prompt token" in notes[1]


def test_a_forecast_in_a_line() -> None:
    crew = Crew(2, 1.0, 60.0, "as given")
    told = make_forecast(Sample(4000, ((ROW, ROW), (ROW, LONG))), crew, is_scoring=False, per_row=20.0, price=3.0)
    low, high = told.prompt_tokens.low, told.prompt_tokens.high
    assert brief_forecast("job", told) == (
        f"job: about 30,000 prompt tokens ({low:,} to {high:,}), 1,000 rows will fail (too_long 1,000), "
        "17 minutes at 60 tokens/s, 1.67 USD"
    )


def test_nothing_is_said_that_is_not_known() -> None:
    without_speed = make_forecast(SAMPLE, Crew(1, 1.0), is_scoring=False, per_row=20.0, price=3.0)
    assert (without_speed.tokens_per_s, without_speed.seconds, without_speed.price) == (None, None, None)
    without_length = make_forecast(SAMPLE, Crew(1, 1.0, 60.0, "x"), is_scoring=False)
    assert without_length.generated_tokens == Range(None, 0, 96) and without_length.seconds is None


def test_a_job_that_scores_takes_as_long_as_what_it_reads() -> None:
    row = SampledRow(prompt_tokens=10, counted=15, sequence=14)
    forecast = make_forecast(Sample(2, ((row, row),)), Crew(1, 0.0, 10.0, "x"), is_scoring=True, price=36.0)
    assert (forecast.prompt_tokens.expected, forecast.generated_tokens) == (30, Range(0, 0, 0))
    assert (forecast.seconds, forecast.card_hours, forecast.price) == (3.0, None, 0.03)


def test_the_workers_are_those_the_spec_wants(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"] * 100})
    folder = OutputFolder(str(tmp_path / "out"))

    def crew(wanted: Wanted, **workers: object) -> Crew:
        return choose_crew(plan_job(make_spec(tmp_path, workers=workers)), SAMPLE, folder, {}, wanted)

    assert crew(Wanted()) == Crew(1, 0.0)
    assert crew(Wanted(card="H200"), max=3) == Crew(3, 1.0)
    assert crew(Wanted(), max=100, accelerator="L4") == Crew(7, 1.0), "no more than there are shards"
    found = crew(Wanted(tokens_per_s=50.0), min=2)
    assert (found.workers, found.tokens_per_s, found.source) == (2, 100.0, "50 tokens/s a worker, as given")
