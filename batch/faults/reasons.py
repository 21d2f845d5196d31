"""What a failure is in a line."""

from engine.errors import MorayError


def explain(failure: BaseException) -> str:
    """Our own errors in full, of others the last line that says something."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if isinstance(failure, MorayError) or not lines:
        return str(failure) or type(failure).__name__
    return f"{type(failure).__name__}: {lines[-1]}"
