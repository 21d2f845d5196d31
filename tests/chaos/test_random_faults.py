"""Workers, nodes and drivers killed at random moments, from a seed: every row is there once, with the answer of an
engine that nobody disturbed."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import left_behind
import pytest
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from ray_cluster import RayNodes, parent_of
from undisturbed import answers

from batch.faults.process import start_time
from batch.spec import JobSpec
from batch.verify import verify
from engine.params import SamplingParams

pytestmark = [pytest.mark.chaos, pytest.mark.alone]

Start = Callable[[Path, JobSpec, RayNodes], MorayRun]
ROWS = 16  # a shard
TOKENS = 60  # a row
SAMPLING = {"temperature": 1.0, "seed": 11, "ignore_eos": True}
IN_FLIGHT = 6  # shards that are begun: three in each worker, with eight rows in its engine and at most 31 that wait
SAMPLED = 64  # rows that are compared


def make_job(folder: Path, shards: int) -> JobSpec:
    """Over two files. What each row may generate makes shards small, however many rows there are."""
    for name, rows in (("a", ROWS * shards - 100), ("b", 100)):
        prompts = [f"{name}: {i} sheep, {i % 7} lions" for i in range(rows)]
        write_input(folder / f"in/{name}.parquet", {"prompt": prompts, "length": [TOKENS] * rows})
    return make_spec(
        folder,
        sampling=SAMPLING | {"max_tokens": 16384, "columns": {"max_tokens": "length"}},
        engine={"max_num_seqs": 8},
        workers={"min": 2, "cpus": 1.1},  # one on each node, the other stages beside the one on the head
    )


class Chaos:
    """One job on two nodes, and what happens to it."""

    def __init__(self, folder: Path, spec: JobSpec, shards: int, nodes: RayNodes, start: Start, seed: int) -> None:
        self._folder, self._spec, self._shards, self._nodes, self._start = folder, spec, shards, nodes, start
        self._random = random.Random(seed)
        self.run = start(folder, spec, nodes)
        self.drivers = 1

    def strike(self, what: str) -> None:
        """Once what was in flight at the last time has been committed, and a random while later: a row that is alone in
        two workers killed by us would be taken for guilty. The fault hits mid-run."""
        before = len(self.run.parts())
        self.run.wait_for(lambda: len(self.run.parts()) >= before + IN_FLIGHT)
        time.sleep(self._random.uniform(0.0, 1.0))
        done = len(self.run.parts())
        assert 0 < done < self._shards and self.run.process.poll() is None, f"{done} parts: too fast for {what}"
        getattr(self, f"_kill_{what}")()
        assert len(self.run.parts()) < self._shards

    def _kill_worker(self) -> None:
        """Or an actor of another stage, one time of four."""
        stage = self._random.choice(["worker"] * 6 + ["prepare", "commit"])
        alive: list[int] = []
        self.run.wait_for(lambda: alive.extend(filter(start_time, self.run.pids(stage))) or alive)
        os.kill(self._random.choice(sorted(alive)), signal.SIGKILL)

    def _kill_node(self) -> None:
        """The one without the driver, with a worker in it."""
        raylet = self._nodes.last_raylet()
        self.run.wait_for(lambda: raylet in map(parent_of, self.run.pids("worker")))
        self._nodes.kill_last()
        self._nodes.add()

    def _kill_driver(self) -> None:
        self.run.kill()
        self.run = self._start(self._folder, self._spec, self._nodes)
        self.drivers += 1


def check(folder: Path, chaos: Chaos, nodes: RayNodes, seed: int) -> None:
    code, output = chaos.run.end()
    assert code == 0, output
    found = verify(str(folder / "out"))
    assert found.closes and found.failed == 0, (found.errors, found.problems)
    assert len(list((folder / "out/_job/events").glob("*.jsonl"))) == chaos.drivers
    texts = {(row["source_file"], row["source_row"]): row["generated_text"] for row in read_output(folder)}
    sample = random.Random(seed).sample(sorted(texts), SAMPLED)
    assert {row: texts[row] for row in sample} == answers(folder, sample, SamplingParams(max_tokens=TOKENS, **SAMPLING))
    assert chaos.run.left() == [] and left_behind.in_cluster(nodes) == []


def test_a_worker_a_node_and_a_driver(tmp_path: Path, nodes: RayNodes, start: Start) -> None:
    shards, seed = 48, 1
    spec = make_job(tmp_path, shards)
    chaos = Chaos(tmp_path, spec, shards, nodes, start, seed)
    for what in ("worker", "node", "driver"):
        chaos.strike(what)
    check(tmp_path, chaos, nodes, seed)


@pytest.mark.slow
def test_thirty_faults(tmp_path: Path, nodes: RayNodes, start: Start) -> None:
    shards, seed = 360, 30
    spec = make_job(tmp_path, shards)
    chaos = Chaos(tmp_path, spec, shards, nodes, start, seed)
    faults = ["worker"] * 14 + ["node"] * 8 + ["driver"] * 8
    random.Random(seed).shuffle(faults)
    for what in faults:
        chaos.strike(what)
    check(tmp_path, chaos, nodes, seed)
