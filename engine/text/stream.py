"""TextStream: decodes the tokens of one sequence as they arrive, and searches the text for stop strings.

The Engine uses it for sequences that have stop strings, the endpoint for those that it streams.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from moray.engine.text.tokenizer import UNDECIDED, Tokenizer

MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, and a token at least one


class Detokenizer:
    """Decodes tokens one by one. The results of push and finish together equal Tokenizer.decode of all tokens.

    Only text that no later token can change is returned. A character with missing bytes is held back, and so is a run
    of byte tokens, which decodes as text or as errors as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._num_returned = 0  # characters of the pending tokens' text that were returned already
        self._is_start = True

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes."""
        if not self._pending and not self._is_start and token_id not in self._tokenizer.byte_ids:
            text = self._tokenizer.continuation_of(token_id)  # as below, for the most frequent case
            if not text.endswith(UNDECIDED):
                return text
        if not self._tokenizer.is_text(token_id):
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._decode(self._pending)
        if not text.endswith(UNDECIDED):
            return self._flush(text)
        new = text[self._num_returned : -1]
        self._num_returned += len(new)
        if len(self._pending) > 2 * MAX_CHARACTER_TOKENS:
            self._drop_decided(text)
        return new

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return self._flush(self._decode(self._pending)) if self._pending else ""

    def _flush(self, text: str) -> str:
        new = text[self._num_returned :]
        self._pending, self._num_returned, self._is_start = [], 0, False
        return new

    def _drop_decided(self, text: str) -> None:
        """Drop tokens before the last character, so that long invalid text costs no more per token than valid text."""
        for cut in range(len(self._pending) - 1, len(self._pending) - 1 - MAX_CHARACTER_TOKENS, -1):
            left = self._decode(self._pending[:cut])
            right = self._tokenizer.decode_continuation(self._pending[cut:])
            # If the cut is inside a character, both parts have a replacement character instead.
            if left + right == text and len(left) <= self._num_returned:
                self._pending, self._is_start = self._pending[cut:], False
                self._num_returned -= len(left)
                return

    def _decode(self, token_ids: list[int]) -> str:
        tokenizer = self._tokenizer
        return tokenizer.decode(token_ids) if self._is_start else tokenizer.decode_continuation(token_ids)


class StopAutomaton:
    """Finds which of several strings is complete first in a text, at constant cost per character.

    A state is the longest suffix of the text that is a prefix of a stop string. `depths` has its length, `matches` the
    length of the longest stop string that ends there, 0 for none. (Aho and Corasick, "Efficient string matching", CACM
    1975) `begins` has the characters that lead from the first state to another one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches = [0]
        for stop in stops:
            self._add(stop)
        self.begins = frozenset(self._next[0])
        self._link()

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(0)
            state = self._next[state][character]
        self.matches[state] = len(stop)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self.matches[state] = self.matches[state] or self.matches[self._fallback[state]]
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                queue.append(child)


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> StopAutomaton:
    return StopAutomaton(stops)


class TextStream:
    """Decodes the text of one sequence as far as it may be shown.

    It never returns half a character, nor the beginning of what may become a stop string.

    stop, min_tokens:  see SamplingParams; stop strings are searched for in the text of the tokens after the first
                       min_tokens
    stopped_at:        characters before the stop string that was complete first (the longest of those that end at the
                       same character); None while there is none
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = _automaton(stop)
        self._state = 0
        self._num_tokens = 0
        self._min_tokens = min_tokens
        self._held_back = ""
        self._num_shown = 0
        self.stopped_at: int | None = None

    def push(self, token_id: int) -> str:
        """Add a token and return the text that may be shown now, which is empty after a stop string."""
        if self.stopped_at is not None:
            return ""
        self._num_tokens += 1
        return self._search(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the rest of the text, after the last token; it may still find a stop string."""
        if self.stopped_at is not None:
            return ""
        shown = self._search(self._detokenizer.finish())
        if self.stopped_at is None:
            shown, self._held_back = shown + self._held_back, ""
        return shown

    def _search(self, new: str) -> str:
        text = self._held_back + new
        stops, state = self._stops, self._state
        if self._num_tokens > self._min_tokens and (state or not stops.begins.isdisjoint(new)):
            for end, character in enumerate(new, len(self._held_back) + 1):
                state = stops.step(state, character)
                if length := stops.matches[state]:
                    self.stopped_at = self._num_shown + end - length
                    return self._show(text, end - length)
            self._state = state
        return self._show(text, len(text) - self._stops.depths[self._state])

    def _show(self, text: str, end: int) -> str:
        self._held_back = text[end:]
        self._num_shown += end
        return text[:end]
