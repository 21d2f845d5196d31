"""RunningSample: one unfinished sample in the engine, which turns its sampled tokens into Outputs."""

import math
from dataclasses import dataclass, field

from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, TokenLogprobs
from moray.engine.text.stream import TextStream

NO_TOKEN = -1  # in place of a token id: the logits are not finite


@dataclass(eq=False, slots=True)
class RunningSample:
    """Holds one unfinished sample: its sequence, which the scheduler knows, and what sampling and the output need.

    stop_token_ids:  tokens that end it; see Sampler.stop_token_ids
    text:            the decoded text, if there are stop strings to search for
    logprobs:        of the generated tokens, if the request asked for them
    is_live:         False once the sample has finished or was aborted
    """

    seq: Sequence
    stop_token_ids: frozenset[int]
    text: TextStream | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_live: bool = True

    @property
    def params(self) -> SamplingParams:
        """Return how the sample is sampled."""
        return self.seq.request.params

    def append_token(self, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        """Append the next sampled token and return the output, with a completion if the sample ends here.

        token_id: NO_TOKEN if the logits were not finite
        """
        seq, params = self.seq, self.params
        seq.pending_row = None
        if token_id == NO_TOKEN:
            return self._end((), "error", error=_not_finite(len(seq)))
        if token_id in self.stop_token_ids:
            return self._end((), "stop", text_length=self._final_length(), stop_logprobs=logprobs)
        seq.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        is_last = seq.num_generated == params.max_tokens
        if self.text is not None:
            self.text.push(token_id)
            length = self._final_length() if is_last else self.text.stopped_at
            if length is not None:
                return self._end((token_id,), "stop", text_length=length)
        if is_last:
            return self._end((token_id,), "length")
        return Output(seq.request.request_id, seq.sample, (token_id,), new_logprobs=tuple(self.logprobs[-1:]))

    def finish_prompt(self) -> Output:
        """Return the final output of a sample with max_tokens 0, whose prompt is now computed."""
        for position, entry in enumerate(self.seq.prompt_logprobs):
            if entry is not None and math.isnan(entry.logprob):
                return self._end((), "error", error=_not_finite(position))
        return self._end((), "length")

    def _end(
        self,
        new_token_ids: tuple[int, ...],
        finish_reason: str,
        *,
        text_length: int | None = None,
        error: tuple[str, str] | None = None,
        stop_logprobs: TokenLogprobs | None = None,
    ) -> Output:
        seq, request = self.seq, self.seq.request
        completion = Completion(
            token_ids=tuple(seq.generated_token_ids),
            finish_reason=finish_reason,
            num_prompt_tokens=seq.num_prompt_tokens,
            text_length=text_length,
            logprobs=None if request.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(seq.prompt_logprobs),
            error=error,
            stop_logprobs=stop_logprobs,
        )
        new_logprobs = tuple(self.logprobs[len(self.logprobs) - len(new_token_ids) :]) if self.logprobs else ()
        return Output(request.request_id, seq.sample, new_token_ids, completion, new_logprobs)

    def _final_length(self) -> int | None:
        """Flush the text, and return where a stop string cuts it: its end may be in the characters held back so far."""
        if self.text is None:
            return None
        self.text.finish()
        return self.text.stopped_at


def _not_finite(num_tokens: int) -> tuple[str, str]:
    return "nan_logits", f"the model's logits after token {num_tokens} are not finite numbers."
