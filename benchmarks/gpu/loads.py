"""Define the loads and how they are timed, in the same way for our engine and every peer, each in its own process.

decode:  a number of sequences that all decode; only steps in which each of them gets a token are timed.
mixed:   twice as many requests as run at once, with prompts and outputs of different lengths; when one is finished the
         next one is added. Its speed is output tokens divided by the whole time.

Tokens are sampled at TEMPERATURE. With random weights the likeliest token is often the same for all sequences, which
would then all use the same experts.
"""

import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

TEMPERATURE = 1.0


@dataclass(frozen=True)
class Load:
    """Describes a load.

    kind:           "decode" or "mixed"
    num_sequences:  sequences that run at once
    prompt_tokens:  tokens of a prompt; for a mixed load, on average
    output_tokens:  for a mixed load, output tokens of a request on average; for a decode load, steps that are timed
    vocab:          tokens of prompts are below it
    """

    kind: str
    num_sequences: int
    prompt_tokens: int
    output_tokens: int
    vocab: int = 32000

    @property
    def num_requests(self) -> int:
        return self.num_sequences * (2 if self.kind == "mixed" else 1)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prompt with its output."""
        return max(len(request.prompt) + request.max_tokens for request in requests(self))


@dataclass(frozen=True)
class Request:
    """Describes a request of a load."""

    prompt: list[int]
    max_tokens: int


@cache
def requests(load: Load) -> list[Request]:
    """Return the requests of a load, the same in every process.

    Those of a decode load are so long that the first ones still run when the last ones begin.
    """
    rng = random.Random(load.num_sequences)
    made = []
    for _ in range(load.num_requests):
        prompt, output = load.prompt_tokens, load.output_tokens
        if load.kind == "mixed":
            prompt, output = (rng.randint(2 * n // 3, 4 * n // 3) for n in (prompt, output))
        else:
            output = 4 * load.output_tokens + load.num_sequences // 2
        made.append(Request(rng.choices(range(3, load.vocab), k=prompt), output))
    return made


@dataclass(frozen=True)
class Answer:
    """Holds the figures of a load.

    ms:             median time of a step; NaN for a mixed load
    seconds:        time in which output_tokens were generated
    context:        mean number of keys of a sequence in the timed steps; NaN where it is not known
    error:          why there are no figures
    """

    ms: float
    seconds: float
    output_tokens: int
    context: float
    error: str | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


class Steps:
    """Times the steps of a decode load in which every sequence gets its token."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._stamps: list[float] = []
        self._generated = 0
        self._before = 0

    def took(self, num_tokens: int) -> bool:
        """Record the end of a step that gave num_tokens tokens; return whether enough steps were timed."""
        self._generated += num_tokens
        if num_tokens < self.load.num_sequences:
            self._stamps.clear()
        if not self._stamps:
            self._before = self._generated
        self._stamps.append(time.perf_counter())
        return len(self._stamps) > self.load.output_tokens

    def answer(self) -> Answer:
        """Return the figures of the timed steps."""
        load, stamps = self.load, self._stamps
        times = [after - before for before, after in itertools.pairwise(stamps)]
        if not times:
            return Answer(float("nan"), float("nan"), 0, float("nan"), "no two steps gave every sequence a token")
        context = load.prompt_tokens + (self._before + self._generated) / 2 / load.num_sequences
        tokens = load.num_sequences * len(times)
        return Answer(statistics.median(times) * 1000, stamps[-1] - stamps[0], tokens, context)


Run = Callable[[Load], tuple[Answer, dict[str, Any]]]


def serve(make: Callable[[], Run], loads: Iterable[Load]) -> None:
    """Run loads in a peer's process, and print each answer at once, because the process may be stopped at any time.

    make: makes the engine, and returns the function that runs a load on it
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to the log, not between the answers
    run, nan = make(), float("nan")
    for load in loads:
        try:
            answer, facts = run(load)
        except Exception as error:
            answer, facts = Answer(nan, nan, 0, nan, f"{type(error).__name__}: {str(error)[:500]}"), {}
        channel.write(json.dumps({"load": asdict(load), "answer": asdict(answer), "facts": facts}) + "\n")
        channel.flush()


def parse(text: str) -> list[Load]:
    """Parse the loads on a peer's command line, a JSON list."""
    return [Load(**one) for one in json.loads(text)]
