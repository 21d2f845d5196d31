"""docs/families.md has a spec for each family, which the reader of specs takes."""

import re

import pytest
from repository import ROOT

from moray.batch.spec import JobSpec
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.settings.yaml_text import parse_yaml

PAGE = (ROOT / "docs/families.md").read_text()
SPECS = {name: re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
         for name, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}  # fmt: skip


def test_every_family_has_a_spec() -> None:
    assert {name for name, specs in SPECS.items() if specs} == set(FAMILIES)


@pytest.mark.parametrize("family", SPECS)
def test_the_specs_can_be_read(family: str) -> None:
    for text in SPECS[family]:
        assert JobSpec.model_validate(parse_yaml(text)).name != "job"


def test_the_inline_keys_can_be_read() -> None:
    """Read the keys that the text shows, such as `template: {columns: {...}}`."""
    required = {"model": {"path": "m"}, "input": {"path": "i", "messages": "m"}, "output": {"path": "o"}}
    shown = [parse_yaml(text) for text in re.findall(r"`((?:template|output): \{[^`]*\})`", PAGE)]
    assert shown
    for values in shown:
        JobSpec.model_validate(required | {name: required.get(name, {}) | keys for name, keys in values.items()})
