"""Input that is bad, or goes bad while the job runs: wrong rows never, and what is committed stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_jobs import make_spec, read_output, write_input

from moray.batch.output.verify import verify
from moray.batch.runtime.driver import run_job
from moray.engine.errors import InputError

pytestmark = [pytest.mark.usefixtures("one_cpu"), pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]


class AfterPlan:
    """A display that does something the first time it is shown a job, which is planned then and not yet read."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act: Callable[[], Any] | None = act

    def note(self, message: str) -> None:
        pass

    def update(self, status: Any) -> None:
        if self._act is not None:
            self._act()
            self._act = None


@pytest.mark.slow
def test_monstrous_rows_are_error_rows_and_their_neighbours_are_answered(tmp_path: Path) -> None:
    prompts = [b"good", b"\xff\xfe not text", b"5 MB " * (1 << 20), b"long " * 3000, b"asks too much", b"good"]
    write_input(tmp_path / "in/a.parquet", {"prompt": _unchecked(prompts), "most": [4, 4, 4, 4, 5000, 4]})
    spec = make_spec(tmp_path, sampling={"columns": {"max_tokens": "most"}}, output={"keep": "none"})
    result = run_job(spec)
    assert (result.exit_code, result.status.ok_rows) == (0, 2)
    assert result.status.errors == {"too_long": 3, "bad_utf8": 1}
    rows = read_output(tmp_path)
    assert [row["error"] and row["error"]["code"] for row in rows] == [
        None, "bad_utf8", "too_long", "too_long", "too_long", None,
    ]  # fmt: skip
    assert "(prompt 9 + max_tokens 5,000); this model holds 2,048" in rows[4]["error"]["message"]
    assert rows[0]["generated_text"] == rows[5]["generated_text"]
    assert verify(str(tmp_path / "out")).closes


def _unchecked(values: list[bytes]) -> pa.Array:
    """Text of any bytes, as careless writers make it."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


@pytest.mark.slow
def test_parts_that_went_and_input_that_changed(tmp_path: Path) -> None:
    """Of a finished job: one part cut short, one deleted; and while they are done again, an input file goes and comes
    back as another."""
    for name in "abcd":
        write_input(tmp_path / f"in/{name}.parquet", {"prompt": [f"{name} {i}" for i in range(16)]})
    spec = make_spec(tmp_path)
    assert run_job(spec).exit_code == 0
    rows = read_output(tmp_path)
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    kept = {part: part.stat().st_mtime_ns for part in parts[:2]}
    parts[2].write_bytes(parts[2].read_bytes()[:-500])
    parts[3].unlink()
    found = verify(str(tmp_path / "out"))
    assert (found.closes, found.pending, found.parts) == (False, 32, 2)
    assert [problem.split(":")[0] for problem in found.problems] == [parts[2].name]

    source = tmp_path / "in/d.parquet"
    as_planned = source.read_bytes()
    with pytest.raises(InputError, match=r"^d\.parquet: is not there any more"):
        run_job(spec, display=AfterPlan(source.unlink))
    source.write_bytes(as_planned)
    other = {"prompt": [f"not the same {i}" for i in range(16)]}
    with pytest.raises(InputError, match=r"^d\.parquet: is not the file that was planned: it has been changed since"):
        run_job(spec, display=AfterPlan(lambda: write_input(source, other)))
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert not parts[3].exists()

    source.write_bytes(as_planned)
    status = run_job(spec).status
    assert (status.state, status.ok_rows) == ("SUCCEEDED", 64)
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert read_output(tmp_path) == rows and verify(str(tmp_path / "out")).closes
