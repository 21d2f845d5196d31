"""Turn the scores of each row's choices into one row: the likeliest choice, and the probability of each."""

import math
from collections.abc import Sequence

import pyarrow as pa

from moray.batch.output_columns import probabilities_type
from moray.batch.stages.block_schemas import values


def classify(block: pa.Table, choices: Sequence[str]) -> pa.Table:
    """Return a block with a row for each input row, and the columns `choice` and `probabilities`.

    Its num_continuation_tokens are those of all choices.

    block:  one row for each choice, in their order, or one with the error of its row
    """
    samples, logprobs = values(block, "sample"), values(block, "logprob")
    lengths, errors = values(block, "num_continuation_tokens"), values(block, "error")
    firsts = [index for index, sample in enumerate(samples) if sample == 0]
    likeliest: list[str | None] = []
    probabilities: list[dict[str, float] | None] = []
    num_tokens: list[int | None] = []
    for first in firsts:
        if errors[first] is not None:
            likeliest.append(None)
            probabilities.append(None)
            num_tokens.append(None)
            continue
        scores = logprobs[first : first + len(choices)]
        likeliest.append(choices[scores.index(max(scores))])  # the first among equals
        probabilities.append(dict(zip(choices, softmax(scores), strict=True)))
        num_tokens.append(sum(lengths[first : first + len(choices)]))
    rows = block.take(pa.array(firsts, pa.int64())).drop_columns("num_continuation_tokens")
    return (
        rows.append_column("choice", pa.array(likeliest, pa.string()))
        .append_column("probabilities", pa.array(probabilities, probabilities_type(choices)))
        .append_column("num_continuation_tokens", pa.array(num_tokens, pa.int32()))
    )


def softmax(logprobs: Sequence[float]) -> list[float]:
    """Return the share of each probability in their sum."""
    best = max(logprobs)
    weights = [math.exp(logprob - best) for logprob in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
