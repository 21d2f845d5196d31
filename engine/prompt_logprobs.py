"""Prompt logprobs: what the model thought of the tokens it was given. Engine gathers them step by step."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from engine.sampler import token_logprobs
from engine.scheduler import Scheduled
from engine.sequence import Sequence

ROWS_AT_ONCE = 64  # rows of logits: bounds their memory


def gather_prompt_logprobs(
    scheduled: SequenceOf[Scheduled], hidden_states: Tensor, compute_logits: Callable[[Tensor, SequenceOf[int]], Tensor]
) -> None:
    """Add what a step found out to the sequences that asked; call it before their tokens count as computed.

    hidden_states:   [num_tokens, hidden_size], of the scheduled tokens in order
    compute_logits:  (hidden_states, rows) -> [len(rows), vocab_size], of those rows alone
    """
    wanted = list(_wanted(scheduled))
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        seqs, rows, token_ids = zip(*wanted[start : start + ROWS_AT_ONCE], strict=True)
        ks = [seq.request.params.prompt_logprobs for seq in seqs]
        entries = token_logprobs(compute_logits(hidden_states, rows), token_ids, ks)
        for seq, entry in zip(seqs, entries, strict=True):
            seq.prompt_logprobs.append(entry)


def _wanted(scheduled: SequenceOf[Scheduled]) -> Iterator[tuple[Sequence, int, int]]:
    """Sequence, row of hidden_states and the token that followed, for each position of the step that is not known."""
    begin = 0
    for item in scheduled:
        seq, first = item.seq, item.seq.num_computed_tokens
        if seq.request.params.prompt_logprobs is not None:
            # A recomputed sequence comes by its first tokens again.
            start = max(first, len(seq.prompt_logprobs) - 1)
            stop = min(first + item.num_tokens, seq.num_prompt_tokens - 1)
            for position in range(start, stop):
                yield seq, begin + position - first, seq.token_ids[position + 1]
        begin += item.num_tokens
