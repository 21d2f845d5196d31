"""A job whose input and output lie in an object store."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY, make_spec, read_output, write_input

from moray.batch.output.folder import OutputFolder
from moray.batch.output.verify import verify


def test_from_s3_to_s3(tmp_path: Path, bucket: str, s3: Any, start: Any) -> None:
    """Run a job over JSON lines in folders with keys; one line is broken."""
    langs = ("de", "en")
    for lang in langs:
        lines = [json.dumps({"prompt": f"{lang} {i}", "id": i}) for i in range(20)]
        lines[7] = lines[7] if lang == "de" else "{"
        s3.put_object(Bucket=bucket, Key=f"in/lang={lang}/a.jsonl.gz", Body=gzip.compress("\n".join(lines).encode()))
    spec = make_spec(tmp_path, input={"path": f"s3://{bucket}/in"}, output={"path": f"s3://{bucket}/out"})
    code, output = start(spec).end()
    assert code == 0, output
    folder = OutputFolder(f"s3://{bucket}/out")
    parts = folder.names()
    assert len(parts) > 1 and all(part.endswith(".parquet") for part in parts)
    rows = pa.concat_tables([pq.read_table(folder.open(part)) for part in parts]).to_pylist()
    expected = [(lang, i) for lang in langs for i in range(20)]
    assert sorted((row["lang"], row["source_row"]) for row in rows) == expected
    (bad,) = (row for row in rows if row["error"] is not None)
    assert (bad["lang"], bad["source_row"], bad["error"]["code"]) == ("en", 7, "invalid_json")
    assert {row["prompt"] for row in rows} - {None} == {f"{lang} {i}" for lang, i in expected} - {"en 7"}
    assert verify(f"s3://{bucket}/out").closes
    assert folder.read("_job/status.json") is not None and folder.read("_job/plan.json") is not None
    assert folder.read("_job/forecast.json") is not None
    code, output = start(spec).end()
    assert code == 0 and "All 40 rows are done already: nothing to do." in output


# The first process of each actor cannot reach the store: its client tries for real, at a port where nobody listens.
SITE = """
import importlib.abc, importlib.util, os, sys
from pathlib import Path

class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "moray.engine.checkpoint.model_source":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_break(module):
            execute(module)
            store = module._ObjectStore.__init__

            def broken(self, *args):
                import ray
                actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
                if actor is not None and not (tried := Path(os.environ["TRIED"], actor)).exists():
                    tried.touch()
                    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
                store(self, *args)

            module._ObjectStore.__init__ = broken

        spec.loader.exec_module = execute_and_break
        return spec

sys.meta_path.insert(0, Breaker())
"""


@pytest.mark.slow
def test_a_store_that_is_away_while_the_stages_start(
    tmp_path: Path, bucket: str, s3: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    (tmp_path / "tried").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    monkeypatch.setenv("TRIED", str(tmp_path / "tried"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in TINY.iterdir():
        s3.upload_file(str(path), bucket, f"tiny/{path.name}")
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"max({i}, 12) =" for i in range(20)]})
    run = start(make_spec(tmp_path, model={"path": f"s3://{bucket}/tiny"}))
    code, output = run.end()
    assert code == 0, output
    assert [row["error"] for row in read_output(tmp_path)] == [None] * 20
    failed = {event["stage"]: event["reason"] for event in run.events() if event["event"] == "start_failed"}
    assert failed.keys() == {"prepare", "worker", "commit"}
    assert all("it cannot be reached; check the network and the endpoint" in reason for reason in failed.values())
