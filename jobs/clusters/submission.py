"""Submission: one submission of a job to a cluster, and the ids of submissions."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from moray.engine.errors import UserError

NAME_KEY, OUTPUT_KEY = "moray.name", "moray.output"  # of a Ray job's metadata


@dataclass(frozen=True)
class Submission:
    """Describes one submission of a job to a cluster.

    name, output:      the job's name and output folder
    state:             Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    started_s:         Unix time
    driver_exit_code:  exit code of the driver; None where Ray does not know it
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
        """Make one of a Ray job that moray submitted."""
        metadata: dict[str, Any] = job.metadata or {}
        return cls(
            id=str(job.submission_id),
            name=metadata.get(NAME_KEY, ""),
            output=metadata.get(OUTPUT_KEY, ""),
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
        """Return the exit code that `moray run` would have had. The submission must be over."""
        if self.state is JobStatus.SUCCEEDED:
            return 0
        if self.state is JobStatus.STOPPED:
            return 143
        return self.driver_exit_code if self.driver_exit_code in (2, 130, 143) else 1


def select(known: Sequence[Submission], target: str, cluster: str) -> Submission:
    """Return the latest submission of a job, by its name, output folder or submission id.

    known:    all submissions, the first one first
    cluster:  what they were submitted to, for errors

    Raises UserError where there is none, or where jobs with different output folders have that name.
    """
    found = [one for one in known if target.rstrip("/") in (one.name, one.id, one.output)]
    if not found:
        names = ", ".join(dict.fromkeys(one.name for one in known)) or "none"
        raise UserError(f"{cluster} has no job {target!r}; it has: {names}")
    if len({one.output for one in found}) > 1:
        outputs = ", ".join(dict.fromkeys(one.output for one in found))
        raise UserError(f"several jobs are named {target!r}; give the output folder of one: {outputs}")
    return found[-1]


def next_id(name: str, output: str, before: Sequence[str]) -> str:
    """Return `<name>-<8 digits of the output folder>-<n>`, with n one more than in the ids `before`."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40] or "job"
    return f"{readable}-{output_digits(output)}-{_next_number(before)}"


def next_label(name: str, output: str, before: Sequence[str]) -> str:
    """Return an id like that of next_id for Kubernetes: a DNS label that begins with a letter and has at most the 47
    characters that KubeRay accepts."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    readable = readable if readable[:1].isalpha() else f"job-{readable}"
    return f"{readable[:34].strip('-')}-{output_digits(output)}-{_next_number(before)}"


def output_digits(output: str) -> str:
    """Return 8 hexadecimal digits of an output folder, which all submissions of a job share."""
    return hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:8]


def _next_number(before: Sequence[str]) -> int:
    return 1 + max((int(tail) for one in before if (tail := one.rpartition("-")[2]).isdigit()), default=0)
