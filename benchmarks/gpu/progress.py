"""Progress: what earlier calls into the same folder have finished, so that a call goes on where the last one ended.

No torch: the process that starts the stages uses it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NO_TIME = "no time was left"  # the error of a row that another call has to measure
SAME = (
    "commit",
    "card",
    "dry_run",
    "versions",
)  # of context.json: rows of two calls stand in one table only with these
PER_MACHINE = "compile"  # its result, Triton's cache, is lost with the machine


class Progress:
    """Knows the stages that are finished, and the rows of the others.

    A stage is finished when its process ended by itself and no row says that no time was left.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / "progress.json"
        self._finished: dict[str, str] = _read(self._path, {})  # stage -> the boot of the machine

    def is_finished(self, stage: str) -> bool:
        """Return whether nothing of a stage is left to do on this machine."""
        boot = self._finished.get(stage)
        return boot is not None and (stage != PER_MACHINE or boot == _boot())

    def finish(self, stage: str) -> None:
        """Record that a stage's process has ended by itself; it is finished unless some row had no time."""
        if all(is_final(row) for row in rows_of(self._out, stage)):
            self._finished[stage] = _boot()
            self._write()

    def restart(self, stage: str) -> None:
        """Forget a stage and its rows."""
        if self._finished.pop(stage, None) is not None:
            self._write()
        (self._out / f"{stage}.json").unlink(missing_ok=True)

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._finished, indent=1) + "\n")


def rows_of(out: Path, stage: str) -> list[Row]:
    """Return the rows of a stage, those without a figure included; none where it has not run."""
    rows: list[Row] = _read(out / f"{stage}.json", [])
    return rows


def is_final(row: Row) -> bool:
    """Return whether a row need not be measured again."""
    return NO_TIME not in (row.get("error"), row.get("raised")) and not row.get("stopped")


def check_same(out: Path, context: dict[str, Any]) -> str | None:
    """Return why rows of this call do not belong beside those that are in the folder; None where they do."""
    before = _read(out / "context.json", {})
    for name in SAME if before else ():
        if before.get(name) != context.get(name):
            return f"{out} has results with {name} {before.get(name)}, this is {context.get(name)}"
    return None


def bring(results: Path, out: Path) -> None:
    """Copy the results of an earlier call into the folder of this one, where that has none."""
    for path in sorted(results.glob("*.json")):
        if not (out / path.name).exists():
            shutil.copy(path, out / path.name)


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"
