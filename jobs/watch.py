"""watch: a job's status.json again and again until the job is over, whoever runs it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from engine.errors import UserError
from jobs import status_view
from jobs.display import Display

if TYPE_CHECKING:
    from jobs.submission import Submission

POLL_S = 1.0
ASK_EVERY_S = 5.0  # of the cluster


def watch(output: str, display: Display, ask: "Callable[[], Submission] | None" = None) -> int:
    """Returns what `moray run` would have ended with.

    ask: the cluster's word, where there is one. While it says that the job runs, what an earlier run left in the folder
         is no end; when it says that the job is over, nothing more will come. A cluster that is gone is asked no more.
    """
    submission, next_s, is_silent = None, 0.0, False
    while True:
        if ask is not None and time.monotonic() >= next_s:
            next_s = time.monotonic() + ASK_EVERY_S
            try:
                submission = ask()
            except UserError:
                submission, ask = None, None
                display.note("The cluster does not answer any more; its job's folder is watched alone.")
        status, updated = status_view.read(output) or (None, datetime.now(UTC))
        if status is not None and (not status.state.is_final or submission is None or submission.is_over):
            display.update(status)
            if status.state.is_final:
                return status.exit_code
        if submission is not None and submission.is_over:
            display.note(status_view.draw_submission(submission))
            return submission.exit_code
        was_silent, is_silent = is_silent, status_view.silence_s(updated) > status_view.SILENT_S
        if is_silent and not was_silent:
            display.note(status_view.explain_silence(updated))
        time.sleep(POLL_S)
