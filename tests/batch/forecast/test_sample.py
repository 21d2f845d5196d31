"""Statistics of a sample, and estimates for all rows."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moray.batch.forecast.estimate import EstimatedRange
from moray.batch.forecast.sample import BUCKETS, Bucket, PromptSample, SampledPrompt, histogram, percentile


@given(st.lists(st.one_of(st.integers(0, 60), st.integers(0, 200_000)), max_size=300).map(sorted))
def test_a_histogram_has_every_row_once(lengths: list[int]) -> None:
    buckets = histogram(lengths)
    assert sum(bucket.rows for bucket in buckets) == len(lengths)
    for bucket in buckets:
        assert bucket.rows == sum(bucket.first <= length <= bucket.last for length in lengths)
    assert len(buckets) <= BUCKETS + 1
    assert all(one.last + 1 == other.first for one, other in pairwise(buckets))


def test_a_few_long_ones_do_not_flatten_the_others() -> None:
    lengths = sorted([10, 12, 13, 14, 14, 15, 17, 19] * 20 + [9_779])
    assert histogram(lengths)[0] == Bucket(10, 11, 20)
    assert histogram(lengths)[-1] == Bucket(20, 9_779, 1)
    assert histogram([]) == [] and histogram([0, 0]) == [Bucket(0, 0, 2)]


def test_percentiles_are_lengths_that_are_there() -> None:
    assert [percentile([1, 2, 3, 4], share) for share in (0.0, 0.5, 0.51, 1.0)] == [1, 2, 3, 4]


OK = SampledPrompt(prompt_tokens=10, prefill_tokens=10, min_generated=0, max_generated=32, sequence_tokens=42)
LONG = SampledPrompt(prompt_tokens=5000, error="too_long")
NULL = SampledPrompt(prompt_tokens=None, error="null_input")


def test_a_small_input_is_counted() -> None:
    sample = PromptSample(4, ((OK, LONG, NULL, OK),))
    assert sample.is_whole
    assert sample.prompt_tokens == EstimatedRange(20, 20, 20)
    assert sample.generated_tokens == EstimatedRange(None, 0, 64)
    assert sample.errors == sample.error_rows() == {"too_long": 1, "null_input": 1}
    assert (sample.lengths, sample.sequences) == ([10, 10, 5000], [42, 42])


def test_of_a_large_one_the_rest_is_told_from_the_sample() -> None:
    sample = PromptSample(4000, ((OK, OK), (OK, LONG)))
    assert not sample.is_whole
    assert sample.prompt_tokens.expected == 30_000 and sample.prompt_tokens.high > 30_000
    assert sample.error_rows() == {"too_long": 1000}
    assert sample.generated_tokens.low == 0 and sample.generated_tokens.high >= 4000 * 32 * 3 / 4


def test_what_cannot_end_early_is_known() -> None:
    fixed = SampledPrompt(prompt_tokens=10, prefill_tokens=10, min_generated=32, max_generated=32, sequence_tokens=42)
    assert PromptSample(1000, ((fixed, fixed), (fixed,))).generated_tokens == EstimatedRange(32_000, 32_000, 32_000)


def test_an_empty_input() -> None:
    sample = PromptSample(0, ())
    assert sample.is_whole and sample.prompt_tokens == EstimatedRange(0, 0, 0) and sample.error_rows() == {}
