"""Subject and Finding: the input and the result of a check. Pure data."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moray.batch.spec import JobSpec


class Verdict(StrEnum):
    """Rates a finding.

    OK:       as it should be
    WARNING:  a job runs, but slower, with less room or for a shorter time than it could
    PROBLEM:  a job would fail, or its results could be wrong
    """

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """Holds one line of the doctor's output.

    section, name:  its section and what was checked; a check may leave them empty, which gives those of its row
    value:          what was found
    fix:            what to do about it; None where the verdict is OK
    """

    section: str
    name: str
    verdict: Verdict
    value: str
    fix: str | None = None


@dataclass(frozen=True)
class Subject:
    """Holds what is checked in addition to the machine.

    spec:     spec of a job; None without one
    model:    path of a model, the spec's where there is one; None without either
    address:  address of a Ray cluster; None without one
    """

    spec: "JobSpec | None" = None
    model: str | None = None
    address: str | None = None


def ok(value: str, name: str = "") -> Finding:
    """Return a finding that needs no fix."""
    return Finding("", name, Verdict.OK, value)


def warning(value: str, fix: str, name: str = "") -> Finding:
    """Return a finding that does not stop a job."""
    return Finding("", name, Verdict.WARNING, value, fix)


def problem(value: str, fix: str, name: str = "") -> Finding:
    """Return a finding that stops a job or makes its results wrong."""
    return Finding("", name, Verdict.PROBLEM, value, fix)
