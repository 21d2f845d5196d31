"""What Prometheus gets of jobs from the one node of this process's Ray."""

import re
import time
import urllib.request
from typing import Any

LIMIT_S = 60.0  # Ray sends the metrics once a second


def scrape() -> str:
    """Return what the node gives to Prometheus."""
    import ray

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as reply:
        text: str = reply.read().decode()
        return text


def wait_for(job_name: str, wanted: dict[tuple[str, ...], Any]) -> str:
    """Wait until the metrics of a job, by name and labels, have these values; return what the node gives then."""
    end_s = time.monotonic() + LIMIT_S
    while not wanted.items() <= _values(text := scrape(), job_name).items():
        assert time.monotonic() < end_s, _values(text, job_name)
        time.sleep(0.2)
    return text


def _values(text: str, job_name: str) -> dict[tuple[str, ...], float]:
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_moray_") and f'job_name="{job_name}"' in line:
            labels = re.findall(r'(?:state|code|bound)="(\w+)"', line)
            found[line.partition("{")[0].removeprefix("ray_moray_"), *labels] = float(line.rpartition(" ")[2])
    return found
