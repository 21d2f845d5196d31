"""Run a program under test in a process of its own, which gets its requests over a pipe.

Each contender keeps its model loaded between rounds, and only one runs at a time, so that rounds can alternate. This
module has both ends of the pipe and needs the standard library only: a peer may be in another virtual environment.
"""

import json
import math
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

VOCAB_IN_USE = range(3, 32000)  # no special tokens


@dataclass(frozen=True)
class Work:
    """Describes a request: generate exactly max_tokens tokens, greedily."""

    prompt: list[int]
    max_tokens: int


def make_work(num_requests: int, round_id: int, max_tokens: int | None = None) -> list[Work]:
    """Make requests of 16..128 prompt tokens and 8..96 output tokens (at most max_tokens).

    Lengths are the same in every round; the prompts' tokens are not, so that no prefix cache finds them again.
    """
    lengths = random.Random(0)
    tokens = random.Random(1000 + round_id)
    work = []
    for _ in range(num_requests):
        prompt_length, output_length = lengths.randint(16, 128), lengths.randint(8, 96)
        prompt = tokens.choices(VOCAB_IN_USE, k=prompt_length)
        work.append(Work(prompt, min(output_length, max_tokens or output_length)))
    return work


@dataclass(frozen=True)
class Round:
    """Holds the figures of one run of the requests.

    seconds:    from the first request to the last token
    tokens:     useful output tokens, a list for each request
    peak_anon:  peak of anonymous resident memory, in bytes
    cpu_s:      CPU time of the contender, which other processes disturb less than `seconds`
    others:     share of the machine's CPU time that other processes used
    facts:      further figures that the contender reports
    """

    seconds: float
    tokens: list[list[int]]
    peak_anon: int
    cpu_s: float
    others: float
    facts: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        return sum(map(len, self.tokens)) / self.cpu_s


class ContenderError(Exception):
    """Means that a contender did not start or did not finish a round; the message names its log."""


class TooSlow(ContenderError):
    """Means that a contender was stopped because a round took longer than allowed."""


class Contender:
    """Starts a contender's process and sends it requests."""

    def __init__(self, name: str, command: list[str], threads: int, log: Path) -> None:
        self.name = name
        self.log = log
        # the same for all: OpenMP of torch and ggml, and the BLAS of numpy
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env)
        self.info: dict[str, Any] = {}
        self.load_peak_anon = 0

    def wait_ready(self) -> None:
        """Wait until the model is loaded; `info` then has what the contender reports about itself."""
        self.info, self.load_peak_anon = self._receive()

    def run(self, work: list[Work], limit_s: float = math.inf) -> Round:
        """Run the requests. Raises TooSlow, and ends the contender, when that takes longer than limit_s."""
        assert self._process.stdin is not None
        cpu, own = _machine_cpu_s(), _process_cpu_s(self._process.pid)
        started = time.perf_counter()
        self._process.stdin.write(json.dumps([asdict(w) for w in work]) + "\n")
        self._process.stdin.flush()
        reply, peak_anon = self._receive(limit_s)
        own = _process_cpu_s(self._process.pid) - own
        others = _machine_cpu_s() - cpu - own
        share = max(0.0, others / (time.perf_counter() - started) / (os.cpu_count() or 1))
        wrong = [i for i, (w, t) in enumerate(zip(work, reply["tokens"], strict=True)) if len(t) != w.max_tokens]
        if wrong:
            raise ContenderError(f"{self.name}: requests {wrong} did not get exactly max_tokens tokens; see {self.log}")
        return Round(reply["seconds"], reply["tokens"], peak_anon, own, share, reply["facts"])

    def close(self) -> None:
        """End the contender's process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, limit_s: float = math.inf) -> tuple[dict[str, Any], int]:
        """Return the next message, and the peak of anonymous memory while waiting for it."""
        assert self._process.stdout is not None
        peak, give_up = 0, time.monotonic() + limit_s
        while not select.select([self._process.stdout], [], [], 0.05)[0]:
            peak = max(peak, anonymous_bytes(self._process.pid))
            if time.monotonic() > give_up:
                self._process.kill()
                raise TooSlow(f"{self.name} was stopped after {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self.log.read_text().splitlines()[-5:])
            raise ContenderError(f"{self.name} ended with code {code}; the end of {self.log}:\n{tail}")
        message: dict[str, Any] = json.loads(line)
        return message, peak


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return RssAnon of a process; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def _machine_cpu_s() -> float:
    """Return the CPU seconds since boot that were not idle, including those that the host took (steal)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of those that it has started, which are its ranks."""
    started = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return _own_cpu_s(pid) + sum(_process_cpu_s(int(child)) for child in started)


def _own_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Runner(Protocol):
    """Is the program under test with its model loaded.

    info:  what it reports about itself
    """

    info: dict[str, Any]

    def run(self, work: list[Work]) -> list[list[int]]:
        """Return the output tokens of each request. This call is timed."""

    def facts(self) -> dict[str, Any]:
        """Return further figures of the last run; not timed."""


def serve(load: Callable[[], Runner]) -> None:
    """Serve the pipe in the child process: load the model, report that, and run requests until the pipe closes."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to the log, not between the messages

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    runner = load()
    send(runner.info)
    for line in sys.stdin:
        work = [Work(**w) for w in json.loads(line)]
        started = time.perf_counter()
        tokens = runner.run(work)
        seconds = time.perf_counter() - started
        send({"seconds": seconds, "tokens": tokens, "facts": runner.facts()})
