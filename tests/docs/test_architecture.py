"""docs/architecture.md has the layers of pyproject.toml; modules and folders that the documents name are there."""

import re
import tomllib
from pathlib import Path

import pytest
from guide_blocks import GUIDES
from repository import ROOT

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PAST = ("log.md",)  # its entries name what there was
OURS = r"`((?:batch|engine|serve|jobs|kernels|tests|benchmarks|examples|k8s|docs|src)/[\w./-]+)`"
DOCUMENTS = [guide for guide in GUIDES if guide.name not in PAST] + sorted((ROOT / "docs/decisions").glob("*.md"))


def drawn_layers() -> dict[str, list[str]]:
    """Return the layers of each package as the document draws them, highest first."""
    block = re.search(r"^### The layers of each package$.*?^```\n(.*?)^```$", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    assert block is not None
    found = {}
    for package in block[1].split("\n\n"):
        name, rest = package.split(maxsplit=1)
        found[name] = [line.strip() for line in rest.splitlines()]
    return found


def test_layers_are_those_of_the_contracts() -> None:
    containers = {one["containers"][0]: one["layers"] for one in CONTRACTS if "containers" in one}
    assert drawn_layers() == {name.removeprefix("moray."): layers for name, layers in containers.items()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path: Path) -> None:
    missing = [name for name in re.findall(OURS, path.read_text()) if not (ROOT / name).exists()]
    assert [name for name in missing if "NAME" not in name and not name.startswith("src/moray/src")] == []
