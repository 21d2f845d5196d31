"""PartStats: the edges of buckets, sums, and the statistics of a part's rows."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.batch.ledger import Counts
from moray.batch.output.part_stats import (
    EDGES,
    PartStats,
    count_latencies,
    count_part,
    count_values,
    quantile,
    upper_edge,
)
from moray.batch.output_columns import ERROR


def test_edges_are_ten_a_decade_and_whole_numbers_below_ten() -> None:
    assert EDGES[:15] == (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40)
    assert EDGES[-1] == 10**9 and len([edge for edge in EDGES if 1000 <= edge < 10_000]) == 10


@given(st.integers(0, 10**11))
def test_a_value_lies_in_its_bucket(value: int) -> None:
    ((lower, count),) = count_values({value: 3}).items()
    assert count == 3 and lower <= value and (value < upper_edge(lower) or lower == EDGES[-1])


@given(st.lists(st.integers(0, 10**6), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_as_good_as_its_bucket(values: list[int], share: float) -> None:
    values.sort()
    exact = values[max(0, -int(-share * len(values) // 1) - 1)]
    ((lower, _),) = count_values({exact: 1}).items()
    assert lower - 1e-6 <= quantile(count_values(Counter(values)), share) <= upper_edge(lower) + 1e-6


def test_nothing_has_no_quantile() -> None:
    assert quantile(Counter(), 0.5) == 0.0


def test_latencies_are_counted_by_milliseconds() -> None:
    assert count_latencies([0.0001, 0.0033, 0.0034, 61.0]) == {0: 1, 3: 2, 50119: 1}


def test_sums_and_json() -> None:
    one = PartStats(Counter(stop=1), {"prompt_tokens": Counter({3: 2, 10: 1})}, unanswered=2)
    two = PartStats(
        Counter(stop=1, length=4), {"prompt_tokens": Counter({10: 5}), "latency_ms": Counter({0: 1})}, 1, unparsed=4
    )
    total = PartStats(
        Counter(stop=2, length=4), {"prompt_tokens": Counter({3: 2, 10: 6}), "latency_ms": Counter({0: 1})}, 3, 4
    )
    assert PartStats.total([one, two]) == total and PartStats.total([]) == PartStats()
    assert PartStats.from_json(json.loads(json.dumps(total.to_json()))) == total


@pytest.mark.parametrize(("is_kept", "unanswered"), [(False, 1), (True, 0)])
def test_samples_without_an_answer(is_kept: bool, unanswered: int) -> None:
    own = {"reasoning": ["a", "a", None, None], "generated_text": ["", "b", "", None]}
    error = [None, None, None, {"stage": "generate", "code": "row_timeout", "message": "late"}]
    others = {"sample": pa.array([0] * 4, pa.int32()), "error": pa.array(error, ERROR)}
    table = pa.table(own | others if is_kept else others | own)
    assert count_part(table, 0.0, Counter())[1].unanswered == unanswered


def test_rows_that_max_tokens_cut() -> None:
    """Rows are counted, not samples; those that failed are not."""
    error = {"stage": "generate", "code": "row_timeout", "message": "late"}
    samples = [0, 1, 0, 1, 0, 0, 0]
    reasons = ["length", "length", "stop", "length", "stop", "error", "length"]
    table = pa.table(
        {
            "sample": pa.array(samples, pa.int32()),
            "finish_reason": reasons,
            "error": pa.array([error if reason == "error" else None for reason in reasons], ERROR),
        }
    )
    assert count_part(table, 0.0, Counter(), is_structured=True)[0].cut == 3
    counts, _ = count_part(table, 0.0, Counter())
    assert counts.cut == 0 and "cut" not in counts.to_json()


@pytest.mark.parametrize("is_scoring", [False, True])
def test_rows_that_are_ok_are_counted_once_and_their_samples_each(is_scoring: bool) -> None:
    error = {"stage": "generate", "code": "row_timeout", "message": "late"}
    rows = [(0, 5, 7, None), (1, 5, 9, None), (0, 12, 7, None), (0, 5, 300, error), (0, None, 0, error)]
    lengths = "num_continuation_tokens" if is_scoring else "num_generated_tokens"
    names = ("sample", "num_prompt_tokens", lengths, "error")
    table = pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) for row in rows],
        schema=pa.schema([(name, pa.int32()) for name in names[:3]] + [("error", ERROR)]),
    )
    if not is_scoring:
        reasons = pa.array(["stop", "length", "stop", "error", "error"])
        table = table.append_column("finish_reason", reasons)
    counts, stats = count_part(table, 1.5, Counter({200: 2}))
    prompt_tokens, others = 17, 23
    assert counts == Counts(
        ok=2,
        failed=2,
        prompt_tokens=prompt_tokens + others if is_scoring else prompt_tokens,
        generated_tokens=0 if is_scoring else others,
        engine_s=1.5,
        errors={"row_timeout": 2},
    )
    assert stats.finish_reasons == ({} if is_scoring else {"stop": 2, "length": 1})
    assert stats.histograms == {
        "prompt_tokens": {5: 1, 10: 1}, lengths.removeprefix("num_"): {6: 2, 8: 1}, "latency_ms": {200: 2},
    }  # fmt: skip
