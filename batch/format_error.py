"""format_error: an exception as one line of text."""

from moray.engine.errors import MorayError


def format_error(failure: BaseException) -> str:
    """Return the full text of moray's own errors, and the type and the most useful lines of others.

    Those are the end of a traceback, or else the first and the last line: Ray puts the cause first or last, and advice
    in between.
    """
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if isinstance(failure, MorayError) or not lines:
        return str(failure) or type(failure).__name__
    has_traceback = any("Traceback (most" in line or line.startswith("ray::") for line in lines)
    shown = lines[-1:] if has_traceback else list(dict.fromkeys([lines[0], lines[-1]]))
    return f"{type(failure).__name__}: {' '.join(shown)}"
