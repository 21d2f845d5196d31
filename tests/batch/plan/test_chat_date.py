"""Prompts do not change with the day on which a job is continued."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from made_jobs import TINY, make_spec, write_input

import moray.batch.plan.chat_date as chat_date
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder, claim_folder
from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.stages.prompts import Prompts
from moray.engine.errors import OutputError, SpecError
from moray.engine.text.tokenizer import Tokenizer

CLOCK = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the date of this machine's clock."""

    def set_date(text: str) -> None:
        class Clock(date):
            @classmethod
            def today(cls) -> "Clock":
                return cls.fromisoformat(text)

        monkeypatch.setattr(chat_date, "date", Clock)

    return set_date


def plan(folder: Path, **template: str) -> PlannedJob:
    write_input(folder / "in/a.parquet", {"messages": [[{"role": "user", "content": "hi"}]]})
    return plan_job(make_spec(folder, input={"messages": "messages"}, template={"chat": CLOCK} | template))


def begin(folder: Path, job: PlannedJob) -> None:
    """As a run does that commits a part."""
    claim_folder(OutputFolder(str(folder / "out")), job.spec, job.plan)
    (folder / "out" / job.plan.part_name(job.plan.shards[0])).write_bytes(b"")


def test_a_job_keeps_the_date_of_its_first_day(tmp_path: Path, on: Any) -> None:
    on("2026-11-29")
    job = plan(tmp_path)
    assert job.spec.template.date == "2026-11-29"
    assert job.plan.fingerprint.others["template.date"] == "2026-11-29"
    on("2026-11-30")
    assert plan(tmp_path).spec.template.date == "2026-11-30"  # nothing was done yet
    begin(tmp_path, job)
    assert plan(tmp_path).plan == job.plan
    assert "date: '2026-11-29'" in (tmp_path / "out/_job/spec.yaml").read_text()
    check_folder(OutputFolder(str(tmp_path / "out")), plan(tmp_path).plan)


def test_another_date_is_another_job(tmp_path: Path, on: Any) -> None:
    on("2026-11-29")
    begin(tmp_path, plan(tmp_path))
    other = plan(tmp_path, date="2026-12-24")
    with pytest.raises(OutputError, match=r"template.date: 2026-11-29 -> 2026-12-24"):
        check_folder(OutputFolder(str(tmp_path / "out")), other.plan)
    assert plan(tmp_path, date="2026-11-29").plan == plan(tmp_path).plan


def test_a_template_that_asks_for_no_date_has_none(tmp_path: Path, on: Any) -> None:
    on("2026-11-29")
    job = plan(tmp_path, chat="{{ messages[0].content }}")
    assert job.spec.template.date == "today" and "template.date" not in job.plan.fingerprint.others
    with pytest.raises(SpecError, match=r"template.date: the chat template does not ask for the date; drop it"):
        plan(tmp_path, chat="{{ messages[0].content }}", date="2026-11-29")


def test_the_prompt_has_that_date(tmp_path: Path) -> None:
    import pyarrow as pa

    tokenizer = Tokenizer(TINY)
    job = plan(tmp_path, date="2024-02-29")
    table = pa.table({"messages": [[{"role": "user", "content": "hi"}]]})
    ((prompt, _),) = Prompts(job.spec, tokenizer, 1024).encode(table)  # type: ignore[misc]
    assert tokenizer.decode(prompt) == "29 Feb 2024 00:00 hi"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}], CLOCK).split()[2] == str(date.today().year)
