"""Prompt logprobs: the log-probabilities of the prompt's tokens. The Engine gathers them step by step."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.sampling.sampler import token_logprobs

ROWS_AT_ONCE = 64  # rows of logits that are computed at once; bounds their memory


def gather_prompt_logprobs(
    scheduled: SequenceOf[Scheduled], hidden_states: Tensor, compute_logits: Callable[[Tensor, SequenceOf[int]], Tensor]
) -> None:
    """Append the prompt logprobs that a step yields to the sequences that asked for them.

    Call it before the step's tokens count as computed.

    hidden_states:   [num_tokens, hidden_size], of the scheduled tokens in order
    compute_logits:  returns the logits [len(rows), vocab_size] of the given rows of hidden_states
    """
    positions = list(_find_positions(scheduled))
    for start in range(0, len(positions), ROWS_AT_ONCE):
        seqs, rows, token_ids = zip(*positions[start : start + ROWS_AT_ONCE], strict=True)
        ks = [seq.request.params.prompt_logprobs for seq in seqs]
        entries = token_logprobs(compute_logits(hidden_states, rows), token_ids, ks)
        for seq, entry in zip(seqs, entries, strict=True):
            seq.prompt_logprobs.append(entry)


def _find_positions(scheduled: SequenceOf[Scheduled]) -> Iterator[tuple[Sequence, int, int]]:
    """Yield sequence, row of hidden_states and next token for each position of the step whose logprobs are missing."""
    begin = 0
    for seq, num_tokens in scheduled:
        first = seq.num_computed_tokens
        if first < seq.num_prompt_tokens and seq.request.params.prompt_logprobs is not None:
            # A sequence that is recomputed after a preemption has the logprobs of its first tokens already.
            start = max(first, len(seq.prompt_logprobs) - 1)
            stop = min(first + num_tokens, seq.num_prompt_tokens - 1)
            for position in range(start, stop):
                yield seq, begin + position - first, seq.token_ids[position + 1]
        begin += num_tokens
