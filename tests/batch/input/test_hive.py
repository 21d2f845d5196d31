"""Columns in the names of folders, as Hive and Spark write them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY, make_spec, write_input

from moray.batch.fingerprint import compute_fingerprint
from moray.batch.input import InputFiles, read_input
from moray.batch.input.hive import read_keys
from moray.batch.input.reader import ShardReader
from moray.batch.plan.planner import plan_job
from moray.batch.shards import Shard, Slice
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.engine.errors import InputError
from moray.engine.text.tokenizer import Tokenizer


def refusal(folder: Path, **source: Any) -> str:
    with pytest.raises(InputError) as error:
        read_input(make_spec(folder, input=source))
    return str(error.value)


def rows_of(folder: Path, files: InputFiles, *columns: str) -> list[dict[str, Any]]:
    reader = ShardReader(files.filesystem, files.root, columns, files.output_schema, files.layout)
    return [row for file in files.files for row in reader.read(Slice(file.path, 0, file.num_rows)).to_pylist()]


@pytest.mark.parametrize("is_parquet", [True, False])
def test_keys_are_columns_of_text(tmp_path: Path, is_parquet: bool) -> None:
    for lang, month in (("en", "01"), ("de%20AT", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"in/lang={lang}/month={month}"
        write_input(folder / "a.parquet", {"prompt": [lang]})
        if not is_parquet:
            (folder / "a.parquet").unlink()
            (folder / "a.jsonl").write_text(json.dumps({"prompt": lang}))
    files = read_input(make_spec(tmp_path))
    assert (files.kept_columns, files.hive_keys) == (("prompt", "lang", "month"), ("lang", "month"))
    assert files.output_schema.field("month").type == pa.string() and not files.warnings
    assert rows_of(tmp_path, files, "lang", "prompt", "month") == [
        {"lang": "de AT", "prompt": "de%20AT", "month": None},
        {"lang": "en", "prompt": "en", "month": "01"},
    ]
    assert rows_of(tmp_path, files, "month") == [{"month": None}, {"month": "01"}]
    below = read_input(make_spec(tmp_path, input={"path": str(tmp_path / "in/lang=en")}))
    assert below.kept_columns == ("prompt", "month"), "keys above input.path are not columns"
    none = read_input(make_spec(tmp_path, input={"hive": False}))
    assert (none.kept_columns, none.hive_keys) == (("prompt",), ())


def test_files_that_differ_in_their_keys(tmp_path: Path) -> None:
    write_input(tmp_path / "in/lang=en/a.parquet", {"prompt": ["a"]})
    write_input(tmp_path / "in/b.parquet", {"prompt": ["a"]})
    off = "set input.hive: false to read no columns from the names of folders"
    both = "lang=en/a.parquet has lang, b.parquet has none"
    message = f"folders name columns for some files alone: {both}. Name paths that are alike, or {off}"
    assert refusal(tmp_path) == refusal(tmp_path, hive=True) == message
    assert read_input(make_spec(tmp_path, input={"hive": False})).num_rows == 2
    (tmp_path / "in/lang=en/a.parquet").unlink()
    assert refusal(tmp_path, hive=True).startswith("input.hive is true, but no folder below input.path is named")
    write_input(tmp_path / "in/lang=en/a.parquet", {"prompt": ["a"], "lang": ["fr"]})
    (tmp_path / "in/b.parquet").unlink()
    assert refusal(tmp_path) == f"lang=en/a.parquet: column 'lang' is in the file and in the name of a folder; {off}"
    write_input(tmp_path / "in/lang=en/lang=de/a.parquet", {"prompt": ["a"]})
    assert "its folders name 'lang' twice" in refusal(tmp_path)


def test_what_a_path_tells() -> None:
    assert read_keys("a=1/b=x=y/=c/d/e=/f=g.parquet") == {"a": "1", "b": "x=y", "e": ""}
    assert read_keys("at=12%3A30/x.parquet") == {"at": "12:30"}


def test_keys_in_templates_and_sampling(tmp_path: Path) -> None:
    for heat, stops in (("0.5", "true"), ("warm", "false")):
        write_input(tmp_path / f"in/heat={heat}/n=2/stops={stops}/a.parquet", {"text": ["CAT"]})
    columns = {"temperature": "heat", "n": "n", "ignore_eos": "stops"}
    spec = make_spec(
        tmp_path, template={"prompt": "{heat} {text}"}, sampling={"columns": columns}, output={"keep": ["n"]}
    )
    files = read_input(spec)
    assert files.hive_keys == ("heat", "n", "stops")
    reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema, files.layout)
    tokenizer = Tokenizer(TINY)
    stage = Prepare(spec, reader, Prompts(spec, tokenizer, 500), pa.schema([("n", pa.string())]), 100)
    slices = tuple(Slice(file.path, 0, 1) for file in files.files)
    good, bad = stage.block(Shard(0, slices), "part").to_pylist()
    assert good["prompt_token_ids"] == tokenizer.encode_prompt("0.5 CAT") and good["input.n"] == "2"
    params = pickle.loads(good["params"])
    assert (params.temperature, params.n, params.ignore_eos) == (0.5, 2, True)
    assert bad["error"]["code"] == "bad_params" and "is 'warm'" in bad["error"]["message"]
    listed = make_spec(tmp_path, template={"prompt": "{text}"}, sampling={"columns": {"stop": "heat"}})
    with pytest.raises(InputError, match=r"column 'heat' \(sampling.columns.stop\) must be a list of texts, is string"):
        read_input(listed)


def test_only_keys_that_are_read_are_in_the_fingerprint(tmp_path: Path) -> None:
    write_input(tmp_path / "in/lang=en/a.parquet", {"prompt": ["a"]})
    assert plan_job(make_spec(tmp_path)).plan.fingerprint.others["input.hive"] == ["lang"]
    for sections in ({"output": {"keep": "none"}}, {"input": {"hive": False}}):
        spec = make_spec(tmp_path, **sections)
        assert "input.hive" not in plan_job(spec).plan.fingerprint.others
    spec = make_spec(tmp_path)
    assert compute_fingerprint(spec, {}, {}) == compute_fingerprint(spec, {}, {}, hive_keys=())


def test_a_part_has_the_key(tmp_path: Path) -> None:
    """Compare the key with what pyarrow reads."""
    write_input(tmp_path / "in/lang=en/a.parquet", {"prompt": ["a"]})
    theirs = pq.read_table(tmp_path / "in", partitioning="hive")["lang"].cast(pa.string())
    assert [row["lang"] for row in rows_of(tmp_path, read_input(make_spec(tmp_path)), "lang")] == theirs.to_pylist()
