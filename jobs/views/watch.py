"""watch follows a job by its status.json until the job is over, wherever it runs."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moray.engine.errors import UserError
from moray.jobs.views import status as status_view
from moray.jobs.views.progress_bar import ProgressDisplay

if TYPE_CHECKING:
    from moray.jobs.clusters.submission import Submission

POLL_S = 1.0  # between two reads of status.json
ASK_EVERY_S = 5.0  # between two requests to the cluster


def watch(output: str, display: ProgressDisplay, ask: "Callable[[], Submission] | None" = None) -> int:
    """Show a job's status until the job is over, and return the exit code that `moray run` would have had.

    ask: returns the submission as the cluster reports it, where there is one. While that runs, a final status in the
         folder is an earlier run's and is ignored; once it is over, watching ends. A cluster that does not answer is
         not asked again.
    """
    submission, next_s, is_silent = None, 0.0, False
    while True:
        if ask is not None and time.monotonic() >= next_s:
            next_s = time.monotonic() + ASK_EVERY_S
            try:
                submission = ask()
            except UserError:
                submission, ask = None, None
                display.note("The cluster does not answer any more; watching the job's output folder only.")
        status, updated = status_view.read(output) or (None, datetime.now(UTC))
        if status is not None and (not status.state.is_final or submission is None or submission.is_over):
            display.update(status)
            if status.state.is_final:
                return status.exit_code
        if submission is not None and submission.is_over:
            display.note(status_view.format_submission(submission))
            return submission.exit_code
        silence, was_silent = status_view.explain_silence(output, updated), is_silent
        is_silent = bool(silence)
        if is_silent and not was_silent:
            display.note(silence)
        time.sleep(POLL_S)
