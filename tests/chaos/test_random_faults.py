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
from hold import Hold
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from ray_cluster import RayNodes, parent_of
from undisturbed import answers

from moray.batch.output.verify import verify
from moray.batch.processes.process import start_time
from moray.batch.spec import JobSpec
from moray.engine.params import SamplingParams

pytestmark = [pytest.mark.chaos, pytest.mark.alone, pytest.mark.slow]

Start = Callable[[Path, JobSpec, RayNodes], MorayRun]
ROWS = 16  # a shard
TOKENS = 60  # a row
SAMPLING = {"temperature": 1.0, "seed": 11, "ignore_eos": True}
IN_FLIGHT = 6  # shards that are begun: three in each worker, with eight rows in its engine and at most 31 that wait
AHEAD = 2  # parts that may come while a fault is on its way
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

    def __init__(self, folder: Path, shards: int, hold: Hold, nodes: RayNodes, start: Start, seed: int) -> None:
        spec = make_job(folder, shards)
        self._shards, self._hold, self._nodes = shards, hold, nodes
        self._random = random.Random(seed)
        self.run = start(folder, spec, nodes)
        self.drivers = 1

    def strike(self, what: str) -> None:
        """Once what was in flight at the last time has been committed, and a random while later: a row that is alone in
        two workers killed by us would be taken for guilty. The fault hits mid-run: the job is held before its end."""
        wanted = len(self.run.parts()) + IN_FLIGHT
        self._hold.at(wanted + AHEAD, "worker", "commit")
        self.run.wait_for(lambda: len(self.run.parts()) >= wanted)
        time.sleep(self._random.uniform(0.0, 1.0))
        getattr(self, f"_kill_{what}")()
        assert len(self.run.parts()) < self._shards, "the test has too few shards for so many faults"

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
        """It is started again by itself."""
        driver = self.run.driver
        os.kill(driver, signal.SIGKILL)
        self.run.wait_for(lambda: self.run.driver != driver)
        self.drivers += 1


def check(folder: Path, chaos: Chaos, hold: Hold, nodes: RayNodes, seed: int) -> None:
    hold.release()
    code, output = chaos.run.end()
    assert code == 0, output
    found = verify(str(folder / "out"))
    assert found.closes and found.failed == 0, (found.errors, found.problems)
    assert len(list((folder / "out/_job/events").glob("*.jsonl"))) == chaos.drivers
    texts = {(row["source_file"], row["source_row"]): row["generated_text"] for row in read_output(folder)}
    sample = random.Random(seed).sample(sorted(texts), SAMPLED)
    assert {row: texts[row] for row in sample} == answers(folder, sample, SamplingParams(max_tokens=TOKENS, **SAMPLING))
    assert chaos.run.left() == [] and left_behind.in_cluster(nodes) == []


def test_a_worker_a_node_and_a_driver(tmp_path: Path, hold: Hold, nodes: RayNodes, start: Start) -> None:
    seed = 1
    chaos = Chaos(tmp_path, 48, hold, nodes, start, seed)
    for what in ("worker", "node", "driver"):
        chaos.strike(what)
    check(tmp_path, chaos, hold, nodes, seed)


def test_thirty_faults(tmp_path: Path, hold: Hold, nodes: RayNodes, start: Start) -> None:
    seed = 30
    chaos = Chaos(tmp_path, 360, hold, nodes, start, seed)
    faults = ["worker"] * 14 + ["node"] * 8 + ["driver"] * 8
    random.Random(seed).shuffle(faults)
    for what in faults:
        chaos.strike(what)
    check(tmp_path, chaos, hold, nodes, seed)
