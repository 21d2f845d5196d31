"""A job whose workers ask for GPUs, on a Ray that is told to have two: Ray Data's side of it needs no card."""

import json
import os
import subprocess
import sys
from pathlib import Path

from made_jobs import read_output, write_input

SCRIPT = """
import sys
import ray
from made_jobs import make_spec
from batch.driver import run_job
from pathlib import Path
ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
sampling = {"max_tokens": 100, "ignore_eos": True}
sys.exit(run_job(make_spec(Path(sys.argv[1]), sampling=sampling, engine={"max_num_seqs": 4})).exit_code)
"""


def test_a_job_takes_all_the_gpus_there_are(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"max({i}, 12) =" for i in range(240)]})
    tests = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert all(row["error"] is None for row in read_output(tmp_path))
    (file,) = (tmp_path / "out/_job/events").glob("*.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    ready = [event for event in events if event["event"] == "actor_ready" and event["stage"] == "worker"]
    assert len(ready) == 2
