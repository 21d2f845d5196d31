"""`make test` runs every test that is neither slow nor for a GPU."""

import ast
import re

from repository import ROOT


def test_all_tests_that_run_alone_are_in_the_folders_that_make_test_names() -> None:
    (named,) = re.findall(r"and alone' (.*?)(?:  #|$)", (ROOT / "Makefile").read_text(), re.M)
    elsewhere = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        if str(path.parent.relative_to(ROOT)) not in named.split():
            elsewhere += [
                f"{path.name}:{node.lineno}" for node in ast.walk(ast.parse(path.read_text())) if is_fast(node)
            ]
    assert elsewhere == []


def is_fast(node: ast.AST) -> bool:
    """Return whether it is a test, or the marks of a file, that runs alone and is not slow."""
    marks: list[ast.expr] = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
        marks = [node.value]
    text = " ".join(map(ast.unparse, marks))
    return "mark.alone" in text and "mark.slow" not in text
