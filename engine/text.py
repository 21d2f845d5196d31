"""Text of one sequence while its tokens come: decoded piece by piece, searched for stop strings. Engine uses it for
sequences that have stop strings, the endpoint for those it streams."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from engine.tokenizer import UNDECIDED, Tokenizer

MAX_CHARACTER_TOKENS = 4  # a character is at most four bytes, a token at least one


class Detokenizer:
    """Decodes tokens as they come; what push and finish return adds up to Tokenizer.decode of them all.

    Only text that no later token can change is returned: a character whose bytes are not all there is kept back, and
    so is a run of byte tokens, which decodes as text or as errors as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._num_returned = 0  # characters of the pending tokens
        self._is_start = True

    def push(self, token_id: int) -> str:
        """The text that this token decides."""
        if not self._tokenizer.is_text(token_id):
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._decode(self._pending)
        if not text.endswith(UNDECIDED):
            return self._take(text)
        new = text[self._num_returned : -1]
        self._num_returned += len(new)
        if len(self._pending) > 2 * MAX_CHARACTER_TOKENS:
            self._forget(text)
        return new

    def finish(self) -> str:
        """The rest of the text: no token follows."""
        return self._take(self._decode(self._pending)) if self._pending else ""

    def _take(self, text: str) -> str:
        new = text[self._num_returned :]
        self._pending, self._num_returned, self._is_start = [], 0, False
        return new

    def _forget(self, text: str) -> None:
        """Drop tokens before the last character, so that invalid text without end costs no more a token than valid."""
        for cut in range(len(self._pending) - 1, len(self._pending) - 1 - MAX_CHARACTER_TOKENS, -1):
            left = self._decode(self._pending[:cut])
            right = self._tokenizer.decode_continuation(self._pending[cut:])
            # Cut inside a character, the two would show an error each.
            if left + right == text and len(left) <= self._num_returned:
                self._pending, self._is_start = self._pending[cut:], False
                self._num_returned -= len(left)
                return

    def _decode(self, token_ids: list[int]) -> str:
        tokenizer = self._tokenizer
        return tokenizer.decode(token_ids) if self._is_start else tokenizer.decode_continuation(token_ids)


class StopAutomaton:
    """Finds the first of several strings to be complete in a text, at constant cost a character (Aho and Corasick,
    "Efficient string matching", CACM 1975).

    A state is the longest end of the text that begins a stop string; `depths` has its length, `matches` the length of
    the longest stop string that ends there, 0 for none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches = [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
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
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            self.matches[state] = self.matches[state] or self.matches[self._fallback[state]]
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                waiting.append(child)


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> StopAutomaton:
    return StopAutomaton(stops)


class TextStream:
    """Text of one sequence as it may be shown: never half a character, never the beginning of what may become a stop
    string.

    stop, min_tokens:  as in SamplingParams; stop strings are looked for in the text that tokens after the first
                       min_tokens decide
    stopped_at:        characters before the stop string that was complete first (the longest of those that end at the
                       same character); None while there is none
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = _automaton(stop)
        self._state = 0
        self._num_tokens = 0
        self._min_tokens = min_tokens
        self._held = ""
        self._num_shown = 0
        self.stopped_at: int | None = None

    def push(self, token_id: int) -> str:
        """Text that may be shown now. After a stop string there is none any more."""
        if self.stopped_at is not None:
            return ""
        self._num_tokens += 1
        return self._search(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text; may still find a stop string in it."""
        if self.stopped_at is not None:
            return ""
        shown = self._search(self._detokenizer.finish())
        if self.stopped_at is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _search(self, new: str) -> str:
        text = self._held + new
        if self._num_tokens > self._min_tokens:
            stops, state = self._stops, self._state
            for end, character in enumerate(new, len(self._held) + 1):
                state = stops.step(state, character)
                if length := stops.matches[state]:
                    self.stopped_at = self._num_shown + end - length
                    return self._show(text, end - length)
            self._state = state
        return self._show(text, len(text) - self._stops.depths[self._state])

    def _show(self, text: str, end: int) -> str:
        self._held = text[end:]
        self._num_shown += end
        return text[:end]
