"""Texts of models that reason are split alike as a whole and piece by piece."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.engine.settings.markers import PRESETS, Markers, find_markers
from moray.engine.text.reasoning import ReasoningStream, Split, is_open, split_text
from moray.engine.text.tokenizer import Tokenizer

THINK, HARMONY = PRESETS["think"], PRESETS["harmony"]
OVERLAPPING = Markers(("ab", "abc"), ("bcd", "d"))  # one begins, ends and is inside of another
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("markers", "text", "reasoning", "answer"),
    [
        (THINK, "<think>\nHm, 2 + 2.\n</think>\n\nIt is 4.\n", "Hm, 2 + 2.", "It is 4.\n"),
        (THINK, "Hm.</think>4", "Hm.", "4"),  # the start was in the prompt
        (THINK, "  4 <think>no</think>\n", None, "  4 <think>no</think>\n"),
        (THINK, "\n<think></think>4", "", "4"),
        (THINK, "<think>Hm, 2 +\n", "Hm, 2 +", ""),  # cut inside the reasoning
        (THINK, "<think>Hm</thi", "Hm", ""),
        (THINK, "<thi", "", ""),
        (THINK, "<", None, "<"),
        (THINK, "", None, ""),
        (THINK, "4\n", None, "4\n"),
        (THINK, "<think>a</think>b</think>c", "a", "b</think>c"),
        (HARMONY, f"{ANALYSIS}Hm.<|start|>assistant{FINAL}4", "Hm.", "4"),
        (HARMONY, f"{ANALYSIS}Hm.<|start|>assistant{ANALYSIS}So.<|start|>assistant{FINAL}4", "Hm.\n\nSo.", "4"),
        (HARMONY, f"{ANALYSIS}Hm.<|start|>assistant<|channel|>", "Hm.", ""),
        (HARMONY, f"{FINAL}4", "", "4"),
        (HARMONY, "<|channel|>analysis", "", ""),
        (find_markers({"start": "[R]", "end": "[/R]"}), "[R]a[/R]b", "a", "b"),
    ],
)
def test_split(markers: Markers, text: str, reasoning: str | None, answer: str) -> None:
    assert split_text(text, markers) == Split(reasoning, answer)


def test_what_the_prompt_ended_with(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        ends = [is_open(THINK, tokenizer, tokenizer.encode_prompt(text)) for text in ("<think>\n", "</think>\n\n", "a")]
        assert ends == [True, False, None]
        assert is_open(THINK, tokenizer, tokenizer.encode_prompt("What is <think>? " + "a" * 400)) is None
    assert split_text("Hm, 2 +", THINK, begins_open=True) == Split("Hm, 2 +", "")
    assert split_text(" <think> is a tag, </think> too", THINK, begins_open=False).reasoning is None


def test_a_stream_shows_what_is_decided() -> None:
    stream = ReasoningStream(THINK)
    pieces = ["\n<th", "ink>", " Hm", " \n", "5 <", " 6 <", "/think", ">\n", "\n4", " or 5", "</think>"]
    shown = [stream.push(piece) for piece in pieces]
    assert [part.reasoning for part in shown] == ["", "", "Hm", "", " \n5", " < 6", "", "", "", "", ""]
    assert [part.answer for part in shown] == [""] * 8 + ["4", " or 5", "</think>"]
    assert stream.finish() == Split("", "") and stream.has_reasoned


@given(
    markers=st.sampled_from([THINK, OVERLAPPING, Markers(("<a>", "<b><a>"), ("<b><c>", "<c>"))]),
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<a>", "<b>", "<c>", "a", "b", "c", "d", " ", "\n", "<"])),
    begins_open=st.sampled_from([True, False, None]),
    data=st.data(),
)
def test_pieces_give_what_the_whole_gives(
    markers: Markers, parts: list[str], begins_open: bool | None, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    stream, whole = ReasoningStream(markers, begins_open), ReasoningStream(markers, begins_open)
    shown = [stream.push(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])] + [stream.finish()]
    expected = [whole.push(text), whole.finish()]
    for field in ("reasoning", "answer"):
        assert "".join(getattr(one, field) for one in shown) == "".join(getattr(one, field) for one in expected)
    assert stream.has_reasoned == whole.has_reasoned
