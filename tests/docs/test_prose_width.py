"""Prose in Markdown is at most 100 columns wide, so that a diff of it can be read."""

import re
from pathlib import Path

import pytest
from repository import ROOT

WIDTH = 100  # columns
FOLDERS = ("docs", "benchmarks", "examples", "jobs", "k8s")
FILES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])


def find_long_lines(text: str) -> list[int]:
    """Return the numbers of the lines of prose that are too long. Code blocks, tables and lone links may be longer."""
    found, is_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif is_code or line.lstrip().startswith("|") or re.fullmatch(r"\W*\[[^]]*\]\(\S+\)\W*", line):
            continue
        elif len(line) > WIDTH:
            found.append(number)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_at_most_100_columns_wide(path: Path) -> None:
    found = find_long_lines(path.read_text())
    assert found == [], f"{path.relative_to(ROOT)}: lines {found} are longer than {WIDTH} columns"


def test_long_lines_are_found() -> None:
    fits, long = "x" * WIDTH, "x" * (WIDTH + 1)
    link = f"* [a page](https://example.com/{long})."
    assert find_long_lines(f"{fits}\n{long}\n```\n{long}\n```\n| {long} |\n{link}\nsee {link}\n") == [2, 8]


def test_files_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"README.md", "docs/architecture.md", "docs/log.md", "benchmarks/README.md", "examples/README.md"} <= names
