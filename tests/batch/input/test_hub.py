"""Data sets on the hub as input, with the real client and a small server of our own."""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engineless_job import run_engineless
from made_jobs import make_spec, read_output, write_input

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.output.verify import verify
from moray.batch.shards import Slice
from moray.engine.errors import InputError, NodeError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "hub"
    write_input(folder / "data/lang=en/a.parquet", {"prompt": ["a"] * 30, "id": range(30)}, row_group_size=10)
    write_input(folder / "data/lang=de/b.parquet", {"prompt": ["b"] * 5, "id": range(5)})
    (folder / "lines").mkdir()
    (folder / "lines/c.jsonl").write_text("".join(json.dumps({"prompt": "c", "id": i}) + "\n" for i in range(200)))
    (folder / "README.md").write_text("x")
    command = [sys.executable, str(Path(__file__).parents[2] / "store_server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{int(server.stdout.readline())}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield folder
        server.terminate()


@pytest.mark.usefixtures("hub")
def test_paths_on_the_hub(tmp_path: Path) -> None:
    for path, revision, found in (
        ("data", "", ["lang=de/b.parquet", "lang=en/a.parquet"]),
        ("data/*/*.parquet", "@main", ["lang=de/b.parquet", "lang=en/a.parquet"]),
        ("data/lang=en/a.parquet", f"@{COMMIT}", ["a.parquet"]),
        ("lines/**", "@main", ["c.jsonl"]),
    ):
        files = read_input(make_spec(tmp_path, input={"path": f"hf://datasets/org/model{revision}/{path}"}))
        assert [file.path for file in files.files] == found
        assert files.root.startswith(f"datasets/org/model@{COMMIT}"), "all processes read one commit"


def test_a_job_over_a_data_set(hub: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, input={"path": "hf://datasets/org/model/data"})
    assert run_engineless(spec).plan.num_rows == 35
    assert [row["lang"] for row in read_output(tmp_path)] == ["de"] * 5 + ["en"] * 30
    assert verify(str(tmp_path / "out")).closes


@pytest.mark.usefixtures("hub")
def test_a_reader_in_another_process(tmp_path: Path) -> None:
    files = read_input(make_spec(tmp_path, input={"path": "hf://datasets/org/model/lines"}))
    filesystem = pickle.loads(pickle.dumps(files.filesystem))
    reader = ShardReader(filesystem, files.root, ["id"], files.output_schema, files.layout)
    (piece,) = files.place([Slice("c.jsonl", 150, 20)])
    assert reader.read(piece)["id"].to_pylist() == list(range(150, 170))


@pytest.mark.usefixtures("hub")
def test_the_hub_says_no(tmp_path: Path) -> None:
    for name, message in (
        ("gone/x", "no such data set or revision, or it is private: then set HF_TOKEN"),
        ("model@dev/x", "no such data set or revision"),
        ("gated/x", "is gated; accept its terms on its page and set HF_TOKEN"),
        ("model/nothing", "no such file or folder"),
        ("model/lines/*.parquet", "matches no files named"),
    ):
        with pytest.raises(InputError, match=message):
            read_input(make_spec(tmp_path, input={"path": f"hf://datasets/org/{name}"}))
    with pytest.raises(NodeError, match="cannot be read from the hub; check the network and HF_ENDPOINT"):
        read_input(make_spec(tmp_path, input={"path": "hf://datasets/org/failing/x"}))
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    with pytest.raises(UserError, match="must be a local path or start with"):
        read_input(make_spec(tmp_path, output={"path": "hf://datasets/org/model/out"}))
