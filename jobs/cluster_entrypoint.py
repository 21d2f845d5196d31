"""The entry point of a submitted job on a cluster: it reports what is missing there, then runs moray's command line.

It is sent along as a single file that nothing imports. It must run on a Python that is too old for the rest of moray.
"""

import importlib.util
import sys

NEEDED = (
    *("moray", "torch", "transformers", "safetensors", "llguidance", "pyarrow", "pydantic", "yaml", "typer", "rich"),
)


def find_problem() -> str:
    """Return why moray cannot run here; an empty string where it can."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"it runs Python {sys.version_info[0]}.{sys.version_info[1]}, and moray needs 3.11 or newer"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"its Python ({sys.executable}) has no {', '.join(missing)}" if missing else ""


if __name__ == "__main__":
    problem = find_problem()
    if problem:
        print(f"The cluster cannot run this job:\n  {problem}; use an image with what moray needs", file=sys.stderr)
        sys.exit(2)

    from moray.jobs.cli import main

    main()
