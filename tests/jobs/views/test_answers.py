import json
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from engineless_job import run_engineless
from made_jobs import make_spec
from rich.console import Console

from moray.batch.output_columns import output_schema
from moray.batch.spec import JobSpec
from moray.jobs.views.answers import read_answers, render

TOO_LONG = {"stage": "too_long", "code": "too_long", "message": "has 9,000 tokens"}


def spec(folder: Path, **source: str) -> JobSpec:
    sections = {"model": {"path": "m"}, "input": {"path": "i"} | source, "output": {"path": str(folder)}}
    return JobSpec.model_validate(sections)


def write(spec: JobSpec, part: int, kept: dict[str, pa.DataType], rows: list[dict[str, Any]]) -> None:
    defaults = {"source_file": "a.parquet", "finish_reason": "stop"}
    rows = [{"source_row": i} | defaults | row for i, row in enumerate(rows)]
    schema = output_schema(spec, [pa.field(name, kind) for name, kind in kept.items()])
    pq.write_table(pa.Table.from_pylist(rows, schema), f"{spec.output.path}/part-x-{part}.parquet")


def shown(spec: JobSpec) -> list[str]:
    out = StringIO()
    Console(file=out, width=100).print(render(spec, read_answers(spec)))
    return [line.rstrip() for line in out.getvalue().replace(spec.output.path, "out").splitlines()]


def test_answers_errors_and_where_they_lie(tmp_path: Path) -> None:
    kept = dict.fromkeys(["prompt", "task", "expected"], pa.string())
    job = spec(tmp_path)
    rows = [
        {"prompt": "2 + 2 =", "task": "add", "expected": "4", "generated_text": " 4"},
        {"prompt": "2 + 3 =", "task": "add", "expected": "5", "generated_text": " [red]6"},
        {"prompt": "x" * 100, "task": "copy", "expected": None, "generated_text": "x\nx"},
    ]
    write(job, 0, kept, rows)
    write(
        job, 1, kept, [{"prompt": "long", "task": "add", "expected": "a", "finish_reason": "error", "error": TOO_LONG}]
    )
    assert shown(job) == [
        "",
        "Prompt                                                         Answer",
        "──────────────────────────────────────────────────────────────────────────────────────────",
        "2 + 2 =                                                        4        right",
        "2 + 3 =                                                        [red]6   wrong, should be 5",
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...   x x",
        "",
        "1 of 2 answers are right.",
        "",
        "1 row with an error   Code       Message",
        "─────────────────────────────────────────────────",
        "a.parquet row 0       too_long   has 9,000 tokens",
        "",
        "All answers: out/part-*.parquet",
    ]


def test_chats_without_expected_answers(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Why?"},
    ]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    job = spec(tmp_path, messages="messages")
    write(job, 0, {"messages": kind}, [{"messages": chat, "generated_text": f"Because {i}."} for i in range(20)])
    assert shown(job) == [
        "",
        "Prompt   Answer",
        "───────────────────────",
        "Why?     Because 0.",
        "Why?     Because 2.",
        "Why?     Because 4.",
        "Why?     Because 6.",
        "Why?     Because 8.",
        "Why?     Because 10.",
        "Why?     Because 12.",
        "Why?     Because 14.",
        "",
        "All answers: out/part-*.parquet",
    ]


def test_prompts_that_were_not_kept(tmp_path: Path) -> None:
    job = spec(tmp_path)
    write(job, 0, {}, [{"generated_text": "Yes."}])
    assert shown(job) == [
        "",
        "Prompt               Answer",
        "──────────────────────────────",
        "row 0 of a.parquet   Yes.",
        "",
        "All answers: out/part-*.parquet",
    ]


def test_the_answer_of_a_scored_row_is_its_likeliest_continuation(tmp_path: Path) -> None:
    required = {"model": {"path": "m"}, "input": {"path": "i", "continuation": "choices"}}
    job = JobSpec.model_validate(required | {"task": "score", "output": {"path": str(tmp_path)}})
    kept = {"prompt": pa.string(), "choices": pa.list_(pa.string()), "expected": pa.string()}
    questions: list[dict[str, Any]] = [
        {"prompt": "2 + 2 =", "choices": [" 5", " 4"], "expected": "4"},
        {"prompt": "2 + 3 =", "choices": [" 6", " 5"], "expected": "5"},
    ]
    logprobs = [(0, 0, -3.0), (0, 1, -2.0), (1, 0, -1.0), (1, 1, -1.0)]
    rows = [
        questions[i] | {"source_row": i, "sample": sample, "logprob": logprob} for i, sample, logprob in logprobs[::-1]
    ]
    write(job, 0, kept, [*rows, {"prompt": "long", "source_row": 2, "error": TOO_LONG}])
    assert shown(job)[1:10] == [
        "Prompt    Answer",
        "─────────────────────────────────────",
        "2 + 2 =   4        right",
        "2 + 3 =   6        wrong, should be 5",
        "",
        "1 of 2 answers are right.",
        "",
        "1 row with an error   Code       Message",
        "─────────────────────────────────────────────────",
    ]


def test_no_parts(tmp_path: Path) -> None:
    assert shown(spec(tmp_path)) == ["", "All answers: out/part-*.parquet"]


def test_chats_of_json_lines_in_any_form(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "Add 1 and 3."}], [{"from": "human", "value": "Add 2 and 3."}], "Add 3"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(json.dumps({"chat": chat}) for chat in chats))
    job = make_spec(tmp_path, input={"messages": "chat"})
    run_engineless(job)
    text = "\n".join(shown(job))
    assert "Add 1 and 3." in text and "Add 2 and 3." in text and "1 row with an error" in text
