"""Measure the overhead of the batch pipeline over the engine on the GPU, as bench_batch.py does on the CPU."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu.setup import NO_TIME, Row, Setup

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("ray", "pyarrow", "pydantic", "yaml", "typer", "rich", "tokenizers")
ROWS, ROUNDS, THREADS = 2048, 2, 4
MIN_S = 20  # seconds that must be left to begin a round


def run(setup: Setup) -> Iterator[Row]:
    site = [] if setup.ray_site is None else [str(setup.ray_site)]
    sys.path += site
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *site])  # for the job and its workers
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield {"batch": "skipped", "error": f"not installed here: {', '.join(missing)}; see --ray-site"}
        return
    with tempfile.TemporaryDirectory(prefix="moray-bench-gpu-") as name:
        for n in range(1 if setup.is_dry else ROUNDS):
            if setup.find(batch=_title(n)) is not None:
                continue
            if n == 0 or setup.seconds_left > MIN_S:
                yield one_round(setup, Path(name), n)
            else:
                yield {"batch": _title(n), "error": NO_TIME}


def _title(n: int) -> str:
    return f"round {n + 1}"


def one_round(setup: Setup, folder: Path, n: int) -> Row:
    """Run the requests on the engine and as a job; return the row.

    Raises ContenderError, or SystemExit with the job's output, where one of the two fails.
    """
    import bench_batch  # its packages may be in ray_site
    from bench_model import add_tokenizer, write_checkpoint
    from contender import Work, make_work

    if setup.is_dry:
        checkpoint = with_tokenizer = ROOT / "examples" / "tiny-phimoe"
        work = [Work([5 + i, 7, 9], 4) for i in range(6)]
    else:
        checkpoint = write_checkpoint(folder / "model")
        with_tokenizer, work = add_tokenizer(checkpoint), make_work(ROWS, n)
    engine_s, tokens, _ = bench_batch.run_alone(checkpoint, work, THREADS, folder)
    job = bench_batch.run_job(with_tokenizer, work, folder / f"round-{n}")
    return {
        "batch": _title(n),
        "rows": len(work),
        "output_tokens": sum(map(len, tokens)),
        "engine_s": engine_s,
        "job_work_s": job.work_s,
        "job_startup_s": job.startup_s,
        "cost_percent": 100 * (job.work_s / engine_s - 1),
        "cost_us_per_row": 1e6 * (job.work_s - engine_s) / len(work),
        "same_tokens": sum(job.tokens[row] == own for row, own in enumerate(tokens)) / len(work),
    }
