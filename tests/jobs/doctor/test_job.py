"""Checks of one job: free space for its output, stores that accept a file, credentials, space for a download."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from doctor_run import ask
from made_jobs import TINY, make_spec, write_input
from small_disk import small_disk

from moray.batch.spec import JobSpec
from moray.jobs.doctor import job, model
from moray.jobs.doctor.finding import Finding, Subject, Verdict

Check = Any


def find(check: Check, spec: JobSpec) -> Finding:
    (found,) = check(Subject(spec, spec.model.path))
    assert isinstance(found, Finding)
    return found


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    write_input(tmp_path / "in/1.parquet", {"prompt": ["a question"] * 1000})
    return make_spec(tmp_path)


def test_an_output_folder_that_is_full(spec: JobSpec, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        there = spec.model_copy(update={"output": spec.output.model_copy(update={"path": str(disk.path / "out")})})
        found = find(job.output, there)
        assert found.verdict is Verdict.WARNING and "it is memory" in found.value  # but there is room
        long = {"sampling": spec.sampling.model_copy(update={"max_tokens": 10_000})}
        found = find(job.output, there.model_copy(update=long))
        assert found.verdict is Verdict.WARNING and "the job writes about 54.1 MB at most" in found.value
        (disk.path / "filler").write_bytes(bytes(30 << 20))
        found = find(job.output, there)
        assert found.verdict is Verdict.PROBLEM and "make room" in (found.fix or "")
        disk.remount("ro")
        found = find(job.output, there)
        assert found.verdict is Verdict.PROBLEM and "cannot be published there: Read-only file system" in found.value


def test_an_output_folder_that_is_there(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = find(job.output, spec)
    assert found.verdict is Verdict.OK and found.value.startswith(f"{tmp_path / 'out'}: ")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store(spec: JobSpec, s3: Any, bucket: str) -> None:
    there = spec.model_copy(update={"output": spec.output.model_copy(update={"path": f"s3://{bucket}/out"})})
    assert "a file was written and removed" in find(job.output, there).value
    left = s3.list_objects_v2(Bucket=bucket)["Contents"]  # as pyarrow marks a folder whose last file is gone
    assert [(one["Key"], one["Size"]) for one in left] == [("out/_job/", 0)]
    found = find(job.credentials, there)
    assert found.verdict is Verdict.OK and found.value.startswith("s3://: AWS_ACCESS_KEY_ID")
    gone = spec.model_copy(update={"output": spec.output.model_copy(update={"path": f"s3://{bucket}-gone/out"})})
    found = find(job.output, gone)
    assert found.verdict is Verdict.PROBLEM and f"s3://{bucket}-gone/out" in found.value
    assert found.fix is not None and f"aws s3 ls s3://{bucket}-gone/out/ here" in found.fix and "may write" in found.fix


@pytest.mark.slow
def test_a_store_that_does_not_answer(spec: JobSpec, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(spec.to_yaml())
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    answer = ask(str(path), "--set", "output.path=s3://bucket/out", **nowhere)
    assert answer.code == 1 and answer.one("Job", "output")["verdict"] == "problem"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "fix"),
    [
        (
            "hf://some/model@v1",
            "open http://127.0.0.1:1/some/model in a browser: check the name there, accept its terms ",
        ),
        ("s3://no-such-bucket-here/m", "try aws s3 ls s3://no-such-bucket-here/m/ here: it must list the files; set "),
        ("/no/such/folder", "name a folder that exists and may be read"),
    ],
)
def test_a_model_that_cannot_be_reached(path: str, fix: str) -> None:
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    found = ask("--model", path, **nowhere, HF_ENDPOINT="http://127.0.0.1:1").one("Job", "model")
    assert found["verdict"] == "problem" and found["fix"].startswith(fix)


def test_a_model_that_is_not_whole(spec: JobSpec, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    there = spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(tmp_path)})})
    found = find(model.checkpoint, there)
    assert found.verdict is Verdict.PROBLEM and "model.safetensors is not a whole safetensors file" in found.value
    assert found.fix is not None and found.fix.startswith("name a checkpoint that moray runs, whole and as it was ")


def test_credentials_that_are_not_there(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    there = spec.model_copy(update={"output": spec.output.model_copy(update={"path": "gs://bucket/out"})})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    found = find(job.credentials, there)
    assert found.verdict is Verdict.PROBLEM and "/no/such/key.json" in found.value
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert find(job.credentials, there).value.startswith("gs://: none here")


def test_a_download_without_room(
    spec: JobSpec, s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in TINY.iterdir():
        if file.is_file():
            s3.upload_file(str(file), bucket, f"tiny/{file.name}")
    there = spec.model_copy(update={"model": spec.model.model_copy(update={"path": f"s3://{bucket}/tiny"})})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find(model.download, there).verdict is Verdict.OK
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
        found = find(model.download, there)
        assert found.verdict is Verdict.WARNING and "too little unless the model is there already" in found.value
    assert find(model.checkpoint, there).verdict is Verdict.OK


def test_a_folder_of_another_job(spec: JobSpec, tmp_path: Path) -> None:
    from moray.batch.output.folder import OutputFolder
    from moray.batch.output.job_folder import claim_folder
    from moray.batch.plan.planner import plan_job

    planned = plan_job(spec)
    folder = OutputFolder(spec.output.path)
    claim_folder(folder, spec, planned.plan)
    folder.write(planned.plan.part_name(planned.plan.shards[0]), b"a part")
    assert find(job.plan, spec).verdict is Verdict.OK
    write_input(tmp_path / "in/2.parquet", pa.table({"prompt": ["more"]}))
    found = find(job.plan, spec)
    assert found.verdict is Verdict.PROBLEM and "holds the output of another job" in found.value
