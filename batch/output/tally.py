"""Tally: how a part's rows ended, how long they were and how long they took. It stands in the part's metadata, so that
a report over many parts reads no rows."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Histogram = Counter[int]  # lower edge of a bucket, one of EDGES -> values in it

# Ten a decade: 0, 1, 2, .. 6, 8, 10, 13, 16, 20, 25, 32, .. 1,000,000,000. The last bucket has no end.
EDGES = (0, *sorted({round(10 ** (tenth / 10)) for tenth in range(91)}))

_LENGTHS = {"num_prompt_tokens": "prompt_tokens", "num_generated_tokens": "generated_tokens"}
_LENGTHS |= {"num_continuation_tokens": "continuation_tokens"}


@dataclass(frozen=True)
class Tally:
    """Of rows that are ok; sums over parts are sums of tallies.

    finish_reasons:  of samples; none where the job scores
    histograms:      prompt_tokens and latency_ms (from a row's admission into the engine to its end) of rows,
                     generated_tokens or continuation_tokens of samples
    """

    finish_reasons: Counter[str] = field(default_factory=Counter)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    @classmethod
    def total(cls, tallies: Iterable["Tally"]) -> "Tally":
        reasons: Counter[str] = Counter()
        sums: dict[str, Histogram] = {}
        for tally in tallies:
            reasons.update(tally.finish_reasons)
            for name, histogram in tally.histograms.items():
                sums.setdefault(name, Counter()).update(histogram)
        return cls(reasons, sums)

    def to_json(self) -> dict[str, Any]:
        return {
            "finish_reasons": dict(self.finish_reasons),
            "histograms": {name: dict(sorted(histogram.items())) for name, histogram in self.histograms.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Tally":
        """Raises KeyError, TypeError, ValueError or AttributeError where that is no tally."""
        histograms = {
            name: Counter({int(edge): int(count) for edge, count in buckets.items()})
            for name, buckets in value["histograms"].items()
        }
        return cls(Counter(value["finish_reasons"]), histograms)


def tally_rows(part: pa.Table, latency_ms: Histogram) -> Tally:
    """Count the rows of a part. latency_ms: of its rows that are ok"""
    ok = part.filter(pc.is_null(part["error"]))
    firsts = ok.filter(pc.equal(ok["sample"], pa.scalar(0, pa.int32())))
    reasons = _counts(ok["finish_reason"]) if "finish_reason" in ok.column_names else {}
    histograms = {}
    for column, name in _LENGTHS.items():
        if column in part.column_names:
            histograms[name] = count_values(_counts((firsts if name == "prompt_tokens" else ok)[column]))
    return Tally(Counter(reasons), histograms | {"latency_ms": latency_ms})


def count_latencies(latencies_s: Iterable[float]) -> Histogram:
    """Of seconds, by milliseconds."""
    return count_values(Counter(round(1000 * latency_s) for latency_s in latencies_s))


def count_values(values: Mapping[int, int]) -> Histogram:
    """values: whole number, at least 0 -> how often it is there"""
    histogram: Histogram = Counter()
    for value, count in values.items():
        histogram[EDGES[bisect_right(EDGES, value) - 1]] += count
    return histogram


def upper_edge(lower: int) -> int:
    """Where a bucket ends; the last one at ten times its begin, so that it can be drawn."""
    above = bisect_right(EDGES, lower)
    return EDGES[above] if above < len(EDGES) else 10 * lower


def quantile(histogram: Histogram, share: float) -> float:
    """The value below which that share of the values lies, as if they were spread evenly in their bucket."""
    left = share * histogram.total()
    for lower, count in sorted(histogram.items()):
        if count and left <= count:
            return lower + (upper_edge(lower) - lower) * left / count
        left -= count
    return 0.0


def _counts(column: Any) -> dict[Any, int]:
    found: Any = pc.value_counts(column.drop_null())
    return {item["values"]: item["counts"] for item in found.to_pylist()}
