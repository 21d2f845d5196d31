"""What a person sees of a job, on a terminal and in a log."""

import io
from dataclasses import replace

from rich.console import Console

from batch.ledger import State
from batch.output.status import Status
from jobs.display import Display, facts, summarize

RUNNING = Status(
    name="demo", run="r1", output="out/demo", state=State.RUNNING, reason=None, input_rows=1200, ok_rows=1000,
    failed_rows=2, pending_rows=198, rows_done=1010, shards=12, committed_shards=10, prompt_tokens=9000,
    generated_tokens=5000, tokens_per_s=1234.5, elapsed_s=61.0, eta_s=9.4, errors={"too_long": 2},
)  # fmt: skip
PENDING = replace(RUNNING, state=State.PENDING, rows_done=0, failed_rows=0, tokens_per_s=0.0, eta_s=None)
DONE = replace(RUNNING, state=State.SUCCEEDED, ok_rows=1198, pending_rows=0, rows_done=1200, eta_s=None)
CANCELLED = replace(RUNNING, state=State.CANCELLED, reason="SIGINT", eta_s=None)


def show(*statuses: Status, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)
    with Display(console) as display:
        for status in statuses:
            display.update(status)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_has_a_line_a_change_of_state_and_a_summary_once() -> None:
    assert show(PENDING, PENDING, RUNNING, RUNNING, DONE, DONE, is_terminal=False).splitlines() == [
        "demo: starting Ray, loading the model",
        "demo: 1,010/1,200 rows, 2 failed, 1,234 tokens/s, 9.4 s left",
        "demo SUCCEEDED",
        "  1,198 of 1,200 rows ok, 2 failed (too_long 2)",
        "  5,000 tokens generated, 1,234 tokens/s, 1 min 01 s in all",
        "  output: out/demo",
    ]


def test_a_terminal_has_a_bar_with_the_same_facts() -> None:
    text = show(PENDING, RUNNING, DONE, is_terminal=True)
    assert "1,010/1,200 rows, 2 failed, 1,234 tokens/s, 9.4 s left" in text
    assert "demo SUCCEEDED\n  1,198 of 1,200 rows ok" in text


def test_a_job_that_is_not_done_says_how_to_continue() -> None:
    assert summarize(CANCELLED)[0] == "demo CANCELLED: SIGINT"
    assert summarize(CANCELLED)[1] == "  1,000 of 1,200 rows ok, 2 failed (too_long 2), 198 not done"
    assert summarize(CANCELLED)[-1] == "  Run the same command again to continue."


def test_a_job_that_scores_tells_the_tokens_it_read() -> None:
    assert summarize(replace(DONE, generated_tokens=0))[2] == "  9,000 prompt tokens, 1,234 tokens/s, 1 min 01 s in all"


def test_a_job_that_is_being_stopped_says_so() -> None:
    assert facts(replace(RUNNING, reason="SIGINT"))[-2:] == ["1,234 tokens/s", "stopping: SIGINT"]
