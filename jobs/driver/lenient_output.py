"""Make output lenient: a job does not end because nobody reads its output any more, as after `| head` or in a closed
terminal, or because a character is not in the output's encoding."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class _LenientFile(io.FileIO):
    """Drops what cannot be written: on a full disk only that write, without a reader all later writes too."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return len(memoryview(data))  # type: ignore[arg-type]
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(memoryview(data))  # type: ignore[arg-type]


def make_output_lenient() -> None:
    """Make stdout and stderr of this process, and of those that it forks, drop what cannot be written."""
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)


def open_missing_output() -> None:
    """Make stdout and stderr drop everything where the process was started without them.

    Otherwise Python sets them to None, and the next file or socket that is opened receives what programs write to
    descriptors 1 and 2.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115 - as long as the process lives


def escape_unknown_characters() -> None:
    r"""Make stdout and stderr write \u5c65 for a character that is not in their encoding, such as Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is closed, or an object of the caller
            stream.reconfigure(errors="backslashreplace")


def drop_unread_output() -> None:
    """Flush stdout and stderr, and drop what nobody reads: Python would print an error about it when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _lenient(stream: TextIO) -> TextIO:
    with suppress(OSError, ValueError, AttributeError):  # no file: closed, or replaced by an object
        stream.flush()
        raw = _LenientFile(stream.fileno(), "w", closefd=False)
        is_line_buffered = raw.isatty() or stream is sys.stderr
        return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=is_line_buffered)
    return stream
