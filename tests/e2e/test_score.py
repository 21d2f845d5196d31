"""A job that scores: multiple choice with the small model, against full recomputes, resumed, refused when changed."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from made_jobs import TINY, make_spec, read_output
from tiny_checkpoints import Reference

from moray.batch.ledger import State
from moray.batch.output.verify import verify
from moray.batch.runtime.driver import JobResult, run_job
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import OutputError, RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.scoring import score
from moray.engine.text.continuations import encode_continuations
from moray.engine.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
CHOICES = TINY.parent / "choices"
SHOWN = ("sample", "logprob", "is_greedy", "num_prompt_tokens", "num_continuation_tokens", "token_logprobs", "error")


def spec_of(folder: Path, **more: Any) -> JobSpec:
    return make_spec(
        folder,
        task="score",
        model={"dtype": "float32"},
        input={"path": str(CHOICES / "choices-1.parquet"), "continuation": "choices"},
        output={"logprobs": 1} | more,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> tuple[Path, JobResult]:
    folder = tmp_path_factory.mktemp("score")
    return folder, run_job(spec_of(folder))


@pytest.fixture(scope="module")
def rows(job: tuple[Path, JobResult]) -> list[dict[str, Any]]:
    return read_output(job[0])


def encoded(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of rows that were scored."""
    pairs = encode_continuations(
        Tokenizer(TINY), [r["prompt"] for r in rows], [[r["choices"][r["sample"]]] for r in rows]
    )
    return [(pair[0], pair[1][0]) for pair in pairs if not isinstance(pair, RequestError)]


def test_every_choice_is_a_row_and_the_accounting_closes(
    job: tuple[Path, JobResult], rows: list[dict[str, Any]]
) -> None:
    folder, result = job
    given = pq.read_table(CHOICES / "choices-1.parquet").to_pylist()
    wanted = [
        (i, sample)
        for i, row in enumerate(given)
        for sample in range(1 if row["task"] == "wrong" else len(row["choices"]))
    ]
    assert [(row["source_row"], row["sample"]) for row in rows] == wanted
    bad = [row for row in rows if row["error"] is not None]
    assert [(row["id"], row["error"]["code"], row["logprob"]) for row in bad] == [("wrong-too-long", "too_long", None)]
    status = json.loads((folder / "out/_job/status.json").read_text())
    assert (result.status.state, status["input_rows"]) == (State.SUCCEEDED, len(given))
    assert (status["ok_rows"], status["failed_rows"], status["errors"]) == (len(given) - 1, 1, {"too_long": 1})
    contexts = {row["source_row"]: row["num_prompt_tokens"] for row in rows if row["error"] is None}
    assert verify(str(folder / "out")).closes
    scored = sum(row["num_continuation_tokens"] or 0 for row in rows)
    assert (status["prompt_tokens"], status["generated_tokens"]) == (sum(contexts.values()) + scored, 0)


def test_scores_equal_full_recomputes(rows: list[dict[str, Any]]) -> None:
    """Compare with transformers, in float32, and bit by bit with an engine asked for the logprobs of the whole text."""
    good = [row for row in rows if row["error"] is None]
    reference, engine = Reference(TINY), Engine(str(TINY), EngineConfig(dtype="float32"))
    for row, (context, continuation) in zip(good, encoded(good), strict=True):
        assert (row["num_prompt_tokens"], row["num_continuation_tokens"]) == (len(context), len(continuation))
        table = reference.logits(context + continuation).log_softmax(-1)[len(context) - 1 : -1]
        logprobs = table.gather(1, torch.tensor(continuation)[:, None]).squeeze(1)
        assert row["logprob"] == pytest.approx(logprobs.double().sum().item(), abs=1e-4), row["id"]
        assert [token["logprob"] for token in row["token_logprobs"]] == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert [token["token_id"] for token in row["token_logprobs"]] == continuation
        assert row["is_greedy"] == (table.argmax(-1).tolist() == continuation), row["id"]

        engine.add(Request("r", context + continuation, SamplingParams(max_tokens=0, prompt_logprobs=1)))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens = outputs[-1].completion.prompt_logprobs[len(context) :]
        found = score(tokens)
        assert (row["logprob"], row["is_greedy"]) == (found.logprob, found.is_greedy)
        assert [token["logprob"] for token in row["token_logprobs"]] == [token.logprob for token in tokens]


def test_the_model_chooses_right(rows: list[dict[str, Any]]) -> None:
    questions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["error"] is None:
            questions[row["source_row"]].append(row)
    best = [max(choices, key=lambda row: row["logprob"]) for choices in questions.values()]
    right = [row["choices"][row["sample"]].strip() == row["expected"] for row in best]
    assert len(right) == 67 and sum(right) >= 65, f"{sum(right)} of {len(right)}"


def test_a_part_that_is_lost_is_scored_again_the_same(job: tuple[Path, JobResult], rows: list[dict[str, Any]]) -> None:
    folder, _ = job
    sorted((folder / "out").glob("part-*.parquet"))[1].unlink()
    result = run_job(spec_of(folder))
    assert (result.did_nothing, result.status.ok_rows, result.status.failed_rows) == (False, 67, 1)
    assert [[row[name] for name in SHOWN] for row in read_output(folder)] == [
        [row[name] for name in SHOWN] for row in rows
    ]
    assert run_job(spec_of(folder)).did_nothing


def test_another_job_is_refused(job: tuple[Path, JobResult]) -> None:
    with pytest.raises(OutputError) as error:
        run_job(spec_of(job[0], logprobs=None))
    assert str(error.value).splitlines()[1:] == ["  output.logprobs: 1 -> null"]
