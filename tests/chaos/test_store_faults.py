"""An object store that fails, between a job and a real S3 server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import make_spec
from moray_run import MorayRun
from pyarrow import fs
from store_proxy import StoreProxy, store_proxy
from undisturbed import answers

from moray.batch.output.folder import OutputFolder
from moray.batch.output.verify import verify
from moray.batch.spec import JobSpec
from moray.engine.params import SamplingParams

pytestmark = pytest.mark.slow

ROWS, PARTS = 96, 6
SAMPLING: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}
Start = Callable[[Path, JobSpec], MorayRun]


@pytest.fixture
def proxy(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """Between the jobs that are started from now on and the store."""
    with store_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


def make_job(folder: Path, bucket: str) -> JobSpec:
    prompts = pa.table({"prompt": [f"{i} sheep, {i % 7} lions" for i in range(ROWS)]})
    (folder / "in").mkdir()
    pq.write_table(prompts, folder / "in/a.parquet")
    store, _ = fs.FileSystem.from_uri(f"s3://{bucket}")
    store.create_dir(f"{bucket}/in")
    fs.copy_files(str(folder / "in"), f"{bucket}/in", destination_filesystem=store)
    paths = {"input": {"path": f"s3://{bucket}/in"}, "output": {"path": f"s3://{bucket}/out"}}
    return make_spec(folder, **paths, sampling=SAMPLING, engine={"max_num_seqs": 8})


def parts(bucket: str) -> list[str]:
    return OutputFolder(f"s3://{bucket}/out").names()


def check(folder: Path, bucket: str) -> None:
    out = OutputFolder(f"s3://{bucket}/out")
    assert verify(out.path).closes
    rows = pa.concat_tables([pq.read_table(out.open(part)) for part in out.names()]).to_pylist()
    found = {("a.parquet", row["source_row"]): row["generated_text"] for row in rows}
    assert len(rows) == ROWS and found == answers(folder, found, SamplingParams(**SAMPLING))


def test_a_store_that_is_slow_that_cuts_and_that_is_away_for_a_moment(
    tmp_path: Path, bucket: str, proxy: StoreProxy, start: Start
) -> None:
    """All of it in one run, when some parts are there. No short object ever has a part's name."""
    run = start(tmp_path, make_job(tmp_path, bucket))
    run.wait_for(lambda: parts(bucket))
    assert len(parts(bucket)) < PARTS
    proxy.cuts = 2
    run.wait_for(lambda: proxy.cut == 2)
    proxy.delay_s = 0.3
    proxy.is_away = True
    run.wait_for(lambda: proxy.refused >= 40)  # more than the client itself has patience for
    proxy.is_away = False
    code, output = run.end()
    proxy.delay_s = 0.0
    assert code == 0, output
    check(tmp_path, bucket)


def test_a_store_that_stays_away_fails_the_job_which_goes_on_later(
    tmp_path: Path, bucket: str, proxy: StoreProxy, start: Start
) -> None:
    spec = make_job(tmp_path, bucket)
    run = start(tmp_path, spec)
    run.wait_for(lambda: parts(bucket))
    assert len(parts(bucket)) < PARTS
    proxy.is_away = True
    code, output = run.end()
    assert code == 1 and " cannot be written: " in output and "Traceback" not in output, output
    assert "We are away" in output
    proxy.is_away = False
    there = parts(bucket)
    found = verify(f"s3://{bucket}/out")
    assert (found.problems, found.parts) == ([], len(there)) and 0 < len(there) < PARTS
    run = start(tmp_path, spec)
    code, output = run.end()
    assert code == 0, output
    check(tmp_path, bucket)
    status = OutputFolder(f"s3://{bucket}/out").read("_job/status.json")
    assert status is not None and json.loads(status)["state"] == "SUCCEEDED"
