"""Split the texts of models that reason before they answer into the reasoning and the answer.

Jobs split whole texts, the endpoint streams too; both do it here.
"""

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from moray.engine.settings.markers import Markers
from moray.engine.text.tokenizer import Tokenizer

_TAIL = 64  # tokens at the end of a prompt in which a marker is looked for


def is_open(markers: Markers, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool | None:
    """Return whether the text after a prompt begins inside the reasoning: chat templates may write the first marker.

    True where the prompt ends with a start, False where it ends with an end, None where it ends with neither.
    """
    prompt = tokenizer.decode(prompt_token_ids[-_TAIL:]).rstrip()
    return True if prompt.endswith(markers.start) else False if prompt.endswith(markers.end) else None


class Split(NamedTuple):
    """Holds two parts of a text. reasoning is None where a whole text has none."""

    reasoning: str | None
    answer: str


def split_text(text: str, markers: Markers, begins_open: bool | None = None) -> Split:
    """Split a whole text as ReasoningStream does.

    In addition, where nothing is known of the prompt, all before an end without a start is reasoning.
    """
    if begins_open is None and (first := markers.pattern.search(text)) is not None:
        begins_open = True if first[0] in markers.end else None
    stream = ReasoningStream(markers, begins_open)
    parts = stream.push(text), stream.finish()
    reasoning = "".join(part.reasoning or "" for part in parts)
    return Split(reasoning if stream.has_reasoned else None, "".join(part.answer for part in parts))


class _Place(Enum):
    BEGINNING = auto()
    REASONING = auto()
    ANSWER = auto()


class ReasoningStream:
    """Splits a text that comes piece by piece.

    A text is reasoning up to an end marker if it begins with a start marker or if the prompt ended with one; otherwise
    it is an answer, unchanged. Markers are removed, with the white space around them. Nothing is returned that may turn
    out to be the beginning of a marker.

    begins_open:   see is_open
    has_reasoned:  a part of the text so far was reasoning, or a marker
    """

    def __init__(self, markers: Markers, begins_open: bool | None = None) -> None:
        self._markers = markers
        self._place = {True: _Place.REASONING, False: _Place.ANSWER, None: _Place.BEGINNING}[begins_open]
        self.has_reasoned = begins_open is True
        self._held_back = ""
        self._space = ""  # white space after the reasoning that was shown
        self._is_after_marker = self.has_reasoned  # white space is removed there
        self._break = ""  # between two paragraphs of reasoning that a start marker separates

    def push(self, text: str) -> Split:
        """Add a piece and return what it decides."""
        return self._split(text, is_last=False)

    def finish(self) -> Split:
        """Return the rest of the text, without a marker that is cut short."""
        return self._split("", is_last=True)

    def _split(self, new: str, *, is_last: bool) -> Split:
        self._held_back += new
        if self._place is _Place.BEGINNING:
            self._begin(is_last)
        reasoning = ""
        while self._place is _Place.REASONING and self._held_back:
            text, marker = self._held_back, self._markers.pattern.search(self._held_back)
            undecided = self._find_undecided(text)
            if marker is not None and marker.start() >= undecided and not is_last:
                marker = None  # a longer one may still come
            decided = text[: undecided if marker is None else marker.start()]
            if shown := decided.rstrip():
                reasoning += self._show(self._space + shown)
                self._space = ""
            self._space += decided[len(shown) :]
            if marker is None:
                self._held_back = "" if is_last else text[undecided:]
                break
            self._pass(marker)
        answer = ""
        if self._place is _Place.ANSWER:
            answer, self._held_back = self._show(self._held_back), ""
        return Split(reasoning, answer)

    def _begin(self, is_last: bool) -> None:
        """Decide how the text begins, once it has enough characters."""
        text = self._held_back.lstrip()
        may_become_marker = self._markers.may_become_one(text)
        if may_become_marker and not is_last:
            return
        if (marker := self._markers.pattern.match(text)) is not None:
            self._held_back = text
            self._pass(marker)
        elif may_become_marker and len(text) > 1:  # cut short inside a marker; a single character is an answer
            self._held_back, self._place, self.has_reasoned = "", _Place.REASONING, True
        else:
            self._place = _Place.ANSWER

    def _pass(self, marker: re.Match[str]) -> None:
        """Continue after a marker of the text that is held back."""
        if self._place is _Place.REASONING and not self._is_after_marker:
            self._break = "\n\n"
        self._place = _Place.ANSWER if marker[0] in self._markers.end else _Place.REASONING
        self._held_back, self._space = self._held_back[marker.end() :], ""
        self._is_after_marker = self.has_reasoned = True

    def _show(self, text: str) -> str:
        """Return the text as it is shown, without white space after a marker."""
        text = text.lstrip() if self._is_after_marker else text
        if text:
            self._is_after_marker = False
            if self._place is _Place.REASONING:
                text, self._break = self._break + text, ""
        return text

    def _find_undecided(self, text: str) -> int:
        """Return where the longest end of the text begins that may become a marker; the text's length if none may."""
        longest = max(map(len, self._markers.texts))
        starts = range(max(0, len(text) - longest + 1), len(text))
        return next((start for start in starts if self._markers.may_become_one(text[start:])), len(text))
