"""The one error tree. Messages name the thing, the value, the limit and the fix.

MorayError
├── UserError            what the user gave is wrong: shown without a stack trace, exit code 2
│   ├── SpecError        the job spec: every problem at once
│   ├── CheckpointError  the model folder: config, tensors, tokenizer
│   ├── InputError       the input files
│   └── OutputError      the output folder belongs to another job, or cannot be read or written
├── EngineError          the engine failed or is shutting down: a 503 at the endpoint
├── RequestError         this request or row cannot run: an error row in a batch job, a 400 at the endpoint
└── JobError             the job itself failed: exit code 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 80  # characters of a value


class MorayError(Exception):
    """Root of everything this project raises on purpose."""


class UserError(MorayError):
    """What the user gave is wrong."""


class CheckpointError(UserError):
    """The model folder cannot be loaded as it is."""


class InputError(UserError):
    """The input files cannot be read as the spec says."""


class OutputError(UserError):
    """The output folder cannot take this job, or cannot be read."""


@dataclass(frozen=True)
class Problem:
    """One mistake: `path` is where it stands, dotted (`sampling.top_p`)."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def show(value: Any) -> str:
    """A value as it stands in YAML and JSON, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class SpecError(UserError):
    """The job spec is wrong in one or more places; `problems` has them all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RequestError(MorayError):
    """One request cannot run. `code` is a stable word for counting; the message has the numbers."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str]]:
        return type(self), (self.code, self.message)


class EngineError(MorayError):
    """The engine can run nothing any more, or takes nothing new; the request is not to blame."""


class JobError(MorayError):
    """The job failed for a reason that is not the user's mistake."""
