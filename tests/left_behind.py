"""What a job must not leave behind: processes, actors, placement groups, temporary files, Ray's sessions."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patience import PATIENCE_S

if TYPE_CHECKING:
    from ray_cluster import RayNodes

TAG = "MORAY_TEST_TAG"  # an environment variable, which all processes of a run inherit

ASK_RAY = """
import json, ray
from ray._private import state
from ray.util import placement_group_table
ray.init(address="auto", namespace="look", logging_level="ERROR", log_to_driver=False)
# What is detached is Ray Data's own, one of a kind for the whole cluster.
actors = [actor for actor in state.actors().values() if actor["State"] != "DEAD" and not actor["IsDetached"]]
groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps([str(one) for one in [*actors, *groups]]))
"""


def processes(tag: str) -> Iterator[str]:
    """Yield the processes that were started with the tag in their environment and still run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and f"{TAG}={tag}".encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:  # else a zombie
                    yield f"{folder.name} {command[:100]}"
        except OSError:
            continue


def temporaries(output: Path) -> list[str]:
    """Files that were being written to an output folder; and what reserves it."""
    job = output / "_job"
    return [str(path) for path in [*(job / "tmp").glob("*"), *job.glob("lease.json")]]


def sessions(ray_folder: Path) -> list[str]:
    return [str(path) for path in ray_folder.iterdir()]


def in_cluster(nodes: "RayNodes") -> list[str]:
    """Actors and placement groups that are there."""
    asked = nodes.python("-c", ASK_RAY, RAY_ADDRESS=nodes.gcs_address)
    assert asked.returncode == 0, asked.stderr
    found: list[str] = json.loads(asked.stdout.splitlines()[-1])
    return found


def wait_until_gone(tag: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while left := list(processes(tag)):
        assert time.monotonic() < end_s, f"still there after {PATIENCE_S:.0f} s: {left}"
        time.sleep(0.2)
