"""`make test` runs every test that is neither slow nor for a GPU."""

import re

from repository import ROOT

TESTS = ROOT / "tests"


def test_all_tests_that_run_alone_are_in_the_folders_that_make_test_names() -> None:
    (named,) = re.findall(r"and alone' (.*?)(?:  #|$)", (ROOT / "Makefile").read_text(), re.M)
    marked = [path for path in TESTS.rglob("test_*.py") if re.search(r"mark\.alone\b", path.read_text())]
    folders = {str(path.parent.relative_to(ROOT)) for path in marked if path.name != "test_make_test.py"}
    assert folders == set(named.split())
