"""Find the calls of tools in the text of a model: those it was made to write, and those in its own format.

A reader gets a text piece by piece and returns what is decided: text of the answer, and parts of calls.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

FormatName = Literal["hermes", "mistral"]


@dataclass(frozen=True)
class ToolFormat:
    """Describes how the models of a family write calls by themselves.

    name:   a short name
    start:  the text that begins a call, or a list of calls
    end:    the text that ends it; nothing where the end of the text does
    """

    name: FormatName
    start: str
    end: str


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")  # Qwen3: an object between tags, for each call
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "")  # Mixtral 8x22B: a list of objects, after the answer's text
# What begins and ends calls. Mistral's is a special token: unlike others, it must be part of texts to be found.
CALL_MARKERS = (HERMES.start, HERMES.end, MISTRAL.start)
# Words of templates of other formats that begin in the same way: Qwen3-Coder's XML, Mistral's newer names of functions.
_OTHERS = ("<function=", "[ARGS]", "[CALL_ID]")


def find_tool_format(template: str) -> ToolFormat | None:
    """Return the format in which a chat template shows calls, or None where it is none of those that are read here."""
    if any(word in template for word in _OTHERS):
        return None
    return next((one for one in (HERMES, MISTRAL) if one.start in template), None)


class CallPart(NamedTuple):
    """Holds a part of a call.

    call:       number of the call in the answer
    name:       the tool's name in the first part of a call, None in the others
    arguments:  the next part of the arguments' JSON
    """

    call: int
    name: str | None
    arguments: str


class AnswerPiece(NamedTuple):
    """Holds what a piece of text decides: text of the answer, and parts of calls."""

    text: str
    parts: tuple[CallPart, ...] = ()


class CallReader(Protocol):
    """Reads one text.

    num_calls: the calls that have begun
    """

    num_calls: int

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of text and return what it decides."""
        ...

    def finish(self) -> AnswerPiece:
        """Return the rest, after the last piece."""
        ...


class ForcedCallReader:
    """Reads a text that is one call: {"name":"...","arguments":{...}}, in compact JSON, possibly cut at its end.

    The name is returned once it is complete, the arguments as they come.
    """

    _HEAD = re.compile(r'\{"name":("(?:[^"\\]|\\.)*"),"arguments":')

    def __init__(self) -> None:
        self.num_calls = 0
        self._held_back = ""
        self._end = _ObjectEnd()

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of text and return the parts of the call that it completes."""
        name = None
        if self.num_calls == 0:
            self._held_back += text
            head = self._HEAD.match(self._held_back)
            if head is None:
                return AnswerPiece("")
            name, text = json.loads(head[1]), self._held_back[head.end() :]
            self.num_calls = 1
        arguments = text[: self._end.find(text)]
        return AnswerPiece("", (CallPart(0, name, arguments),) if arguments or name is not None else ())

    def finish(self) -> AnswerPiece:
        """Return nothing: all that is part of the call has been returned."""
        return AnswerPiece("")


class _ObjectEnd:
    """Finds where a JSON object that comes piece by piece ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_text = self._is_escaped = self._has_ended = False

    def find(self, piece: str) -> int:
        """Return how many characters of the next piece belong to the object."""
        if self._has_ended:
            return 0
        for place, character in enumerate(piece, start=1):
            if self._is_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_text = False
            elif character == '"':
                self._is_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._has_ended = True
                    return place
        return len(piece)


class FreeCallReader:
    """Reads the calls in a text that may have some, in a family's own format.

    A call is returned when it is complete. What begins like a call and is none stays text of the answer. White space
    before a call and after it is left out.

    max_calls: calls that are returned; further ones are left out. None = all
    """

    def __init__(self, tool_format: ToolFormat, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._format = tool_format
        self._max_calls = max_calls
        self._held_back = ""
        self._space = ""  # white space at the end of the answer so far
        self._is_after_call = False

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of text and return what it decides."""
        return self._read(text, is_last=False)

    def finish(self) -> AnswerPiece:
        """Return the rest of the text; a call at its end may lack the end."""
        rest = self._read("", is_last=True)
        return rest if self.num_calls else AnswerPiece(rest.text + self._space)

    def _read(self, new: str, *, is_last: bool) -> AnswerPiece:
        self._held_back += new
        shown, parts = "", list[CallPart]()
        while self._held_back:
            before, start, rest = self._held_back.partition(self._format.start)
            if not start:
                length = len(before) if is_last else len(before) - _overlap(before, self._format.start)
                shown, self._held_back = shown + self._show(before[:length]), before[length:]
                break
            shown, self._held_back = shown + self._show(before), start + rest
            inside, end, rest = rest.partition(self._format.end) if self._format.end else (rest, "", "")
            if not end and not is_last:
                break
            calls = _parse_calls(inside)
            if calls is None:
                shown += self._show(start + inside + end)
            else:
                parts += self._take(calls)
            self._held_back = rest
        return AnswerPiece(shown, tuple(parts))

    def _show(self, text: str) -> str:
        """Return the text of an answer that may be shown now. White space waits for what follows it, which may be a
        call."""
        text = self._space + (text.lstrip() if self._is_after_call else text)
        shown = text.rstrip()
        self._space, self._is_after_call = text[len(shown) :], self._is_after_call and not shown
        return shown

    def _take(self, calls: list[tuple[str, str]]) -> list[CallPart]:
        self._is_after_call = True
        free = None if self._max_calls is None else self._max_calls - self.num_calls
        first, self.num_calls = self.num_calls, self.num_calls + len(calls[:free])
        return [CallPart(first + number, *call) for number, call in enumerate(calls[:free])]


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of a text with which the marker begins."""
    return next((size for size in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:size])), 0)


def _parse_calls(text: str) -> list[tuple[str, str]] | None:
    """Return names and arguments of the calls that a JSON text contains: one, or a list of them. None = it has none."""
    try:
        value: Any = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        found = [(call["name"], _write(call.get("arguments", call.get("parameters", {})))) for call in calls]
        "".join(name for name, _ in found).encode()  # half a surrogate pair is no text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found or None


def _write(arguments: object) -> str:
    if not isinstance(arguments, dict):
        raise TypeError("arguments are an object")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or _is_unicode(text) else json.dumps(arguments)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
