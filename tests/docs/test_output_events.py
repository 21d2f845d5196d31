"""docs/output.md lists the events of a run as their classes have them."""

import json
import re
from dataclasses import fields

from guide_blocks import ROOT

from moray.batch.run_events import EVENT_CLASSES, WorkerSample, from_json

TEXT = (ROOT / "docs/output.md").read_text()


def test_the_table_has_every_event_with_its_fields() -> None:
    _, _, rest = TEXT.partition("| Event | Fields | Means |\n|---|---|---|\n")
    listed = {}
    for row in rest.partition("\n\n")[0].splitlines():
        event, names, _ = row.strip("| ").split(" | ")
        required, _, optional = names.partition("[")
        listed[event.strip("`")] = re.findall(r"`(\w+)`", required), re.findall(r"`(\w+)`", optional)
    of_classes = {}
    for name, event_class in EVENT_CLASSES.items():
        optional_names = [item.name for item in fields(event_class) if item.default is None]
        required_names = [item.name for item in fields(event_class) if item.name not in optional_names]
        of_classes[name] = required_names, optional_names
    assert listed == of_classes


def test_what_figures_says_of_a_worker_is_listed() -> None:
    (sentence,) = re.findall(r"Its `workers` have ([^.]*)\.", TEXT)
    assert re.findall(r"`(\w+)`", sentence) == [item.name for item in fields(WorkerSample)]


def test_the_examples_are_events() -> None:
    (block,) = [block for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL) if '"event": "figures"' in block]
    decoder, examples, end = json.JSONDecoder(), [], 0
    while end < len(block.rstrip()):
        values, end = decoder.raw_decode(block, end)
        examples.append(values)
        end += len(block[end:]) - len(block[end:].lstrip())
    assert len(examples) > 3
    for values in examples:
        assert from_json(values) is not None, values
