"""Paths are used as written, and globs mean the same, on a disk, with file://, on S3 and on Google's storage."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import make_spec

from moray.batch.input import read_input
from moray.batch.location import locate
from moray.batch.output.folder import OutputFolder
from moray.engine.errors import UserError

TABLE = pa.table({"prompt": ["a"]})
STORES = ("disk", "file", "s3", "gs")
NAMES = (
    "plain/a.parquet",
    "with space/b c.parquet",
    "ümlaut/Größe.parquet",
    "hash#1/a#b.parquet",
    "at=12%3A30/a%20b.parquet",
    "question?/a?b=c&d.parquet",
    "[ab]/x[1].parquet",
    "{a,b}/y{1}.parquet",
    "a+b&c=d/z;1.parquet",
)


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("google")
    command = [sys.executable, str(Path(__file__).parents[2] / "store_server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}", folder
        server.terminate()


@pytest.fixture(params=STORES)
def root(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder that holds the files of NAMES, and nothing else."""
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer)
    if request.param == "s3":
        s3, bucket = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
        for name in NAMES:
            s3.put_object(Bucket=bucket, Key=f"in/{name}", Body=buffer.getvalue())
        return f"s3://{bucket}/in"
    folder = tmp_path / "in"
    if request.param == "gs":
        endpoint, store = request.getfixturevalue("google")
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
        folder = store / "in"
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return {"disk": str(folder), "file": f"file://{folder}", "gs": "gs://anonymous@b/in"}[request.param]


def files(root: str, path: str) -> list[str]:
    """Paths below the root of what input.path finds."""
    found = read_input(make_spec(Path("/nowhere"), input={"path": f"{root}/{path}".rstrip("/"), "hive": False}))
    _, inner = locate(root)
    return sorted(os.path.relpath(found.full_path(file.path), inner) for file in found.files)


def test_every_name_is_found_and_read_by_itself(root: str) -> None:
    assert files(root, "") == sorted(NAMES)
    for name in NAMES:
        assert files(root, name) == [name]
        assert files(root, name.split("/")[0]) == [name]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("plain/?.parquet", ["plain/a.parquet"]),
        ("plain/[a-c].parquet", ["plain/a.parquet"]),
        ("plain/[!a].parquet", None),
        ("with*/*", ["with space/b c.parquet"]),
        ("?mlaut/Gr??e.parquet", ["ümlaut/Größe.parquet"]),
        ("hash#?/*#*", ["hash#1/a#b.parquet"]),
        ("at=*/a%20?.parquet", ["at=12%3A30/a%20b.parquet"]),
        ("at=12:30/*", None),  # not what Spark wrote: nothing is decoded
        ("question?/*", ["question?/a?b=c&d.parquet"]),
        ("[[]ab]/x[[]1].parquet", ["[ab]/x[1].parquet"]),
        ("[ab]/*.parquet", None),  # the letter a or b
        ("{a,b}/*", ["{a,b}/y{1}.parquet"]),  # braces are letters
        ("**/[xy]*", ["[ab]/x[1].parquet", "{a,b}/y{1}.parquet"]),
        ("*/z;?.parquet", ["a+b&c=d/z;1.parquet"]),
    ],
)
def test_globs(root: str, glob: str, found: list[str] | None) -> None:
    if found is None:
        with pytest.raises(UserError, match=r"matches no files named"):
            files(root, glob)
    else:
        assert files(root, glob) == found


def test_output_folders_are_called_what_they_are(root: str) -> None:
    for name in ("with space", "ümlaut", "hash#1", "12%3A30", "a?b=c", "[ab]", "a+b"):
        folder = OutputFolder(f"{root}/out/{name}")
        folder.publish("part.parquet", b"x")
        folder.write("_job/plan.json", b"{}")
        assert (folder.names(), folder.names("_job")) == (["part.parquet"], ["plan.json"])
        filesystem, inner = locate(root)
        with filesystem.open_input_file(f"{inner}/out/{name}/part.parquet") as file:
            assert file.read() == b"x"


@pytest.mark.parametrize("address", ["file://data/in", "file:///", "http://x/y", "s4://b/k", "s3:///k"])
def test_addresses_that_are_none(address: str) -> None:
    if address == "file:///":
        assert locate(address)[1] == "/"
        return
    with pytest.raises(UserError, match="must "):
        locate(address)
