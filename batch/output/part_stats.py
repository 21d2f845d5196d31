"""Counts the rows and tokens of a part, how its rows ended, how long their texts are and how long they took.

The numbers are in the part's metadata, so that a report over many parts need not read rows.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moray.batch.ledger import Counts

Histogram = Counter[int]  # lower edge of a bucket, one of EDGES -> how many values are in it

# Lower edges of the buckets, ten per decade: 0, 1, 2, .. 6, 8, 10, 13, 16, 20, 25, 32, .. 1,000,000,000. The last
# bucket is open.
EDGES = (0, *sorted({round(10 ** (tenth / 10)) for tenth in range(91)}))

_LENGTHS = {"num_prompt_tokens": "prompt_tokens", "num_generated_tokens": "generated_tokens"}
_LENGTHS |= {"num_continuation_tokens": "continuation_tokens"}


@dataclass(frozen=True)
class PartStats:
    """Statistics of the rows of a part that are ok; statistics of several parts can be added up.

    finish_reasons:  counts of samples; empty where the job scores
    histograms:      prompt_tokens and latency_ms (from a row's admission into the engine to its end) count rows,
                     generated_tokens and continuation_tokens count samples
    unanswered:      samples that ended inside their reasoning; 0 where the job does not split it off
    unparsed:        samples that ended before max_tokens without a value in the column parsed; 0 where there is none
    """

    finish_reasons: Counter[str] = field(default_factory=Counter)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    unanswered: int = 0
    unparsed: int = 0

    @classmethod
    def total(cls, all_stats: Iterable["PartStats"]) -> "PartStats":
        """Return the sum of the statistics of several parts."""
        reasons: Counter[str] = Counter()
        sums: dict[str, Histogram] = {}
        unanswered = unparsed = 0
        for stats in all_stats:
            reasons.update(stats.finish_reasons)
            unanswered += stats.unanswered
            unparsed += stats.unparsed
            for name, histogram in stats.histograms.items():
                sums.setdefault(name, Counter()).update(histogram)
        return cls(reasons, sums, unanswered, unparsed)

    def to_json(self) -> dict[str, Any]:
        rare = {"unanswered": self.unanswered, "unparsed": self.unparsed}
        return {
            "finish_reasons": dict(self.finish_reasons),
            "histograms": {name: dict(sorted(histogram.items())) for name, histogram in self.histograms.items()},
        } | {name: number for name, number in rare.items() if number}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PartStats":
        """Return the statistics; raise KeyError, TypeError, ValueError or AttributeError where the value holds none."""
        histograms = {
            name: Counter({int(edge): int(count) for edge, count in buckets.items()})
            for name, buckets in value["histograms"].items()
        }
        rare = (int(value.get(name, 0)) for name in ("unanswered", "unparsed"))
        return cls(Counter(value["finish_reasons"]), histograms, *rare)


def count_part(
    part: pa.Table, engine_s: float, latency_ms: Histogram, *, is_structured: bool = False
) -> tuple[Counts, PartStats]:
    """Count the rows, samples and tokens of a part. Everything that is said of committed rows comes from here.

    A failed row has one sample, its error, and no tokens. Tokens that were scored count as prompt tokens.

    engine_s:    seconds that the engine worked for the part
    latency_ms:  histogram of the latencies of the rows that are ok
    is_structured:  True where texts obey a schema or a grammar, so that one that max_tokens ended is cut
    """
    is_first = pc.equal(part["sample"], pa.scalar(0, pa.int32()))
    is_ok = pc.is_null(part["error"])
    ok, firsts = part.filter(is_ok), part.filter(pc.and_(is_ok, is_first))
    lengths = {
        name: _occurrences((firsts if name == "prompt_tokens" else ok)[column])
        for column, name in _LENGTHS.items()
        if column in part.column_names
    }
    tokens = {name: sum(length * times for length, times in found.items()) for name, found in lengths.items()}
    errors = _occurrences(pc.struct_field(part["error"].drop_null(), "code"))
    failed = part.num_rows - ok.num_rows
    counts = Counts(
        ok=(pc.sum(is_first).as_py() or 0) - failed,
        failed=failed,
        prompt_tokens=tokens.get("prompt_tokens", 0) + tokens.get("continuation_tokens", 0),
        generated_tokens=tokens.get("generated_tokens", 0),
        engine_s=engine_s,
        errors=errors,
        cut=_count_cut(part, is_first) if is_structured else 0,
    )
    reasons = _occurrences(ok["finish_reason"]) if "finish_reason" in ok.column_names else {}
    histograms = {name: count_values(found) for name, found in lengths.items()}
    own = ok.column_names[ok.column_names.index("sample") :]  # a kept input column may have the name too
    unanswered = _count_unanswered(ok) if "reasoning" in own else 0
    unparsed = _count_unparsed(ok) if "parsed" in own else 0
    return counts, PartStats(Counter(reasons), histograms | {"latency_ms": latency_ms}, unanswered, unparsed)


def _count_cut(part: pa.Table, is_first: Any) -> int:
    """Return how many rows have a sample that max_tokens ended."""
    rows = pc.cumulative_sum(is_first.cast(pa.int64()))  # the number of its row, for each sample
    return int(pc.count_distinct(rows.filter(pc.equal(part["finish_reason"], "length"))).as_py())


def _count_unparsed(ok: pa.Table) -> int:
    """Return how many samples ended before max_tokens and have nothing in the column parsed."""
    ended = pc.not_equal(ok["finish_reason"], "length")
    return pc.sum(pc.and_(ended, pc.is_null(ok["parsed"]))).as_py() or 0


def _count_unanswered(ok: pa.Table) -> int:
    """Return how many samples have reasoning and no answer after it."""
    is_empty = pc.and_(pc.is_valid(ok["reasoning"]), pc.equal(ok["generated_text"], ""))
    return pc.sum(is_empty).as_py() or 0


def count_latencies(latencies_s: Iterable[float]) -> Histogram:
    """Return the histogram of latencies, in milliseconds."""
    return count_values(Counter(round(1000 * latency_s) for latency_s in latencies_s))


def count_values(values: Mapping[int, int]) -> Histogram:
    """Return the histogram of the values.

    values:  whole number, at least 0 -> how often it occurs
    """
    histogram: Histogram = Counter()
    for value, count in values.items():
        histogram[EDGES[bisect_right(EDGES, value) - 1]] += count
    return histogram


def upper_edge(lower: int) -> int:
    """Return the upper edge of a bucket; for the last one ten times its lower edge, so that it can be drawn."""
    above = bisect_right(EDGES, lower)
    return EDGES[above] if above < len(EDGES) else 10 * lower


def quantile(histogram: Histogram, share: float) -> float:
    """Return the value below which that share of the values lies, if they are spread evenly within their bucket."""
    left = share * histogram.total()
    for lower, count in sorted(histogram.items()):
        if count and left <= count:
            return lower + (upper_edge(lower) - lower) * left / count
        left -= count
    return 0.0


def _occurrences(column: Any) -> dict[Any, int]:
    """Return how often each value of a column occurs, in order of the first occurrences; nulls are left out."""
    found: Any = pc.value_counts(column.drop_null())
    return {item["values"]: item["counts"] for item in found.to_pylist()}
