"""Sample: a sequence in the engine, from the token that it is given to what is told of it."""

import math
from dataclasses import dataclass

from engine.request import Completion, Output, TokenLogprobs
from engine.sampler import NO_TOKEN, SamplerRow
from engine.sequence import Sequence
from engine.text import TextStream


@dataclass
class Sample:
    """
    text:     where there are stop strings to look for
    is_live:  neither ended nor aborted
    """

    seq: Sequence
    row: SamplerRow
    text: TextStream | None
    is_live: bool = True

    def take(self, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        """Give it its next token; the output has a completion where that is the end."""
        seq, params = self.seq, self.seq.request.params
        seq.unread = None
        if token_id == NO_TOKEN:
            return self._end((), "error", error=_not_finite(len(seq)))
        if token_id in self.row.stop_token_ids:
            return self._end((), "stop", text_length=self._final_length(), stop_logprobs=logprobs)
        seq.append(token_id)
        if logprobs is not None:
            seq.logprobs.append(logprobs)
        is_last = seq.num_generated == params.max_tokens
        if self.text is not None:
            self.text.push(token_id)
            length = self._final_length() if is_last else self.text.stopped_at
            if length is not None:
                return self._end((token_id,), "stop", text_length=length)
        if is_last:
            return self._end((token_id,), "length")
        return Output(seq.request.request_id, seq.sample, (token_id,), new_logprobs=tuple(seq.logprobs[-1:]))

    def end_prompt(self) -> Output:
        """Of one that was to run its prompt alone, and has."""
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
            logprobs=None if request.params.logprobs is None else tuple(seq.logprobs),
            prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(seq.prompt_logprobs),
            error=error,
            stop_logprobs=stop_logprobs,
        )
        new_logprobs = tuple(seq.logprobs[len(seq.logprobs) - len(new_token_ids) :]) if seq.logprobs else ()
        return Output(request.request_id, seq.sample, new_token_ids, completion, new_logprobs)

    def _final_length(self) -> int | None:
        """Where a stop string cuts the text that is now complete: its last held back characters may be one's end."""
        if self.text is None:
            return None
        self.text.finish()
        return self.text.stopped_at


def _not_finite(num_tokens: int) -> tuple[str, str]:
    return "nan_logits", f"the model's logits after token {num_tokens} are not finite numbers."
