"""Check Python and the packages that moray needs against the version ranges in the packages' metadata."""

import json
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import moray
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning

MORAY = "moray"
# The packages whose versions a bug report needs first.
SHOWN = ("torch", "ray", "transformers", "tokenizers", "numba", "llvmlite", "triton", "pyarrow", "pydantic", "numpy")


def python(_: Subject) -> Iterator[Finding]:
    """Compare Python with what moray needs."""
    needed = (metadata.metadata(MORAY).get_all("Requires-Python") or [""])[0]
    version = platform.python_version()
    value = f"{platform.python_implementation()} {version}, {sys.executable}"
    if SpecifierSet(needed).contains(version, prereleases=True):
        yield ok(value)
    else:
        yield problem(f"{value}; moray needs {needed}", f"install moray with a Python {needed}")


def own_version(_: Subject) -> Iterator[Finding]:
    """Report moray's version and the folder of its code."""
    distribution = metadata.distribution(MORAY)
    folder = Path(moray.__file__).parent
    value = f"{distribution.version} in {folder}"
    checkout = _editable_checkout(distribution)
    if checkout is None:
        yield ok(value)
    elif folder.is_relative_to(checkout):
        yield ok(f"{value}, an editable checkout")
    else:
        fix = f"pip install --editable {folder.parents[1]}, or unset PYTHONPATH, or leave this folder"
        yield warning(f"{value}, though the installed one is the checkout {checkout}", fix)


def packages(_: Subject) -> Iterator[Finding]:
    """Compare the version of each direct and indirect dependency with the ranges that moray and they require."""
    mistakes = list(find_conflicts(MORAY))
    yield from (problem(value, fix, name) for name, value, fix in mistakes)
    wrong = {name for name, _, _ in mistakes}
    found = [f"{name} {version}" for name in SHOWN if name not in wrong and (version := _version(name))]
    yield ok(", ".join(found))


def find_conflicts(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (package, problem, fix) for each direct or indirect dependency that is missing, too old or too new."""
    seen: set[tuple[str, str]] = set()
    pending: list[tuple[str, str]] = [(name, "")]  # package, extra of it
    while pending:
        package, extra = pending.pop()
        for requirement in _requirements(package, extra):
            needed = canonicalize_name(requirement.name)
            version = _version(needed)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                required = f"{requirement.name}{requirement.specifier}"
                value = f"{version or 'not installed'}; {package} needs {required}"
                yield needed, value, f"pip install '{required}'"
            else:
                new = {(needed, one) for one in ("", *requirement.extras)} - seen
                seen |= new
                pending += sorted(new)


def _requirements(package: str, extra: str) -> Iterable[Requirement]:
    """Yield what the package requires on this machine: without extras where `extra` is empty, else for that extra."""
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        without = marker is None or marker.evaluate({"extra": ""})
        if without if not extra else not without and marker is not None and marker.evaluate({"extra": extra}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _editable_checkout(distribution: metadata.Distribution) -> Path | None:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    return Path(str(origin["url"]).removeprefix("file://")) if is_editable else None
