"""The choice of sampled rows, and their prompts, with real files and the real tokenizer."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from made_jobs import TINY, damage, make_spec, write_input

from moray.batch.forecast import sample_plan as drawing
from moray.batch.forecast.collect_sample import collect_sample
from moray.batch.forecast.job_forecast import sample_job
from moray.batch.forecast.sample import PromptSample
from moray.batch.forecast.sample_plan import RUNS, choose_rows, sample_runs
from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.shards import Slice
from moray.batch.stages.prompts import Prompts
from moray.engine.text.tokenizer import Tokenizer
from moray.jobs.views.plan_values import describe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def sample(job: PlannedJob, tokenizer: Tokenizer, seed: int = 0, rows: int = 1000) -> PromptSample:
    drawn = choose_rows(job.input, job.spec, seed, rows)
    return collect_sample(
        drawn, job.spec, job.input.filesystem, job.input.root, job.input.layout, tokenizer, job.config
    )


files = st.lists(st.integers(1, 400), min_size=1, max_size=12)


@given(files, st.integers(1, 1500), st.integers(0, 9))
def test_runs_are_rows_of_the_input_none_twice(counts: list[int], rows: int, seed: int) -> None:
    spans = [Slice(f"{index}.parquet", 7 * index, count) for index, count in enumerate(counts)]
    runs = sample_runs(spans, rows, seed)
    drawn = [(piece.file, piece.first_row + i) for run in runs for piece in run for i in range(piece.num_rows)]
    there = [(piece.file, piece.first_row + i) for piece in spans for i in range(piece.num_rows)]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(there)
    assert drawn == sorted(drawn, key=there.index)
    if sum(counts) <= rows:
        assert drawn == there
    else:
        size = max(1, rows // RUNS)
        assert rows - 2 * size < len(drawn) <= rows
        assert runs == sample_runs(spans, rows, seed)


def test_every_row_is_as_likely_as_any_other() -> None:
    spans = [Slice("a", 0, 30), Slice("b", 0, 1), Slice("c", 0, 69)]
    seen: dict[tuple[str, int], int] = {}
    for seed in range(2000):
        for piece in (piece for run in sample_runs(spans, 20, seed) for piece in run):
            for row in range(piece.first_row, piece.first_row + piece.num_rows):
                seen[piece.file, row] = seen.get((piece.file, row), 0) + 1
    assert len(seen) == 100 and all(320 < count < 480 for count in seen.values())  # 400 each, 4.5 sigma


def write_sheep(folder: Path) -> None:
    """4,000 prompts in 5 files of several row groups, longest last; a few null, empty, or too long."""
    random_ = random.Random(1)
    for file in range(5):
        prompts: list[str | None] = ["sheep " * random_.randint(1, 10 * (file + 1)) for _ in range(800)]
        prompts[::100] = [None] * 8
        prompts[50] = ""
        prompts[60] = "sheep " * 2500
        write_input(folder / f"in/{file}.parquet", {"prompt": prompts}, row_group_size=300)


def test_the_true_totals_lie_in_the_ranges(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Expect at least 34 of 40 draws: an honest range holds 38, and fewer than 34 once in two hundred times."""
    write_sheep(tmp_path)
    job = plan_job(make_spec(tmp_path))
    whole = sample(job, tokenizer, rows=4000)
    assert whole.is_whole and whole.errors == {"null_input": 40, "empty_prompt": 5, "too_long": 5}
    truth = whole.prompt_tokens.expected
    assert truth is not None
    found = [sample(job, tokenizer, seed, rows=200) for seed in range(40)]
    assert all(len(one.rows) == 200 for one in found)
    assert sum(one.prompt_tokens.low <= truth <= one.prompt_tokens.high for one in found) >= 34
    assert all(one.generated_tokens.low == 0 and one.generated_tokens.high > 7.7 * 4000 for one in found)


def test_the_same_rows_each_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_sheep(tmp_path)
    job = plan_job(make_spec(tmp_path))
    assert sample(job, tokenizer) == sample(job, tokenizer) == sample_job(job)
    assert sample(job, tokenizer, seed=1) != sample(job, tokenizer)


def test_of_a_large_input_the_beginnings_of_its_row_groups_are_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sheep(tmp_path)
    job = plan_job(make_spec(tmp_path))
    size = sum(file.size for file in job.input.files)
    monkeypatch.setattr(drawing, "READ_BYTES", size // 4)
    drawn = choose_rows(job.input, job.spec)
    assert 0.2 < drawn.scanned_fraction < 0.35
    offsets = {(piece.first_row + i) % 300 for run in drawn.runs for piece in run for i in range(piece.num_rows)}
    assert max(offsets) <= 300 * drawn.scanned_fraction + 1
    found = sample(job, tokenizer)
    assert found.scanned_fraction == drawn.scanned_fraction and not found.is_whole and found.input_rows == 4000


@pytest.mark.parametrize(("share", "rows", "is_whole"), [(4, 13, False), (1000, 50, True)])
def test_few_rows_that_are_large(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, share: int, rows: int, is_whole: bool
) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} sheep " * 20 for i in range(50)]})
    job = plan_job(make_spec(tmp_path))
    sizes = drawing._measure(job.input, ["prompt"])
    monkeypatch.setattr(drawing, "READ_BYTES", sizes.compressed / share)
    found = sample(job, tokenizer)
    assert (len(found.rows), found.is_whole) == (rows, is_whole)


def test_fewer_rows_of_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} " * 2000 for i in range(2000)]})
    job = plan_job(make_spec(tmp_path))
    monkeypatch.setattr(drawing, "TEXT_BYTES", 2_000_000)
    drawn = choose_rows(job.input, job.spec)
    assert RUNS <= sum(piece.num_rows for run in drawn.runs for piece in run) < 400


def test_duplicates_and_what_prompts_begin_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    start = "Count the sheep and the lions: "
    prompts = [start + "1", start + "2", start + "1", None, start + "2", "" * 3]
    write_input(tmp_path / "in/a.parquet", {"prompt": prompts, "image": [b"x" * 1000] * 6})
    found = sample(plan_job(make_spec(tmp_path)), tokenizer)
    ids = [tokenizer.encode_prompt(start + digit) for digit in "12"]
    assert found.duplicates == 2
    assert found.shared_prefix == next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])


def test_rows_that_cannot_be_read_fail_in_the_forecast_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"prompt {i}" for i in range(60)]}, row_group_size=20)
    damage(tmp_path / "in/a.parquet", row_group=1)
    found = sample(plan_job(make_spec(tmp_path)), tokenizer)
    assert found.errors == {"unreadable": 20}


def test_a_row_has_limits_of_its_own_and_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a", "b"], "limit": [5, None]})
    sampling: dict[str, Any] = {"max_tokens": 8, "n": 3, "columns": {"max_tokens": "limit"}}
    found = sample(plan_job(make_spec(tmp_path, sampling=sampling)), tokenizer)
    assert [(row.min_generated, row.max_generated) for row in found.rows] == [(0, 15), (0, 24)]
    assert [row.sequence_tokens - row.prefill_tokens for row in found.rows] == [5, 8]
    fixed = sample(plan_job(make_spec(tmp_path, sampling=sampling | {"ignore_eos": True})), tokenizer)
    assert fixed.generated_tokens.expected == fixed.generated_tokens.high == 39


def test_what_is_scored_counts_as_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = pa.array([[5] * 10], pa.list_(pa.int32()))
    choices = pa.array([[[7] * 4, [7]]], pa.list_(pa.list_(pa.int32())))
    write_input(tmp_path / "in/a.parquet", {"ids": ids, "choices": choices})
    spec = make_spec(tmp_path, task="score", input={"token_ids": "ids", "continuation": "choices"})
    (row,) = sample(plan_job(spec), tokenizer).rows
    assert (row.prompt_tokens, row.prefill_tokens, row.sequence_tokens, row.max_generated) == (10, 15, 14, 0)


def test_prompts_with_a_beginning_of_their_own_are_said(tmp_path: Path) -> None:
    """Rendered beforehand, `<s>[INST]...`: the tokenizer's own rule gives them a second one."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    write_input(tmp_path / "in/a.parquet", {"prompt": ["<s>a", "b", "<s>c", None]})
    path = {"path": str(model)}
    job = plan_job(make_spec(tmp_path, model=path))
    found = sample_job(job)
    assert found.warnings == (
        "2 of 4 rows begin with two beginning-of-sequence tokens, their own and the tokenizer's; template.bos: never "
        "adds none",
    )
    assert describe(job)["warnings"] == list(found.warnings)
    never = plan_job(make_spec(tmp_path, model=path, template={"bos": "never"}))
    assert sample_job(never).warnings == () and never.plan.fingerprint != job.plan.fingerprint
    table = pa.table({"prompt": ["<s>a", "b"]})
    ((first, _), (second, _)) = Prompts(never.spec, Tokenizer(model), 2000).encode(table)  # type: ignore[misc]
    assert first[0] == bos and bos not in (*first[1:], *second)
