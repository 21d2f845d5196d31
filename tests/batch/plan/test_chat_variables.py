"""Variables of chat templates are checked and fixed when a job is planned."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_jobs import TINY, make_spec, write_input

from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.stages.block_schemas import Failure
from moray.batch.stages.prompts import Prompts
from moray.engine.errors import InputError, SpecError
from moray.engine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]
THINKS = "{{ messages[0].content }}{% if enable_thinking is defined %} {{ enable_thinking }}{% endif %} {{ style }}"


def plan(folder: Path, more: dict[str, Any] | None = None, **template: Any) -> PlannedJob:
    write_input(folder / "in/a.parquet", {"messages": [CHAT] * 3} | (more or {}))
    return plan_job(make_spec(folder, input={"messages": "messages"}, template={"chat": THINKS} | template))


def prompts(job: PlannedJob, **columns: Any) -> list[str]:
    tokenizer = Tokenizer(TINY)
    table = pa.table({"messages": [CHAT] * 3} | columns)
    rows = Prompts(job.spec, tokenizer, 1024).encode(table)
    return [row.message if isinstance(row, Failure) else tokenizer.decode(row[0]) for row in rows]


def test_rows_have_the_jobs_variables_or_their_own(tmp_path: Path) -> None:
    think = [True, None, False]
    job = plan(tmp_path, {"think": think}, variables={"style": "short"}, columns={"enable_thinking": "think"})
    assert prompts(job, think=think) == ["hi True short", "hi short", "hi False short"]
    job = plan(tmp_path, {"s": think}, variables={"style": "short", "enable_thinking": 3}, columns={"style": "s"})
    assert prompts(job, s=["a", None, "b"]) == ["hi 3 a", "hi 3 short", "hi 3 b"]


def test_the_fingerprint_has_them_where_they_are_given(tmp_path: Path) -> None:
    plain, other = plan(tmp_path).plan.fingerprint, plan(tmp_path, variables={"style": "short"}).plan.fingerprint
    assert not {"template.variables", "template.columns"} & plain.others.keys()
    assert list(plain.differences(other)) == ['template.variables: null -> {"style": "short"}']


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"variables": {"enable_thinkng": False}},
         "template.variables: the chat template never reads 'enable_thinkng'; did you mean 'enable_thinking'?"),
        ({"columns": {"styl": "messages"}}, "template.columns: the chat template never reads 'styl'; did you mean 's"),
        ({"chat": "auto", "variables": {"style": 1}}, "template.variables: the chat template never reads 'style'"),
    ],
)  # fmt: skip
def test_a_variable_that_no_template_reads(tmp_path: Path, template: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(tmp_path, **template)
    assert message in str(caught.value)


def test_the_type_of_a_column(tmp_path: Path) -> None:
    bad = {"at": pa.array([0, 1, 2], pa.timestamp("us"))}
    with pytest.raises(InputError, match=r"column 'at' \(template.columns.style\) must be text, a number, true or"):
        plan(tmp_path, bad, columns={"style": "at"})
    with pytest.raises(InputError, match=r"no column 'stile' \(template.columns.style\)"):
        plan(tmp_path, columns={"style": "stile"})
