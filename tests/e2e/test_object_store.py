"""A job whose input and output lie in an object store."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from made_jobs import make_spec
from pyarrow import fs

from batch.output.folder import OutputFolder
from batch.verify import verify


def test_from_s3_to_s3(tmp_path: Path, bucket: str, start: Any) -> None:
    store, _ = fs.FileSystem.from_uri(f"s3://{bucket}")
    for name in ("a", "deep/b"):
        pq.write_table(
            pa.table({"prompt": [f"{name} {i}" for i in range(20)]}), f"{bucket}/in/{name}.parquet", filesystem=store
        )
    spec = make_spec(tmp_path, input={"path": f"s3://{bucket}/in"}, output={"path": f"s3://{bucket}/out"})
    code, output = start(spec).end()
    assert code == 0, output
    folder = OutputFolder(f"s3://{bucket}/out")
    parts = folder.names()
    assert len(parts) == 3 and all(part.endswith(".parquet") for part in parts)
    rows = pa.concat_tables([pq.read_table(folder.open(part)) for part in parts])
    assert sorted(zip(rows["source_file"].to_pylist(), rows["source_row"].to_pylist(), strict=True)) == [
        (f"{name}.parquet", i) for name in ("a", "deep/b") for i in range(20)
    ]
    assert set(rows["prompt"].to_pylist()) == {f"{name} {i}" for name in ("a", "deep/b") for i in range(20)}
    assert verify(f"s3://{bucket}/out").closes
    assert folder.read("_job/status.json") is not None and folder.read("_job/plan.json") is not None
    assert folder.read("_job/forecast.json") is not None
    code, output = start(spec).end()
    assert code == 0 and "All 40 rows are done already: nothing to do." in output
