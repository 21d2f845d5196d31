"""A job whose worker asks for a GPU, on a Ray that is told to have one: Ray Data's side of it needs no card."""

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
ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
sys.exit(run_job(make_spec(Path(sys.argv[1]), workers={"gpus": 1})).exit_code)
"""


def test_job_runs(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"max({i}, 12) =" for i in range(4)]})
    tests = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(row["error"] is None for row in read_output(tmp_path))
