"""Whole reports from job folders: their content, missing files, hostile text, many parts."""

import json
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from made_jobs import damage
from made_report import HOSTILE, Events, made_part, made_plan, write_job

from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import PLAN
from moray.batch.output.part import Record, encode_part, find_records
from moray.batch.output.part_stats import PartStats
from moray.batch.report import make_report, write_report
from moray.batch.report.comparison import compare
from moray.batch.report.examples import MAX_PARTS, find_examples
from moray.batch.report.report_data import read_report_data
from moray.batch.report.summary import find_notes
from moray.batch.shards import Plan
from moray.engine.errors import OutputError


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    return folder


@pytest.fixture
def copy(job: Path, tmp_path: Path) -> Path:
    """Return a copy of the job folder for tests that damage it."""
    return Path(shutil.copytree(job, tmp_path / "copy"))


class Tags(HTMLParser):
    """Counts the tags and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)


def words(html: str) -> str:
    """Return the text in the source of a page."""
    body = html.partition("<body>")[2]
    return " ".join(re.sub("<[^>]*>", " ", body).split())


def test_what_a_report_says(job: Path) -> None:
    text = words(make_report(str(job)))
    for said in (
        "summaries SUCCEEDED",
        "1,000 rows in = 992 ok 8 failed 0 not done 40 of 40 parts present",
        "Model hf://microsoft/Phi-3.5-MoE-instruct, bfloat16",
        "Workers 3 NVIDIA H100 80GB HBM3 on gpu-node-1, gpu-node-2, gpu-node-3",
        "Time 30 min 30 s in 3 runs",
        "1 run of 3 ended without an end event",
        "Rows with too_long 5 7 +40.0%",
        "Price (USD) 3.00 3.00",
        "Latency of rows in the engine, from admission to the end: half below 2.3 s",
        "stop 943 95.1%",
        "too_long: 7 rows (0.7%)",
        "layer 31, expert 0: 0 tokens",
        "9 workers in 3 runs, 1 death.",
        "61 shard 4, row 7",
        "CANCELLED: SIGINT 650 16",
    ):
        assert said in text, said


def test_a_report_says_what_a_cpu_multiplies_with(copy: Path) -> None:
    kernels = "bfloat16 products: avx512_bf16; self-check of 9 shapes passed"
    for path in (copy / "_job/events").iterdir():
        path.write_text(path.read_text().replace('"products": ""', f'"products": "{kernels}"'))
    assert f"Kernels {kernels}" in words(make_report(str(copy)))


def test_facts_add_up_over_parts_and_runs(job: Path) -> None:
    data = read_report_data(OutputFolder(str(job)))
    assert (data.counts.ok, data.counts.failed, data.pending, data.parts) == (992, 8, 0, 40)
    assert data.stats.finish_reasons.total() == 992
    assert {name: histogram.total() for name, histogram in data.stats.histograms.items()} == dict.fromkeys(
        ("prompt_tokens", "generated_tokens", "latency_ms"), 992
    )
    assert sum(prompt for prompt, _ in data.shard_tokens.values()) == data.counts.prompt_tokens
    tokens = data.expert_tokens
    assert tokens is not None and (len(tokens), len(tokens[0])) == (32, 16)
    assert tokens[3][2] == sum(one[3][2] for run in data.runs for one in run.expert_tokens)


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    plan, hostile = made_plan(1, len(HOSTILE)), "<b onmouseover=alert(1)>'\"&"
    folder = OutputFolder(str(tmp_path))
    folder.write(PLAN, plan.to_json().encode())
    for text in (*HOSTILE, hostile):
        part = made_part(plan, plan.shards[0], [(n, hostile, text) for n in range(len(HOSTILE))])
        folder.write(plan.part_name(plan.shards[0]), part)
        folder.write("_job/spec.yaml", yaml.safe_dump({"name": text, "model": {"path": text}, "task": text}).encode())
        status = {"name": text, "state": text, "reason": text, "updated_at": text}
        folder.write("_job/status.json", json.dumps(status).encode())
        folder.write("_job/forecast.json", json.dumps({"error_rows": {text: 1}, "source": text}).encode())
        events = Events(tmp_path, "run0")
        events.add(0, "started", rows=1, pending=1, versions={text: text})
        events.worker(text, 0, 1, host=text)
        events.add(2, "ray", report=text)
        events.add(3, "ended", state=text, reason=text, pending=1)
        html = make_report(str(tmp_path))
        seen = Tags(html)
        assert not seen.tags.keys() & {"script", "img", "b", "iframe", "object", "form"}
        assert (seen.tags["style"], seen.tags["body"]) == (1, 1)
        assert not any(name.startswith("on") or name in ("src", "srcset", "formaction") for name in seen.attributes)
        assert not set("\u202e\u202c\u2066\u2069\x00\x07") & set(html)
        assert len(html) < 200_000 and "49" not in html.partition("7 * 7")[2][:20]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("_job/forecast.json", "The job has no forecast"),
        ("_job/status.json", "how the job ended is not known"),
        ("_job/spec.yaml", "Task not known"),
        ("_job/events", "nothing is known of runs, workers and experts"),
    ],
)
def test_what_is_missing_is_said(copy: Path, missing: str, said: str) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in words(make_report(str(copy)))
    if missing != "_job/events":
        path.write_text("{spoiled: [")
        assert said in words(make_report(str(copy)))


def test_a_job_that_is_not_done(copy: Path) -> None:
    for part in sorted(copy.glob("*.parquet"))[:30]:
        part.unlink()
    status = json.loads((copy / "_job/status.json").read_text())
    (copy / "_job/status.json").write_text(json.dumps(status | {"state": "FAILED", "reason": "no memory"}))
    text = words(make_report(str(copy)))
    for said in (
        "250 ok 0 failed 750 not done",
        "FAILED: no memory",
        "750 rows not done. Run the job again to continue.",
        "other counts",
        "so far",
    ):
        assert said in text, said


def test_a_job_that_runs_or_was_killed(copy: Path) -> None:
    status = json.loads((copy / "_job/status.json").read_text())
    (copy / "_job/status.json").write_text(json.dumps(status | {"state": "RUNNING"}))
    assert "it still runs, or was killed" in words(make_report(str(copy)))


def test_no_rows(tmp_path: Path) -> None:
    OutputFolder(str(tmp_path)).write(PLAN, made_plan(0, 0).to_json().encode())
    text = words(make_report(str(tmp_path)))
    assert "0 rows in = 0 ok 0 failed 0 not done" in text and "No row failed" in text
    assert "No part has rows that are ok." in text


def test_every_row_failed(tmp_path: Path) -> None:
    plan = made_plan(2, 5)
    OutputFolder(str(tmp_path)).write(PLAN, plan.to_json().encode())
    for shard in plan.shards:
        part = made_part(plan, shard, [(n, "null_input", "the prompt is null") for n in range(5)])
        OutputFolder(str(tmp_path)).write(plan.part_name(shard), part)
    text = words(make_report(str(tmp_path)))
    assert "null_input: 10 rows (100%)" in text and text.count("the prompt is null") == 3
    assert "No part has rows that are ok." in text and "None: no sample was generated" in text


def test_parts_of_an_older_moray(copy: Path) -> None:
    plan = Plan.from_json((copy / PLAN).read_text())
    for shard in plan.shards[5:9]:
        counts = find_records(OutputFolder(str(copy)), plan)[shard.index].counts
        part = encode_part(pa.table({"x": range(25)}), plan.fingerprint.hexdigest, shard.index, counts, PartStats(), {})
        part = part.replace(b'"tally":', b'"other":')
        (copy / plan.part_name(shard)).write_bytes(part)
    assert "4 parts of an older moray have no lengths" in words(make_report(str(copy)))


def test_a_note_on_samples_without_an_answer(job: Path) -> None:
    data = read_report_data(OutputFolder(str(job)))
    assert not any("reasoning" in note for note in find_notes(data))
    notes = find_notes(replace(data, stats=replace(data.stats, unanswered=3)))
    assert any(note.startswith("3 samples ended inside the reasoning and have no answer") for note in notes)


def test_notes_on_structured_outputs(job: Path) -> None:
    data = read_report_data(OutputFolder(str(job)))
    assert not any("structured" in note or "parsed" in note for note in find_notes(data))
    cut = replace(data, counts=replace(data.counts, cut=12), stats=replace(data.stats, unparsed=1))
    notes = list(find_notes(cut))
    assert any(note.startswith("12 rows: structured output cut by max_tokens. Raise sampling") for note in notes)
    assert any(note.startswith("1 sample ended, but parsed is null: it does not hold the text") for note in notes)


def test_no_job_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not the output folder of a job"):
        make_report(str(tmp_path))


def test_where_it_is_written(copy: Path, tmp_path: Path) -> None:
    assert write_report(str(copy)) == f"{copy}/_job/report.html"
    assert write_report(str(copy), str(tmp_path / "r.html")) == str(tmp_path / "r.html")
    assert (copy / "_job/report.html").read_bytes() == (tmp_path / "r.html").read_bytes()
    with pytest.raises(OutputError, match=r"no/r.html cannot be written: .*No such file.* Name another file"):
        write_report(str(copy), str(tmp_path / "no/r.html"))


def test_a_report_in_an_object_store(bucket: str) -> None:
    plan, folder = made_plan(3, 10), OutputFolder(f"s3://{bucket}/out")
    folder.write(PLAN, plan.to_json().encode())
    for shard in plan.shards:
        folder.write(plan.part_name(shard), made_part(plan, shard, [(3, "too_long", "much")]))
    assert write_report(f"s3://{bucket}/out/") == f"s3://{bucket}/out/_job/report.html"
    assert "27 ok 3 failed 0 not done" in words((folder.read("_job/report.html") or b"").decode())


def test_examples_are_few_and_their_parts_too(tmp_path: Path) -> None:
    plan, folder = made_plan(MAX_PARTS + 5, 9), OutputFolder(str(tmp_path))
    for shard in plan.shards:
        codes = ("a", "a", "a", "a", f"only{shard.index}")
        folder.write(plan.part_name(shard), made_part(plan, shard, [(n, c, "m") for n, c in enumerate(codes)]))
    damage(tmp_path / plan.part_name(plan.shards[1]), 0, column=6)
    examples = find_examples(folder, plan, find_records(folder, plan), "prompt")
    assert [(e.row, e.prompt) for e in examples["a"]] == [(n, HOSTILE[n]) for n in range(3)]
    assert len(examples) == MAX_PARTS and "only1" not in examples and f"only{MAX_PARTS}" not in examples
    (example,) = examples["only7"]
    assert (example.file, example.row, example.stage) == ("part-1.parquet", 67, "generate")
    without = find_examples(folder, plan, find_records(folder, plan), "question")
    assert [e.prompt for e in without["a"]] == [None] * 3


def test_prompts_that_are_lists_or_not_text(tmp_path: Path) -> None:
    plan, folder = made_plan(1, 2), OutputFolder(str(tmp_path))
    whole = pa.BufferReader(made_part(plan, plan.shards[0], [(0, "a", "m"), (1, "a", "m")]))
    table = pa.parquet.read_table(whole)
    chats = pa.array([[{"role": "user", "content": "hé"}], None])
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xffaok"))
    kind = pa.struct([("role", pa.string()), ("content", pa.string()), ("sent", pa.int32())])
    sent = pa.array([[{"role": "user", "content": "hé", "sent": 3_000_000}], None], pa.list_(kind))
    dated = sent.cast(pa.list_(pa.struct([*list(kind)[:2], ("sent", pa.date32())])))
    for column, prompts in (
        (chats, ['[{"role": "user", "content": "hé"}]', None]),
        (broken, ["\ufffda", "ok"]),
        (dated, [f"{str(dated.type).replace('item', 'element')}, which Python cannot read", None]),
    ):
        changed = table.set_column(0, "prompt", column)
        counts = Counts(failed=2, errors={"a": 2})
        part = encode_part(changed, plan.fingerprint.hexdigest, 0, counts, PartStats(), {})
        folder.write(plan.part_name(plan.shards[0]), part)
        examples = find_examples(folder, plan, {0: Record(counts)}, "prompt")
        assert [example.prompt for example in examples["a"]] == prompts


def test_a_comparison_of_what_is_known(copy: Path) -> None:
    (copy / "_job/forecast.json").write_text('{"rows": 1000, "prompt_tokens": null, "error_rows": {"null_input": 3}}')
    lines = {line.quantity: line for line in compare(read_report_data(OutputFolder(str(copy))))}
    assert (lines["Rows"].predicted, lines["Rows"].actual, lines["Rows"].difference) == ("1,000", "1,000", "0%")
    assert (lines["Rows with null_input"].predicted, lines["Rows with null_input"].actual) == ("3", "0")
    assert lines["Prompt tokens"].predicted == lines["Time"].predicted == ""
    assert lines["Worker-hours"].actual == "1.50" and "Price (USD)" not in lines


@pytest.mark.slow
def test_of_ten_thousand_parts_only_the_records_are_read(tmp_path: Path) -> None:
    """The data of the parts are junk behind valid footers."""
    plan, folder = made_plan(20_000, 1), OutputFolder(str(tmp_path))
    folder.write(PLAN, plan.to_json().encode())
    stats = PartStats(Counter(stop=1), {"prompt_tokens": Counter({8: 1}), "latency_ms": Counter({200: 1})})

    part = encode_part(pa.table({"x": [7]}), plan.fingerprint.hexdigest, 10_000, Counts(ok=1), stats, {})
    for shard in plan.shards[10_000:]:
        ours = part.replace(b'"shard": 10000', f'"shard": {shard.index}'.encode())
        (tmp_path / plan.part_name(shard)).write_bytes(b"PAR1" + b"\xff" * 20 + ours[24:])
    started = time.monotonic()
    text = words(make_report(str(tmp_path)))
    assert "20,000 rows in = 10,000 ok 0 failed 10,000 not done 10,000 of 20,000 parts" in text
    assert "stop 10,000 100%" in text
    assert time.monotonic() - started < 30, "3 s where nothing else runs"
