"""Exceptions in one line: moray's own in full, Ray's without its advice."""

import pytest

from moray.batch.format_error import format_error
from moray.engine.errors import JobError

TRACEBACK = """\
ray::Map() (pid=1)
  File "a.py", line 1, in b
    raise ValueError("x")
ValueError: x
"""
DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 1\nThe actor never ran."


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (JobError("one\ntwo"), "one\ntwo"),
        (RuntimeError(TRACEBACK), "RuntimeError: ValueError: x"),
        (
            RuntimeError(DIED),
            "RuntimeError: The actor died unexpectedly before finishing this task. The actor never ran.",
        ),
        (OSError("one line"), "OSError: one line"),
        (OSError("\n one line\n"), "OSError: one line"),
        (KeyError(), "KeyError"),
    ],
)
def test_explain(failure: Exception, expected: str) -> None:
    assert format_error(failure) == expected
