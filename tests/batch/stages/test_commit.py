"""From the engine's completions to a part on disk: one schema, every row, and a record that agrees with the rows."""

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY

from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import read_part
from moray.batch.output.part_stats import PartStats
from moray.batch.output_columns import COLUMNS
from moray.batch.stages.block_schemas import GENERATED, KEPT, PREPARED, Failure
from moray.batch.stages.commit import RECORD, Commit
from moray.batch.stages.results import build_result_block, read_rows
from moray.batch.worker.in_flight_shard import InFlightShard
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, TokenLogprobs
from moray.engine.sampling.scoring import scoring_params
from moray.engine.settings.markers import PRESETS
from moray.engine.text.tokenizer import Tokenizer

KEPT_FIELDS = pa.schema([pa.field("id", pa.string()), pa.field("sizes", pa.list_(pa.int8()))])
SCHEMA = pa.schema([*KEPT_FIELDS, *(pa.field(name, kind) for name, kind in COLUMNS["generate"].items())])
LATE = Failure("read", "null_input", "no prompt").as_struct()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def prepared(num_rows: int, failed: Sequence[int] = ()) -> pa.Table:
    rows = [
        {
            "shard": 2, "shard_rows": num_rows, "part": "part-0.parquet", "source_file": "a", "source_row": 10 + i,
            f"{KEPT}id": f"r{i}", f"{KEPT}sizes": [i],
        }
        | ({"error": LATE} if i in failed else {
            "num_prompt_tokens": 3, "prompt_token_ids": [5, 6, i], "params": pickle.dumps(SamplingParams(n=1 + i % 2)),
            "stream_key": 2**64 - 1 - i,
        })
        for i in range(num_rows)
    ]  # fmt: skip
    kept = [pa.field(KEPT + field.name, field.type) for field in KEPT_FIELDS]
    return pa.Table.from_pylist(rows, schema=pa.schema([*PREPARED, *kept]))


def completion(tokenizer: Tokenizer, text: str, **fields: Any) -> Completion:
    ids = tuple(tokenizer.encode_prompt(text))
    return Completion(ids, "stop", num_prompt_tokens=3, **fields)


def ran(block: pa.Table, completions: dict[int, list[Completion]], engine_s: float = 0.0) -> InFlightShard:
    """Return the block as a finished shard, each row of which was in the engine for 0.25 s."""
    latencies_s = dict.fromkeys(completions, 0.25)
    return InFlightShard(2, list(read_rows(block)), completions, latencies_s, engine_s=engine_s)


def commit(folder: Path, tokenizer: Tokenizer, block: pa.Table, schema: pa.Schema = SCHEMA) -> tuple[Any, list[Any]]:
    """Return the ledger's record and the rows of the part."""
    record = Commit(str(folder), schema, "f" * 64, {"moray": "1.2.3"}, tokenizer)(block)
    assert record.schema == RECORD
    table = pq.read_table(folder / "part-0.parquet")
    assert table.schema.remove_metadata() == schema
    return json.loads(record["counts"][0].as_py()), table.to_pylist()


def test_rows_for_the_engine_are_those_that_can_run() -> None:
    rows = [(row.index, row.request) for row in read_rows(prepared(3, failed=[1]))]
    assert [(index, request.prompt_token_ids, request.params.n, request.stream_key) for index, request in rows] == [
        (0, [5, 6, 0], 1, 2**64 - 1), (2, [5, 6, 2], 1, 2**64 - 3),
    ]  # fmt: skip


def test_a_part_has_every_row_and_a_record_that_agrees(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(4, failed=[2])
    two = [completion(tokenizer, "max"), completion(tokenizer, "sort")]
    late = Completion((1, 2), "error", 3, error=("row_timeout", "too slow"))
    run = ran(block, {0: [completion(tokenizer, "sum is 12")], 1: two, 3: [late]}, engine_s=1.5)
    run.num_copied = 1
    counts, rows = commit(tmp_path, tokenizer, build_result_block(block, run))
    assert [(row["source_row"], row["sample"], row["generated_text"], row["finish_reason"]) for row in rows] == [
        (10, 0, "sum is 12", "stop"), (11, 0, "max", "stop"), (11, 1, "sort", "stop"),
        (12, 0, None, "error"), (13, 0, None, "error"),
    ]  # fmt: skip
    assert [row["id"] for row in rows] == ["r0", "r1", "r1", "r2", "r3"]
    assert [row["sizes"] for row in rows] == [[0], [1], [1], [2], [3]]
    assert [row["error"] for row in rows] == [
        None, None, None, LATE, {"stage": "generate", "code": "row_timeout", "message": "too slow"},
    ]  # fmt: skip
    assert [row["num_prompt_tokens"] for row in rows] == [3, 3, 3, None, 3]
    assert [row["num_generated_tokens"] for row in rows][3:] == [0, 2]
    generated = sum(row["num_generated_tokens"] for row in rows[:3])
    assert counts == {
        "ok": 2, "failed": 2, "prompt_tokens": 6, "generated_tokens": generated, "engine_s": 1.5, "copied": 1,
        "errors": {"null_input": 1, "row_timeout": 1},
    }  # fmt: skip
    record = json.loads(pq.read_metadata(tmp_path / "part-0.parquet").metadata[b"moray"])
    lengths = Counter(row["num_generated_tokens"] for row in rows[:3])
    tally = {
        "finish_reasons": {"stop": 3},
        "histograms": {
            "prompt_tokens": {"3": 2},
            "generated_tokens": {str(n): count for n, count in sorted(lengths.items())},
            "latency_ms": {"200": 2},
        },
    }
    assert max(lengths) <= 6, "buckets of one length"
    assert record == {
        "fingerprint": "f" * 64, "shard": 2, "num_rows": 5, "counts": counts, "tally": tally, "moray": "1.2.3",
    }  # fmt: skip


def test_logprobs_token_ids_and_the_end_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(1)
    logprobs = (TokenLogprobs(9, -0.5, ((9, -0.5), (4, -1.25))), TokenLogprobs(4, -2.0, ()))
    answer = completion(tokenizer, "one two", text_length=3, logprobs=logprobs)
    run = ran(block, {0: [answer]})
    _, (row,) = commit(tmp_path, tokenizer, build_result_block(block, run))
    assert row["generated_text"] == "one"
    assert tuple(row["generated_token_ids"]) == answer.token_ids
    assert row["logprobs"] == [
        {"token_id": 9, "logprob": -0.5, "top": [{"token_id": 9, "logprob": -0.5}, {"token_id": 4, "logprob": -1.25}]},
        {"token_id": 4, "logprob": -2.0, "top": []},
    ]


SCORES = pa.schema([*KEPT_FIELDS, *(pa.field(name, kind) for name, kind in COLUMNS["score"].items())])


def scored(*continuations: list[int], logprobs: int | None = 1, failed: Sequence[int] = ()) -> pa.Table:
    """Return a prepared block of two rows with the same continuations."""
    block = prepared(2, failed)
    params = pickle.dumps(scoring_params(logprobs))
    rows = [
        row | ({} if row["error"] else {"params": params, "continuations": continuations}) for row in block.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=block.schema)


def test_scores_are_rows_of_their_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = scored([8, 9], [7], failed=[1])
    tokens = [
        TokenLogprobs(8, -0.5, ((8, -0.5), (3, -1.0))), TokenLogprobs(9, -0.25, ((9, -0.25), (4, -2.0))),
        TokenLogprobs(7, -3.0, ((8, -0.5), (3, -1.0))),
    ]  # fmt: skip
    samples = [
        Completion((), "length", 5, prompt_logprobs=(None, None, None, *tokens[:2])),
        Completion((), "length", 4, prompt_logprobs=(None, None, None, tokens[2])),
    ]
    counts, rows = commit(tmp_path, tokenizer, build_result_block(block, ran(block, {0: samples})), SCORES)
    names = ("id", "sample", "logprob", "num_prompt_tokens", "num_continuation_tokens", "is_greedy", "source_row")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("r0", 0, -0.75, 3, 2, True, 10), ("r0", 1, -3.0, 3, 1, False, 10), ("r1", 0, None, None, None, None, 11),
    ]  # fmt: skip
    assert [row["error"] for row in rows] == [None, None, LATE]
    assert rows[1]["token_logprobs"] == [{"token_id": 7, "logprob": -3.0, "top": [{"token_id": 8, "logprob": -0.5}]}]
    assert rows[2]["token_logprobs"] is None
    assert counts == {
        "ok": 1, "failed": 1, "prompt_tokens": 6, "generated_tokens": 0, "engine_s": 0.0, "errors": {"null_input": 1},
    }  # fmt: skip


def test_a_row_with_a_continuation_that_failed_has_failed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = scored([8], [7], failed=[1])
    late = Completion((), "error", 4, error=("nan_logits", "not finite"))
    counts, rows = commit(tmp_path, tokenizer, build_result_block(block, ran(block, {0: [late]})), SCORES)
    assert [(row["sample"], row["logprob"], row["error"]["code"]) for row in rows] == [
        (0, None, "nan_logits"), (0, None, "null_input"),
    ]  # fmt: skip
    assert (counts["failed"], counts["prompt_tokens"]) == (2, 0)


def test_kept_columns_keep_their_values_whatever_their_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(1)
    names = ["shard", "part", "engine_s", "text_length", "logprob"]
    for name in names:
        block = block.append_column(KEPT + name, pa.array([f"mine: {name}"]))
    schema = pa.schema([*(pa.field(name, pa.string()) for name in names), *SCHEMA])
    run = ran(block, {0: [completion(tokenizer, "x")]})
    _, (row,) = commit(tmp_path, tokenizer, build_result_block(block, run), schema)
    assert [row[name] for name in names] == [f"mine: {name}" for name in names]


def test_the_schema_decides_the_columns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(1)
    schema = pa.schema([field for field in SCHEMA if field.name not in ("id", "logprobs", "generated_token_ids")])
    run = ran(block, {0: [completion(tokenizer, "x")]})
    _, (row,) = commit(tmp_path, tokenizer, build_result_block(block, run), schema)
    assert "logprobs" not in row and row["sizes"] == [0]


def test_a_null_error_is_null_and_not_a_struct_of_nulls(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(1)
    commit(tmp_path, tokenizer, build_result_block(block, ran(block, {0: [completion(tokenizer, "x")]})))
    assert pq.read_table(tmp_path / "part-0.parquet")["error"].null_count == 1


def test_text_that_cannot_be_made_is_a_bad_row(tmp_path: Path) -> None:
    class Broken(Tokenizer):
        def decode(self, token_ids: Any) -> str:
            ids = list(token_ids)
            if 13 in ids:
                raise ValueError("token 13 has no bytes")
            return super().decode(ids)

    block = prepared(2)
    samples = [Completion((5,), "stop", 3), Completion((13,), "stop", 3)]
    run = ran(block, {0: [Completion((5,), "length", 3)], 1: samples})
    counts, rows = commit(tmp_path, Broken(TINY), build_result_block(block, run))
    assert [(row["finish_reason"], row["sample"]) for row in rows] == [("length", 0), ("error", 0)]
    assert rows[1]["error"] == {"stage": "detokenize", "code": "ValueError", "message": "token 13 has no bytes"}
    assert (counts["ok"], counts["failed"]) == (1, 1)
    assert stats_of(tmp_path).histograms["latency_ms"] == {200: 1}, "of the row that is ok"


def test_reasoning_and_answer_are_columns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["<think>a is 1</think>b", "a is 1</think>b", "a is", "a </think> b", "<think>a"]
    block = prepared(5).set_column(6, "begins_open", pa.array([None, None, True, False, None]))
    run = ran(block, {i: [completion(tokenizer, text)] for i, text in enumerate(texts)})
    run.completions[4] = [Completion(run.completions[4][0].token_ids, "length", 3)]
    whole = commit(tmp_path, tokenizer, build_result_block(block, run))[1]
    made = Commit(str(tmp_path), SCHEMA, "f" * 64, {}, tokenizer, markers=PRESETS["think"])
    made(build_result_block(block, run))
    rows = pq.read_table(tmp_path / "part-0.parquet").to_pylist()
    assert [(row["reasoning"], row["generated_text"]) for row in rows] == [
        ("a is 1", "b"), ("a is 1", "b"), ("a is", ""), (None, "a </think> b"), ("a", ""),
    ]  # fmt: skip
    assert [row["generated_text"] for row in whole] == texts and stats_of(tmp_path).unanswered == 2
    same = ("num_generated_tokens", "generated_token_ids", "finish_reason", "sample", "error")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in whole]


def test_a_part_that_is_merged_has_the_latencies_of_all_its_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    late = Completion((1, 2), "error", 3, error=("row_timeout", "too slow"))
    block = prepared(3)
    run = ran(block, {0: [completion(tokenizer, "a")], 1: [completion(tokenizer, "b")] * 2, 2: [late]})
    commit(tmp_path, tokenizer, build_result_block(block, run))
    again = block.slice(2).set_column(1, "shard_rows", pa.array([1], pa.int32()))
    rerun = ran(again, {0: [completion(tokenizer, "c")]})
    rerun.latencies_s[0] = 7.0
    made = Commit(str(tmp_path), SCHEMA, "f" * 64, {}, tokenizer, merges=True)(build_result_block(again, rerun))
    counts = json.loads(made["counts"][0].as_py())
    assert (counts["ok"], counts["failed"]) == (3, 0)
    stats = stats_of(tmp_path)
    assert stats.histograms["latency_ms"] == {200: 2, 6310: 1}
    assert (stats.histograms["prompt_tokens"].total(), stats.finish_reasons) == (3, {"stop": 4})


def stats_of(folder: Path) -> PartStats:
    _, record = read_part(OutputFolder(str(folder)), "part-0.parquet")
    return PartStats.from_json(record["tally"])


def test_a_block_that_lost_a_row_is_not_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    block = prepared(2)
    run = ran(block, {i: [completion(tokenizer, "x")] for i in range(2)})
    with pytest.raises(AssertionError, match="shard 2: 1 rows came to commit, 2 were read"):
        commit(tmp_path, tokenizer, build_result_block(block, run).slice(0, 1))
    assert not list(tmp_path.glob("*.parquet"))


def test_a_shard_without_an_answer_for_each_row_is_refused() -> None:
    block = prepared(2)
    with pytest.raises(AssertionError, match="shard 2, row 1"):
        build_result_block(block, ran(block, {0: [Completion((), "stop", 3)]}))


def test_a_shard_that_was_passed_through_commits_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = Commit(str(tmp_path / "out"), SCHEMA, "f" * 64, {}, tokenizer)(GENERATED.empty_table())
    assert (record.num_rows, record.schema) == (0, RECORD)
    assert not (tmp_path / "out").exists()
