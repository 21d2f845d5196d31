"""Whole jobs over data as people store them: JSON lines, compressed or not, in folders with keys, one line broken."""

import gzip
import json
from pathlib import Path

import pytest
from made_jobs import make_spec, read_output

from moray.batch.export.export import export
from moray.batch.output.verify import verify
from moray.batch.runtime.driver import run_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


def test_json_lines_in_folders_with_keys(tmp_path: Path) -> None:
    chats = [
        {"chat": [{"role": "user", "content": f"Add {i} and 3."}], "id": i}
        if i % 2
        else {"chat": [{"from": "human", "value": f"Add {i} and 3."}], "id": i}
        for i in range(40)
    ]
    lines = [json.dumps(chat) for chat in chats]
    lines[25] = lines[25][:-4]
    for lang, some in (("de", lines[:20]), ("en", lines[20:])):
        (tmp_path / f"in/lang={lang}").mkdir(parents=True)
        content = "\n".join(some).encode()
        path = tmp_path / f"in/lang={lang}/a.jsonl"
        if lang == "en":
            path.write_bytes(content)
        else:
            path.with_name("a.jsonl.gz").write_bytes(gzip.compress(content))
    spec = make_spec(tmp_path, input={"messages": "chat"}, sampling={"max_tokens": 3})
    result = run_job(spec)
    assert (result.exit_code, result.status.ok_rows, result.status.failed_rows) == (0, 39, 1)
    rows = read_output(tmp_path)
    assert [row["id"] for row in rows if row["error"] is None] == [i for i in range(40) if i != 25]
    assert [row["lang"] for row in rows] == ["de"] * 20 + ["en"] * 20
    assert result.status.errors == {"invalid_json": 1} and rows[25]["source_row"] == 5
    assert verify(str(tmp_path / "out")).closes

    lost = sorted((tmp_path / "out").glob("part-*.parquet"))[1]
    lost.unlink()
    assert run_job(spec).exit_code == 0, "a run continues in the middle of the files"
    assert read_output(tmp_path) == rows
    assert verify(str(tmp_path / "out")).closes
    assert export(str(tmp_path / "out"), str(tmp_path / "out.jsonl")).lines == 40
