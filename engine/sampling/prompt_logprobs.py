"""Prompt logprobs: the log-probabilities of the prompt's tokens. The Engine gathers them step by step."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.request import TokenLogprobs
from moray.engine.sampling.sampler import Sampler


class PromptLogprobs:
    """Holds the prompt logprobs that a step yields, which may not have arrived on the host yet.

    Until they are read, the sequences that asked for them have None in their place.
    """

    def __init__(self) -> None:
        self._launched: list[tuple[list[tuple[Sequence, int]], Callable[[], list[TokenLogprobs]]]] = []

    @property
    def is_empty(self) -> bool:
        """Return whether the step yields none."""
        return not self._launched

    def launch(
        self,
        scheduled: SequenceOf[Scheduled],
        hidden_states: Tensor,
        compute_logits: Callable[[Tensor, SequenceOf[int]], Tensor],
        sampler: Sampler,
        rows_at_once: int,
    ) -> None:
        """Start computing what the step yields. Call it before the step's tokens count as computed.

        A second call, after one that failed, continues where that one stopped.

        hidden_states:   [num_tokens, hidden_size], of the scheduled tokens in order
        compute_logits:  returns the logits [len(rows), vocab_size] of the given rows of hidden_states
        rows_at_once:    rows of logits that are computed at once; bounds their memory
        """
        positions = list(_find_positions(scheduled))
        for start in range(0, len(positions), rows_at_once):
            seqs, rows, token_ids = zip(*positions[start : start + rows_at_once], strict=True)
            ks = [seq.request.params.prompt_logprobs for seq in seqs]
            read = sampler.launch_logprobs(compute_logits(hidden_states, rows), token_ids, ks)
            places = []
            for seq in seqs:
                places.append((seq, len(seq.prompt_logprobs)))
                seq.prompt_logprobs.append(None)
            self._launched.append((places, read))

    def read(self) -> None:
        """Wait for the logprobs and give them to the sequences."""
        for places, read in self._launched:
            for (seq, index), entry in zip(places, read(), strict=True):
                seq.prompt_logprobs[index] = entry


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
