"""Measure what a job costs without its model: many rows through a worker that takes no time; many shards resumed.

    python benchmarks/bench_scale.py [--rows 1000000] [--shards 10000]

The rows (short prompts in files of 50,000) go through `moray run`'s own driver, with prepare, the worker's engine
thread and commit as they are; only the engine is noop_worker.py's. The time is that from the first commit to the last,
without the start of Ray. For comparison the same files go through plain Ray Data, read_parquet -> map_batches ->
write_parquet, which tokenizes nothing and guarantees nothing. Memory is resident memory, summed over the processes of a
kind, when a quarter of the rows is done, and its peak after that. Resume: a job of many small shards, 1% of whose parts
were deleted.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import report
from rich.console import Console

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples/tiny-phimoe"
FILE_ROWS = 50_000
INTERRUPTED = 130  # exit code of an interrupted job
console = Console(highlight=False)


ACTORS = {
    "prepare": "PrepareActor",
    "worker": "NoopWorker",
    "commit": "CommitActor",
    "monitor": "MonitorActor",
}  # kind of process -> the class in its title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000, help="of the job that is resumed; 0 = none")
    parser.add_argument("--peers", choices=["all", "none"], default="all")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for Ray's workers
    result: dict[str, Any] = {"rows": args.rows}
    with tempfile.TemporaryDirectory(prefix="moray-bench-scale-") as name:
        folder = Path(name)
        write_rows(folder / "in", args.rows)
        result["plan_s"], _ = clock(lambda: plan(folder))
        result["job"] = run(make_spec(folder, "in", "out"), args.rows)
        result["status_s"], _ = clock(lambda: read_status(folder / "out"))
        show("moray", result["job"])
        if args.peers != "none":
            result["plain Ray Data"] = plain(folder, args.rows)
            show("plain Ray Data", result["plain Ray Data"])
        if args.shards:
            result["resume"] = resume(folder, args.shards)
            console.print(f"resume of {args.shards:,} shards: {result['resume']}")
    console.print(f"plan {result['plan_s']:.2f} s, status {1000 * result['status_s']:.1f} ms")
    saved = report.save("bench_scale", "cpu", report.context("ray", "pyarrow") | result)
    console.print(f"Saved {saved.relative_to(report.ROOT)}")


def write_rows(folder: Path, rows: int) -> None:
    folder.mkdir()
    for first in range(0, rows, FILE_ROWS):
        ids = range(first, min(rows, first + FILE_ROWS))
        table = pa.table({"prompt": [f"The sum of {i} and {i % 97} is" for i in ids], "id": list(ids)})
        pq.write_table(table, folder / f"{first:09d}.parquet", row_group_size=10_000)


def make_spec(folder: Path, source: str, output: str, **sampling: Any) -> Any:
    from moray.batch.spec import JobSpec

    return JobSpec.model_validate(
        {
            "name": "scale",
            "model": {"path": str(MODEL)},
            "input": {"path": str(folder / source), "prompt": "prompt"},
            "sampling": {"max_tokens": 16} | sampling,
            "output": {"path": str(folder / output)},
        }
    )


def plan(folder: Path) -> None:
    from moray.batch.plan.planner import plan_job

    plan_job(make_spec(folder, "in", "out"))


def read_status(output: Path) -> Any:
    return json.loads((output / "_job/status.json").read_text())


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return round(time.perf_counter() - started, 4), result


def run(spec: Any, rows: int, num_done: int = 0, stop_after: int | None = None) -> dict[str, Any]:
    """Run the job in this process with `moray run`'s driver; return its figures.

    num_done:   rows that are done already
    stop_after: shards after which the job is interrupted, as with Ctrl-C; None = it runs to its end
    """
    from noop_worker import NoopWorker

    import moray.batch.runtime.pipeline
    from moray.batch.runtime.driver import run_job

    vars(moray.batch.runtime.pipeline)["WorkerActor"] = NoopWorker
    memory = Memory()
    watcher = Watcher(memory, rows, num_done, stop_after)
    started = time.perf_counter()
    with memory:
        result = run_job(spec, display=watcher)
    assert result.exit_code == (0 if stop_after is None else INTERRUPTED), result.status
    first, last = watcher.commits[0], watcher.commits[-1]
    return {
        "wall_s": round(time.perf_counter() - started, 2),
        "first_commit_s": round(first[0] - started, 2),
        "rows_per_s": round((last[1] - first[1]) / max(1e-9, last[0] - first[0])),
        "ms_per_shard": round(1000 * (last[0] - first[0]) / max(1, last[2] - first[2]), 1),
        "rows_done": last[1],
        "memory_mb": memory.growth(),
        "peak_mb": memory.peaks(),
    }


class Watcher:
    """Records, as the job's display, when rows are committed, and lets Memory know when a quarter of them is.

    Interrupts the job, once, when `stop_after` more shards than at first are committed.
    """

    def __init__(self, memory: "Memory", rows: int, num_done: int, stop_after: int | None) -> None:
        self.commits: list[tuple[float, int, int]] = []  # time, rows, shards
        self._stop_after = stop_after
        self._memory = memory
        self._rows = rows
        self._num_done = num_done

    def note(self, message: str) -> None:
        console.print(f"  {message}", markup=False)

    def update(self, status: Any) -> None:
        done = status.ok_rows + status.failed_rows
        if done > (self.commits[-1][1] if self.commits else self._num_done):
            self.commits.append((time.perf_counter(), done, status.committed_shards))
            if self._stop_after is not None and self.commits[-1][2] - self.commits[0][2] >= self._stop_after:
                self._stop_after = None
                os.kill(os.getpid(), signal.SIGINT)
        self._memory.has_settled = done >= self._rows / 4


class Memory:
    """Samples the resident memory of this process and of its children, by kind, once a second."""

    def __init__(self) -> None:
        self.has_settled = False
        self._early: dict[str, float] = {}
        self._late: defaultdict[str, float] = defaultdict(float)
        self._peaks: defaultdict[str, float] = defaultdict(float)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def growth(self) -> dict[str, list[float]]:
        """Return, by kind of process, the MB when a quarter of the rows was done, and the peak after that."""
        return {kind: [round(self._early[kind]), round(self._late[kind])] for kind in sorted(self._early)}

    def peaks(self) -> dict[str, int]:
        """Return the peak in MB by kind of process."""
        return {kind: round(self._peaks[kind]) for kind in sorted(self._peaks)}

    def _watch(self) -> None:
        while not self._is_over.wait(1.0):
            now = _resident()
            for kind, size in now.items():
                self._peaks[kind] = max(self._peaks[kind], size)
            if not self.has_settled:
                self._early = now
            for kind, size in now.items() if self.has_settled else ():
                self._late[kind] = max(self._late[kind], size)


def _resident() -> dict[str, float]:
    """Return the resident memory in MB by kind of process."""
    found: defaultdict[str, float] = defaultdict(float)
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().split(b"\0")[0].decode()
            size = int((path / "statm").read_text().split()[1]) * 4096 / 1e6
        except (OSError, ValueError):
            continue
        if path.name == str(os.getpid()):
            found["driver"] += size
        for kind, name in ACTORS.items():
            if title.startswith("ray::") and name in title:
                found[kind] += size
    return dict(found)


def plain(folder: Path, rows: int) -> dict[str, Any]:
    """Measure plain Ray Data on the same rows, without the start of Ray."""
    import ray

    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def add(table: Any) -> Any:
        return table.append_column("generated_text", pa.array(["x"] * table.num_rows))

    seconds, _ = clock(
        lambda: (
            ray.data.read_parquet(str(folder / "in"))
            .map_batches(add, batch_format="pyarrow", batch_size=1000)
            .write_parquet(str(folder / "plain"))
        )
    )
    ray.shutdown()
    return {"wall_s": seconds, "rows_per_s": round(rows / seconds)}


def resume(folder: Path, shards: int) -> dict[str, Any]:
    """Run a job of many shards, delete 1% of its parts and run it again; return the seconds of both."""
    rows = 16 * shards
    write_rows(folder / "many", rows)
    # 16 rows may generate nearly all of a shard's 262,144 tokens, so the shards are as small as they get.
    spec = make_spec(folder, "many", "resumed", max_tokens=2000, n=8)
    whole = run(spec, rows)
    parts = sorted((folder / "resumed").glob("part-*.parquet"))
    assert len(parts) == shards, f"{len(parts)} parts"
    lost = shards // 100
    for part in random.Random(0).sample(parts, lost):
        part.unlink()
    again = run(spec, rows, rows - 16 * lost)
    shutil.rmtree(folder / "resumed")
    return {"whole_s": whole["wall_s"], "first_commit_s": again["first_commit_s"], "wall_s": again["wall_s"]}


def show(name: str, figures: dict[str, Any]) -> None:
    console.print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
