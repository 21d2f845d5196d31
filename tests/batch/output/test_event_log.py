"""The event log of a run: what is read back, and what is added to it after its driver is gone."""

import json
from pathlib import Path

from moray.batch.output.event_log import EventLog, append_events, logged_runs, read_events
from moray.batch.output.folder import OutputFolder
from moray.batch.run_events import DriverLost, RayReport, RunEnded, RunStarted


def add_text(folder: OutputFolder, text: str) -> None:
    name = "_job/events/run0.jsonl"
    folder.write(name, (folder.read(name) or b"") + text.encode())


def test_events_are_read_as_they_were_added(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    assert logged_runs(folder) == [] and read_events(folder, "run0") == []
    log = EventLog("run0", folder, lambda: 0.0)
    added = [RunStarted(5, 5, versions={"ray": "1"}), RayReport("a node\nwas lost")]
    for event in added:
        log.add(event)
    read = read_events(folder, "run0")
    assert [logged.event for logged in read] == added
    assert read[0].at <= read[1].at and read[0].at.tzinfo is not None
    assert logged_runs(folder) == ["run0"]


def test_lines_that_are_no_events_of_ours_are_skipped(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    at = '"at": "2026-11-29T15:40:45.298+00:00"'
    add_text(folder, f'{{{at}, "event": "ray", "report": "x"}}\n')
    for line in ('{"at": "2026-11-', "[]", "7", "", "\x00", '{"at": 7, "event": "ray", "report": "x"}'):
        add_text(folder, line + "\n")
    for rest in ('"event": "comes_later"', '"event": ["ray"]', '"event": "ray"', '"event": "ray", "report": {}'):
        add_text(folder, f"{{{at}, {rest}}}\n")
    assert [logged.event for logged in read_events(folder, "run0")] == [RayReport("x")]


def test_what_is_appended_takes_the_place_of_an_incomplete_line(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    add_text(folder, '{"at": "2026-11-29T15:40:45.298+00:00", "event": "ray", "report": "x"}\n{"half')
    append_events(folder, "run0", DriverLost("killed"), RunEnded("FAILED", "killed", 2))
    content = folder.read("_job/events/run0.jsonl") or b""
    assert [json.loads(line)["event"] for line in content.splitlines()] == ["ray", "driver_lost", "ended"]
