"""The ties between an output folder and its job."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_jobs import make_spec

from moray.batch.fingerprint import Fingerprint
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder, check_visible, claim_folder
from moray.batch.shards import Plan, Shard, Slice
from moray.batch.spec import load_spec
from moray.engine.errors import NodeError, OutputError

PLAN = Plan(
    Fingerprint({"a.parquet": "1 byte"}, {"sampling.seed": 0, "model.dtype": "auto"}),
    (Shard(0, (Slice("a.parquet", 0, 3),)), Shard(1, (Slice("a.parquet", 3, 2),))),
)


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    """Return a folder that PLAN has claimed, with a part in it."""
    made = OutputFolder(str(tmp_path / "out"))
    claim_folder(made, make_spec(tmp_path), PLAN)
    made.write(PLAN.part_name(PLAN.shards[0]), b"a part")
    return made


def refusal(folder: OutputFolder, plan: Plan) -> str:
    with pytest.raises(OutputError) as error:
        check_folder(folder, plan)
    return str(error.value)


def test_an_empty_folder_is_anyones(tmp_path: Path) -> None:
    check_folder(OutputFolder(str(tmp_path)), PLAN)
    check_folder(OutputFolder(str(tmp_path / "not there")), PLAN)


def test_a_folder_keeps_its_job_with_spec_and_plan(tmp_path: Path, folder: OutputFolder) -> None:
    check_folder(folder, PLAN)
    assert load_spec(tmp_path / "out/_job/spec.yaml") == make_spec(tmp_path)
    plan = json.loads((tmp_path / "out/_job/plan.json").read_text())
    assert (plan["fingerprint"], plan["num_rows"], plan["num_shards"]) == (PLAN.fingerprint.hexdigest, 5, 2)
    assert Plan.from_json(json.dumps(plan)) == PLAN


def test_another_job_is_refused_with_the_differences(folder: OutputFolder) -> None:
    other = Fingerprint({"a.parquet": "1 byte", "b.parquet": "9"}, {"sampling.seed": 7, "model.dtype": "auto"})
    assert refusal(folder, replace(PLAN, fingerprint=other)).splitlines()[1:] == [
        "  sampling.seed: 0 -> 7",
        "  new input file b.parquet",
    ]


def test_a_job_that_wrote_no_part_has_no_claim(tmp_path: Path, folder: OutputFolder) -> None:
    """The job failed before its first part, and then its spec was corrected."""
    (tmp_path / "out" / PLAN.part_name(PLAN.shards[0])).unlink()
    mended = replace(
        PLAN, fingerprint=Fingerprint({"a.parquet": "1 byte"}, {"sampling.seed": 7, "model.dtype": "auto"})
    )
    check_folder(folder, mended)
    claim_folder(folder, make_spec(tmp_path, sampling={"seed": 7}), mended)
    assert load_spec(tmp_path / "out/_job/spec.yaml").sampling.seed == 7
    folder.write(mended.part_name(mended.shards[0]), b"a part")
    check_folder(folder, mended)
    assert "sampling.seed: 7 -> 0" in refusal(folder, PLAN)


def test_many_differences_are_cut(folder: OutputFolder) -> None:
    other = Fingerprint({f"{n}.parquet": "" for n in range(50)}, PLAN.fingerprint.others)
    assert refusal(folder, replace(PLAN, fingerprint=other)).splitlines()[-1] == "  ... and 31 more"


def test_other_shards_of_the_same_input_are_refused(folder: OutputFolder) -> None:
    cut = replace(PLAN, shards=(Shard(0, (Slice("a.parquet", 0, 5),)),))
    assert "the shards: 2 of another version of moray -> 1" in refusal(folder, cut)


def test_a_plan_that_cannot_be_read_is_refused(folder: OutputFolder) -> None:
    folder.write("_job/plan.json", b"{")
    assert "_job/plan.json cannot be read" in refusal(folder, PLAN)


@pytest.mark.parametrize("name", ["part-00000000-000000.parquet", "data.parquet"])
def test_parquet_files_of_others_are_refused(tmp_path: Path, name: str) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write(name, b"")
    assert name in refusal(folder, PLAN)


def test_where_the_drivers_folder_is_not_seen(tmp_path: Path, folder: OutputFolder) -> None:
    check_visible(folder, PLAN.fingerprint.hexdigest)
    for elsewhere, fingerprint in ((folder, "0" * 64), (OutputFolder(str(tmp_path)), PLAN.fingerprint.hexdigest)):
        with pytest.raises(OutputError, match="is not the folder that the driver sees"):
            check_visible(elsewhere, fingerprint)


def test_a_folder_that_is_away_for_a_moment_is_seen(
    tmp_path: Path, folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away, naps = tmp_path / "out", tmp_path / "away", []
    out.rename(away)
    out.write_bytes(b"")
    monkeypatch.setattr(time, "sleep", naps.append)
    with pytest.raises(NodeError, match="is a file"):  # it was seen by the driver
        check_visible(folder, PLAN.fingerprint.hexdigest)
    assert len(naps) == 4

    def come_back(seconds: float) -> None:
        out.unlink()
        away.rename(out)

    monkeypatch.setattr(time, "sleep", come_back)
    check_visible(folder, PLAN.fingerprint.hexdigest)
