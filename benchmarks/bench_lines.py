"""Measure what input of JSON lines costs beside Parquet: a large file planned and resumed, and rows without a model.

    python benchmarks/bench_lines.py [--gigabytes 1] [--rows 200000]

The plan runs in a process of its own, whose peak memory is reported, over a generated file of chats with some columns.
In another process `moray run`'s own driver, with noop_worker.py, computes some shards of the job, is interrupted,
resumes it, and is interrupted again. All is done first with a tenth of the file, since memory must not grow with it.
Then the rows of bench_scale.py go through the same, as Parquet and as JSON lines in turn. Figures of one run may be
compared with each other.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_scale
import pyarrow.parquet as pq
import report

HERE = Path(__file__).resolve().parent
ROUNDS = 2
SHARDS = 20  # that are committed before an interruption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--only", choices=ONLY, help="one part, for the job of --folder; prints its figures")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(ONLY[args.only](args.folder)), file=sys.stderr)
        return
    os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for Ray's workers
    result: dict[str, Any] = {"rows": args.rows, "plan": [], "resume": [], "job": []}
    for share in (0.1, 1.0):
        with tempfile.TemporaryDirectory(prefix="moray-bench-lines-") as name:
            write_chats(Path(name) / "in", int(share * args.gigabytes * 1e9))
            for part in ONLY:
                command = [sys.executable, str(HERE / "bench_lines.py"), "--only", part, "--folder", name]
                ended = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(ended.stderr.splitlines()[-1])
                print(f"{part}: {found}")
                result[part].append(found)
    for number in range(ROUNDS):
        for kind in ("parquet", "jsonl"):
            with tempfile.TemporaryDirectory(prefix="moray-bench-lines-") as name:
                folder = Path(name)
                bench_scale.write_rows(folder / "in", args.rows)
                if kind == "jsonl":
                    to_lines(folder / "in")
                found = bench_scale.run(bench_scale.make_spec(folder, "in", "out"), args.rows)
            print(f"round {number}, {kind}: {found}")
            result["job"].append({"format": kind} | found)
    saved = report.save("bench_lines", "cpu", report.context("ray", "pyarrow", "pydantic") | result)
    print(f"Saved {saved.relative_to(report.ROOT)}")


def plan(folder: Path) -> dict[str, Any]:
    """Plan the job of a folder; return the figures."""
    from moray.batch.plan.planner import plan_job

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, job = bench_scale.clock(lambda: plan_job(bench_scale.make_spec(folder, "in", "out")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(file.size for file in job.input.files)
    return {
        "bytes": size,
        "rows": job.input.num_rows,
        "seconds": seconds,
        "mb_per_s": round(size / 1e6 / seconds),
        "peak_rss_mb": round(peak / 1024),
        "before_mb": round(before / 1024),
    }


def resume(folder: Path) -> list[dict[str, Any]]:
    """Run the job of a folder until some shards are committed, twice; return the figures of both runs."""
    spec = bench_scale.make_spec(folder, "in", "out")
    first = bench_scale.run(spec, sys.maxsize, stop_after=SHARDS)
    again = bench_scale.run(spec, sys.maxsize, first["rows_done"], stop_after=SHARDS)
    return [first, again]


ONLY = {"plan": plan, "resume": resume}


def write_chats(folder: Path, size: int) -> None:
    """Write a file of about this many bytes, with prompts, chats and other columns."""
    folder.mkdir()
    text = "The quick brown fox jumps over the lazy dog. " * 20
    with (folder / "a.jsonl").open("w") as file:
        number = 0
        while file.tell() < size:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[:300]}]
            row = {"id": number, "prompt": f"{number}: {text[:200]}", "messages": messages, "score": number / 7}
            file.write(json.dumps(row | {"tags": ["a", "b"], "ok": True, "note": None}) + "\n")
            number += 1


def to_lines(folder: Path) -> None:
    """Replace the Parquet files of a folder by JSON lines of the same rows."""
    for path in list(folder.glob("*.parquet")):
        with path.with_suffix(".jsonl").open("w") as file:
            for batch in pq.ParquetFile(path).iter_batches(10_000):
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
        path.unlink()


if __name__ == "__main__":
    main()
