"""Restart: what a driver that replaces another one knows about it from its parent process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Restart:
    """States why this driver was started in place of another one.

    number:   how many restarts there were, including this one
    reason:   why the previous driver ended
    run:      the run that ended with it
    spec:     YAML text of the job's spec as it was at the first start; the file may have changed since
    began_s:  when the first run that the parent process started began, by this machine's monotonic clock
    """

    number: int
    reason: str
    run: str
    spec: str
    began_s: float
