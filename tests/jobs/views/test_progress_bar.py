"""The progress of a job on a terminal and in a log."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from test_status_text import DONE, PENDING, RUNNING

from moray.batch.status.status import Status
from moray.jobs.views.progress_bar import ProgressDisplay


def show(*statuses: Status, is_terminal: bool, width: int = 120, price: float | None = None) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)
    with ProgressDisplay(console, price) as display:
        for status in statuses:
            display.update(status)
            display._progress.refresh()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_has_a_line_a_change_of_state_and_a_summary_once() -> None:
    assert show(PENDING, PENDING, RUNNING, RUNNING, DONE, DONE, is_terminal=False).splitlines() == [
        "demo: starting Ray, loading the model, 1 worker starting",
        "demo: 1,010/1,200 rows, 2 failed (too_long 2), 2,340 tokens/s in, 1,234 out, 9.4 s left (8.1 s to 12 s), "
        "2 workers, 1 starting, 98% busy, KV cache 41%",
        "demo SUCCEEDED",
        "  1,198 of 1,200 rows ok, 2 failed (too_long 2)",
        "  5,000 tokens generated, 1,234 tokens/s, 1 min 01 s in all",
        "  output: out/demo",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_has_a_bar_and_the_same_facts(width: int) -> None:
    text = show(PENDING, RUNNING, DONE, is_terminal=True, width=width, price=2.5)
    assert re.search("━╸? *1,010/1,200 rows", text)
    assert "  2,340 tokens/s in, 1,234 out, 9.4 s left (8.1 s to 12 s)" in text
    assert "  2 workers, 1 starting, 98% busy, KV cache 41%" in text and "$5.00 so" in text
    assert "  2 failed (too_long 2)" in text
    assert "demo SUCCEEDED\n  1,198 of 1,200 rows ok" in text
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\x1b[2K", "\n"))
    assert max(map(len, drawn.splitlines())) <= width


def test_a_long_name_leaves_room_for_a_bar() -> None:
    text = show(replace(RUNNING, name="a job with quite a long name, as they are"), is_terminal=True, width=80)
    assert "━━━━━━━" in text and "1,010/1,200 rows" in text
