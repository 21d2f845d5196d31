"""The upload of a submitted job, and its entry point, without a cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_jobs import make_spec

from moray.batch.spec import load_spec
from moray.engine.errors import SpecError
from moray.jobs.clusters.job_package import PACKAGE, START, check_paths, stage


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_what_was_sent_runs_and_not_what_is_installed(tmp_path: Path) -> None:
    stage(make_spec(tmp_path), tmp_path, with_code=True)
    for name in ("kernels", "engine", "batch", "jobs"):
        sent = files(tmp_path / "moray" / name)
        assert sent == {path for path in files(PACKAGE / name) if "__pycache__" not in path.parts}
    code = (
        "import moray.jobs.cli; from moray import batch, engine, kernels, jobs; "
        "print(*(m.__path__[0] for m in (jobs, batch, engine, kernels)))"
    )
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert where.stdout.split() == [str(tmp_path / "moray" / name) for name in ("jobs", "batch", "engine", "kernels")]
    version = subprocess.run([sys.executable, START, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, "moray 0.1.0\n")


def test_a_cluster_without_what_moray_needs(tmp_path: Path) -> None:
    stage(make_spec(tmp_path), tmp_path, with_code=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", START]
    bare = [sys.executable, "-I", "-S", START, "run", "job.yaml"]
    result = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"The cluster cannot run this job:\n  its Python ({sys.executable}) has no moray, torch, transformers, "
        "safetensors, llguidance, pyarrow, pydantic, yaml, typer, rich; use an image with what moray needs\n"
    )


def test_a_schema_travels_in_the_spec(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    sampling = {"structured": {"json_schema": str(tmp_path / "schema.json")}}
    spec = make_spec(tmp_path, sampling=sampling, output={"parse": True})
    (tmp_path / "schema.json").unlink()
    (tmp_path / "sent").mkdir()
    stage(spec, tmp_path / "sent", with_code=False)
    assert load_spec(tmp_path / "sent/job.yaml") == spec


def test_paths_of_this_machine_are_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, model={"path": "hf://a/b"}, input={"path": ["s3://a/b", "~/in"]}, output={"path": "out"})
    with pytest.raises(SpecError) as wrong:
        check_paths(spec)
    assert [problem.path for problem in wrong.value.problems] == ["input.path", "output.path"]
    assert str(wrong.value).startswith("input.path: '~/in' is relative to a folder of this machine; give an absolute")
    check_paths(make_spec(tmp_path))
