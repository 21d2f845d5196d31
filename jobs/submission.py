"""Submission: one time that a job was given to a cluster, and the ids of such times."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from engine.errors import UserError

NAME, OUTPUT = "moray.name", "moray.output"  # keys of a Ray job's metadata


@dataclass(frozen=True)
class Submission:
    """One time that a job was given to the cluster.

    state:      Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    started_s:  Unix time
    """

    id: str
    name: str
    output: str
    state: JobStatus
    started_s: float
    message: str
    driver_exit_code: int | None

    @classmethod
    def of(cls, job: JobDetails) -> "Submission":
        metadata: dict[str, Any] = job.metadata or {}
        return cls(
            id=str(job.submission_id),
            name=metadata.get(NAME, ""),
            output=metadata.get(OUTPUT, ""),
            state=job.status,
            started_s=(job.start_time or 0) / 1000,
            message=job.message or "",
            driver_exit_code=job.driver_exit_code,
        )

    @property
    def is_over(self) -> bool:
        return self.state.is_terminal()

    @property
    def exit_code(self) -> int:
        """Of a submission that is over, what `moray run` would have ended with."""
        if self.state is JobStatus.SUCCEEDED:
            return 0
        if self.state is JobStatus.STOPPED:
            return 143
        return self.driver_exit_code if self.driver_exit_code in (2, 130, 143) else 1


def select(known: Sequence[Submission], target: str, where: str) -> Submission:
    """The latest submission of a job, by its name, output folder or submission id.

    known:  the first one first

    Raises UserError where there is none, or where jobs with different output folders have that name.
    """
    found = [one for one in known if target.rstrip("/") in (one.name, one.id, one.output)]
    if not found:
        names = ", ".join(dict.fromkeys(one.name for one in known)) or "none"
        raise UserError(f"{where} knows no job {target!r}; it has: {names}")
    if len({one.output for one in found}) > 1:
        outputs = ", ".join(dict.fromkeys(one.output for one in found))
        raise UserError(f"several jobs are called {target!r}; name one by its output folder: {outputs}")
    return found[-1]


def next_id(name: str, output: str, before: Sequence[str]) -> str:
    """`<name>-<8 digits of the output folder>-<n>`, n one more than in the ids `before`."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40] or "job"
    return f"{readable}-{output_digits(output)}-{_next_number(before)}"


def next_label(name: str, output: str, before: Sequence[str]) -> str:
    """As next_id, for Kubernetes: a DNS label that begins with a letter, of at most the 47 characters that KubeRay
    takes."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    readable = readable if readable[:1].isalpha() else f"job-{readable}"
    return f"{readable[:34].strip('-')}-{output_digits(output)}-{_next_number(before)}"


def output_digits(output: str) -> str:
    """What submissions of one job have in common."""
    return hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:8]


def _next_number(before: Sequence[str]) -> int:
    return 1 + max((int(tail) for one in before if (tail := one.rpartition("-")[2]).isdigit()), default=0)
