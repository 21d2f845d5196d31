"""Markers: the texts around the reasoning of a model, as a setting names them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Markers:
    """Names the texts around the reasoning. They may contain names of special tokens.

    start:   each of them begins the reasoning, or another paragraph of it
    end:     each of them ends it, and begins the answer
    answer:  what the end of a prompt needs so that the answer begins there, without reasoning; nothing where the chat
             template can write it
    """

    start: tuple[str, ...]
    end: tuple[str, ...]
    answer: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.start, *self.end)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return a pattern that finds the first marker, of those at the same place the longest."""
        return re.compile("|".join(re.escape(text) for text in sorted(self.texts, key=len, reverse=True)))

    def may_become_one(self, text: str) -> bool:
        """Return whether a marker begins with the text, and does not end with it."""
        return any(marker.startswith(text) and marker != text for marker in self.texts)


Preset = Literal["think", "harmony"]
Reasoning = Preset | Mapping[Literal["start", "end"], str] | None
PRESETS: Mapping[str, Markers] = {
    "think": Markers(("<think>",), ("</think>",)),  # Qwen3, DeepSeek R1
    "harmony": Markers(  # gpt-oss, which also may answer at once
        ("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"),
        ("<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        answer="<|channel|>final<|message|>",
    ),
}


def find_markers(reasoning: Reasoning) -> Markers | None:
    """Return the markers of a setting: a name of PRESETS, the texts `start` and `end`, or None for no markers."""
    if reasoning is None or isinstance(reasoning, str):
        return None if reasoning is None else PRESETS[reasoning]
    return Markers((reasoning["start"],), (reasoning["end"],))
