"""What the batch pipeline costs over the engine on the card: bench_batch.py's two ways of running the same requests."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu.setup import Row, Setup

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("ray", "pyarrow", "pydantic", "yaml", "typer", "rich", "tokenizers")
ROWS, DRY_ROWS, ROUNDS = 2048, 12, 2


def run(setup: Setup) -> Iterator[Row]:
    site = [] if setup.ray_site is None else [str(setup.ray_site)]
    sys.path += site
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *site])  # of the job and its workers
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield {"batch": "skipped", "error": f"not installed here: {', '.join(missing)}; see --ray-site"}
        return
    import bench_batch
    from bench_model import add_tokenizer, write_checkpoint
    from contender import make_work

    with tempfile.TemporaryDirectory(prefix="moray-bench-gpu-") as name:
        if setup.is_dry:
            yield {"batch": "ready", "rows": DRY_ROWS}
            return
        checkpoint = write_checkpoint(Path(name) / "model")
        for n in range(ROUNDS):
            if setup.seconds_left < 20:
                return
            work = make_work(ROWS, n)
            engine_s, tokens, _ = bench_batch.run_alone(checkpoint, work, 4, Path(name))
            job = bench_batch.run_job(add_tokenizer(checkpoint), work, Path(name) / f"round-{n}")
            yield {
                "batch": f"round {n + 1}",
                "rows": ROWS,
                "output_tokens": sum(map(len, tokens)),
                "engine_s": engine_s,
                "job_work_s": job.work_s,
                "job_startup_s": job.startup_s,
                "cost_percent": 100 * (job.work_s / engine_s - 1),
                "cost_us_per_row": 1e6 * (job.work_s - engine_s) / ROWS,
                "same_tokens": sum(job.tokens[row] == own for row, own in enumerate(tokens)) / ROWS,
            }
