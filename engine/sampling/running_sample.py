"""RunningSample: one unfinished sample in the engine, which turns its sampled tokens into Outputs."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, TokenLogprobs
from moray.engine.text.grammar import Matcher
from moray.engine.text.stream import TextStream

NO_TOKEN = -1  # in place of a token id: the logits are not finite
_OUTPUT = partial(tuple.__new__, Output)  # as Output._make, without a call of Python's


class _Ending(NamedTuple):
    """Says how a sample ends; the fields are those of Completion."""

    finish_reason: str
    text_length: int | None = None
    error: tuple[str, str] | None = None
    stop_logprobs: TokenLogprobs | None = None


@dataclass(eq=False, slots=True)
class RunningSample:
    """Holds one unfinished sample: its sequence, which the scheduler knows, and what sampling and the output need.

    stop_token_ids:  tokens that end it; see Sampler.stop_token_ids
    text:            the decoded text, if there are stop strings to search for
    grammar:         follows the tokens read so far, if the completion must obey one
    jumps:           tokens that the grammar forces are appended without being sampled
    logprobs:        of the generated tokens, if the request asked for them
    num_returned:    generated tokens that are in outputs already
    is_live:         False once the sample has finished or was aborted
    """

    seq: Sequence
    stop_token_ids: frozenset[int]
    text: TextStream | None = None
    grammar: Matcher | None = None
    jumps: bool = False
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_returned: int = 0
    is_live: bool = True

    @property
    def params(self) -> SamplingParams:
        """Return how the sample is sampled."""
        return self.seq.request.params

    @property
    def must_go_on(self) -> bool:
        """Return whether min_tokens forbids that a stop token is sampled next."""
        return self.seq.num_generated < self.params.min_tokens

    def fill_mask(self, words: memoryview) -> None:
        """Write the tokens that the grammar allows next into a mask, see Matcher.fill."""
        assert self.grammar is not None, "the sample is free"
        self.grammar.fill(words)
        if self.must_go_on and self.grammar.error is None:
            left = int.from_bytes(words, "little")
            for token_id in self.stop_token_ids:
                left &= ~(1 << token_id)
            if not left:
                self.grammar.error = (
                    f"after {self.seq.num_generated} tokens it allows nothing but stop tokens, which min_tokens "
                    f"({self.params.min_tokens}) forbids"
                )

    def begin(self) -> None:
        """Append the tokens with which the grammar forces the completion to begin. They run together with the prompt.

        A token is left to be sampled, and where stop strings are searched for, all are.
        """
        if not self.jumps or self.grammar is None or self.text is not None:
            return
        token_ids = self.grammar.forced_tokens()
        if self.grammar.ends_after(token_ids):
            token_ids = token_ids[:-1]
        for token_id in token_ids[: self.params.max_tokens - 1]:
            if token_id in self.stop_token_ids:
                return
            self._take(token_id)

    def append_token(self, token_id: int, logprobs: TokenLogprobs | None) -> Output:
        """Append the next sampled token, and those that the grammar forces after it.

        Returns the output, with a completion if the sample ends here.

        token_id: NO_TOKEN if the logits were not finite
        """
        seq = self.seq
        is_plain = self.grammar is None and self.text is None and logprobs is None
        if is_plain and token_id != NO_TOKEN and token_id not in self.stop_token_ids:
            # As below, without what most samples have not: this runs for each sample of each step.
            seq.append(token_id)
            if seq.num_tokens < seq.max_num_tokens:
                self.num_returned += 1
                return _OUTPUT((seq.request.request_id, seq.sample, (token_id,), None, ()))
            return self._return(_Ending("length"))
        seq.forget_pending()
        ending: _Ending | None
        if self.grammar is not None and self.grammar.error is not None:
            ending = _cannot_obey(self.grammar.error)
        elif token_id == NO_TOKEN:
            ending = _not_finite(len(self.seq))
        elif token_id in self.stop_token_ids:
            ending = _Ending("stop", self._final_length(), stop_logprobs=logprobs)
        else:
            if logprobs is not None:
                self.logprobs.append(logprobs)
            ending = self._take(token_id)
            if ending is None and self.jumps:
                ending = self._jump()
        return self._return(ending)

    def finish_prompt(self) -> Output:
        """Return the final output of a sample with max_tokens 0, whose prompt is now computed."""
        for position, entry in enumerate(self.seq.prompt_logprobs):
            if entry is not None and math.isnan(entry.logprob):
                return self._return(_not_finite(position))
        return self._return(_Ending("length"))

    def _take(self, token_id: int, *, is_forced: bool = False) -> _Ending | None:
        """Append a token, and return how the sample ends if it ends with it. is_forced: it was not sampled"""
        seq, grammar = self.seq, self.grammar
        seq.append(token_id, is_forced=is_forced)
        has_obeyed = False
        if grammar is not None:
            grammar.accept(token_id)
            if grammar.error is not None:
                return _cannot_obey(grammar.error)
            has_obeyed = grammar.has_ended
        is_last = has_obeyed or seq.num_generated == self.params.max_tokens
        if self.text is not None:
            self.text.push(token_id)
            length = self._final_length() if is_last else self.text.stopped_at
            if length is not None:
                return _Ending("stop", length)
        if is_last:
            return _Ending("stop" if has_obeyed else "length")
        return None

    def _jump(self) -> _Ending | None:
        """Append the tokens that the grammar forces, and return how the sample ends if it ends with one of them."""
        assert self.grammar is not None, "nothing is forced"
        for token_id in self.grammar.forced_tokens():
            if token_id in self.stop_token_ids:  # what it does depends on min_tokens; it is sampled
                return None
            if (ending := self._take(token_id, is_forced=True)) is not None:
                return ending
        return None

    def _return(self, ending: _Ending | None) -> Output:
        """Return the output with the tokens since the last one, and how the sample ends if it does."""
        seq, request = self.seq, self.seq.request
        new_token_ids = tuple(seq.token_ids[seq.num_prompt_tokens + self.num_returned :])
        self.num_returned += len(new_token_ids)
        new_logprobs = tuple(self.logprobs[len(self.logprobs) - len(new_token_ids) :]) if self.logprobs else ()
        completion = None
        if ending is not None:
            completion = Completion(
                token_ids=tuple(seq.generated_token_ids),
                finish_reason=ending.finish_reason,
                num_prompt_tokens=seq.num_prompt_tokens,
                text_length=ending.text_length,
                logprobs=None if request.params.logprobs is None else tuple(self.logprobs),
                prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(seq.prompt_logprobs),
                error=ending.error,
                stop_logprobs=ending.stop_logprobs,
            )
        return Output(request.request_id, seq.sample, new_token_ids, completion, new_logprobs)

    def _final_length(self) -> int | None:
        """Flush the text, and return where a stop string cuts it: its end may be in the characters held back so far."""
        if self.text is None:
            return None
        self.text.finish()
        return self.text.stopped_at


def _not_finite(num_tokens: int) -> _Ending:
    message = f"the model's logits after token {num_tokens} are not finite numbers."
    return _Ending("error", error=("nan_logits", message))


def _cannot_obey(reason: str) -> _Ending:
    return _Ending("error", error=("grammar_failed", f"structured cannot be followed: {reason}"))
