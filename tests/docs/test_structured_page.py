"""The specs and the pydantic model of docs/structured-output.md are such as moray takes."""

import re
from pathlib import Path

import pytest
from repository import ROOT

from moray.batch.output_columns import output_schema
from moray.batch.spec import JobSpec
from moray.engine.settings.yaml_text import parse_yaml

PAGE = (ROOT / "docs/structured-output.md").read_text()
YAML = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
REQUIRED = {"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}}


@pytest.fixture(autouse=True)
def schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the schema that the page's pydantic model gives, where its spec names it."""
    monkeypatch.chdir(tmp_path)
    exec(next(text for text in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "BaseModel" in text), {})


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_a_spec_can_be_read(text: str) -> None:
    spec = JobSpec.model_validate(REQUIRED | parse_yaml(text))
    assert spec.is_structured or spec.choices


def test_the_columns_are_those_that_the_page_names() -> None:
    (invoices,) = [JobSpec.model_validate(parse_yaml(text)) for text in YAML if "name: invoices" in text]
    (classes,) = [JobSpec.model_validate(parse_yaml(text)) for text in YAML if "name: sentiment" in text]
    types = {field.name: str(field.type) for spec in (invoices, classes) for field in output_schema(spec, [])}
    named = re.findall(r"`(struct<[^`]*>)`", PAGE)
    assert {types["parsed"].replace("item: ", "").replace("element: ", ""), types["probabilities"]} <= set(named)
