"""The events of a run and their JSON lines, which other programs read: run_events.jsonl was recorded from runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from moray.batch.run_events import EVENT_CLASSES, ActorLost, ActorReady, RunStarted, StatsSample, from_json, to_json

RECORDED = Path(__file__).with_name("run_events.jsonl").read_text().splitlines()


@pytest.mark.parametrize("line", RECORDED, ids=lambda line: json.loads(line)["event"])
def test_a_recorded_line_is_read_and_written_as_it_was(line: str) -> None:
    values = json.loads(line)
    event = from_json(values)
    assert event is not None and event.name == values["event"]
    assert json.dumps({"at": values["at"]} | to_json(event)) == line


def test_every_event_was_recorded() -> None:
    assert {json.loads(line)["event"] for line in RECORDED} == EVENT_CLASSES.keys()


def test_readers_get_classes_all_the_way_down() -> None:
    (sample,) = [event for event in map(from_json, map(json.loads, RECORDED)) if _has_workers(event)]
    assert isinstance(sample, StatsSample) and sample.workers[0].waiting_seqs == 0


def _has_workers(event: object) -> bool:
    return isinstance(event, StatsSample) and len(event.workers) > 0


def test_optional_fields_without_a_value_are_left_out() -> None:
    assert to_json(ActorLost("worker", "a", 1)) == {"event": "actor_lost", "stage": "worker", "actor": "a", "pid": 1}
    ready = to_json(ActorReady("worker", "a", 1, "n", products=""))
    assert ready["products"] == "" and "host" not in ready, "an empty text is a value"


def test_what_a_newer_moray_adds_is_left_out() -> None:
    assert from_json({"event": "comes_later", "pid": 1}) is None
    assert from_json({}) is None
    assert from_json({"event": "drain", "reason": "SIGINT", "since": 4}) == from_json(
        {"event": "drain", "reason": "SIGINT"}
    )


def test_the_first_version_recorded_less_of_a_start() -> None:
    assert from_json({"event": "started", "rows": 5, "pending": 4}) == RunStarted(5, 4, is_retry=False, versions={})


@pytest.mark.parametrize(
    "values",
    [
        {"event": "actor_ready", "stage": "worker", "actor": "a", "node": "n"},
        {"event": "actor_ready", "stage": "worker", "actor": "a", "node": "n", "pid": "no number"},
        {"event": "committed", "shard": 0, "ok": None, "failed": 0},
        {"event": "figures", "rows_done": 0, "failed_rows": 0, "prompt_tokens": 0, "generated_tokens": 0}
        | {"workers": [{"actor": "a"}]},
    ],
)
def test_a_damaged_event_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        from_json(values)
