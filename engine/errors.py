"""The exceptions of moray. Their messages name the thing, the value, the limit and the fix.

MorayError
├── UserError            a mistake of the user: shown without a stack trace, exit code 2
│   ├── SettingsError    settings have mistakes; lists all of them
│   │   └── SpecError    they are those of a job spec
│   ├── CheckpointError  the model folder is wrong: config, tensors or tokenizer
│   ├── NodeError        this machine cannot do it, or cannot now: too little memory or disk, a store out of reach
│   │   └── DeviceError  the GPU, driver or compiler of this machine cannot run the model
│   ├── InputError       the input files are wrong
│   └── OutputError      the output folder belongs to another job, or cannot be read or written
├── EngineError          the engine failed or is shutting down: a 503 at the endpoint
├── RequestError         this request or row cannot run: an error row in a batch job, a 400 at the endpoint
└── JobError             the job itself failed: exit code 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_SHOWN_LENGTH = 80  # characters: a longer value is cut in messages, so that each fits a line or two


class MorayError(Exception):
    """Base class of all exceptions that moray raises on purpose."""


class UserError(MorayError):
    """The user made a mistake, which the message describes."""


class CheckpointError(UserError):
    """The model folder cannot be loaded as it is."""


class NodeError(UserError):
    """This machine cannot do what was asked, or cannot now. Another machine may be able to, or this one later."""


class DeviceError(NodeError):
    """This machine cannot run the model on the device that the config names."""


class InputError(UserError):
    """The input files cannot be read in the way that the spec describes."""


class OutputError(UserError):
    """The output folder cannot be used for this job, or cannot be read."""


@dataclass(frozen=True)
class Problem:
    """Describes one mistake in a spec or config.

    path:    the dotted name of the field (`sampling.top_p`)
    message: what is wrong and what is allowed
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def show(value: Any) -> str:
    """Format a value for a message as YAML and JSON write it, cut to 80 characters."""
    words = {None: "null", True: "true", False: "false"}
    try:
        text = words[value] if value is None or isinstance(value, bool) else repr(_as_list(value))
    except RecursionError:
        return "nested too deeply to be shown"
    return shorten(text)


def shorten(text: str) -> str:
    """Cut a text for a message to 80 characters."""
    return text if len(text) <= _MAX_SHOWN_LENGTH else text[: _MAX_SHOWN_LENGTH - 3] + "..."


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class SettingsError(UserError):
    """Settings have one or more mistakes; `problems` lists them all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class SpecError(SettingsError):
    """The job spec has one or more mistakes."""


class RequestError(MorayError):
    """One request cannot run.

    code:    a stable word, by which errors are counted
    message: the reason, with the numbers
    field:   the sampling parameter that causes the error whatever the prompt is; None if the prompt causes it
    problems:  all mistakes in the sampling parameters, if they cause the error
    """

    def __init__(self, code: str, message: str, field: str | None = None, problems: tuple[Problem, ...] = ()) -> None:
        self.code = code
        self.message = message
        self.field = field
        self.problems = problems
        super().__init__(message)

    @classmethod
    def bad_params(cls, problems: Sequence[Problem]) -> "RequestError":
        """Return the error of sampling parameters with these mistakes; there must be at least one."""
        return cls("bad_params", "; ".join(map(str, problems)), problems[0].path, tuple(problems))

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str, str | None, tuple[Problem, ...]]]:
        return type(self), (self.code, self.message, self.field, self.problems)


class EngineError(MorayError):
    """The engine has failed, or accepts no new requests; the request is not the cause."""


class JobError(MorayError):
    """The job failed for a reason that is not a mistake of the user."""
