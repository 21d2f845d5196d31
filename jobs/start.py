"""How a submitted job begins on the cluster: says what is missing there before it imports anything else.

It is sent along as a file of its own, nothing imports it, and it must run on a Python that is too old for the rest.
"""

import importlib.util
import sys

NEEDED = ("jobs", "torch", "transformers", "safetensors", "pyarrow", "pydantic", "yaml", "typer", "rich")


def find_problem() -> str:
    """Why moray cannot run here; empty where it can."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"it runs Python {sys.version_info[0]}.{sys.version_info[1]}, and moray needs 3.11 or newer"
    missing = ["moray" if name == "jobs" else name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"its Python ({sys.executable}) has no {', '.join(missing)}" if missing else ""


if __name__ == "__main__":
    problem = find_problem()
    if problem:
        print(f"The cluster cannot run this job:\n  {problem}; use an image with what moray needs", file=sys.stderr)
        sys.exit(2)

    from jobs.cli import main

    main()
