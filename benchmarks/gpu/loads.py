"""What engines are asked to do, and how it is timed: alike for ours and for every peer, each in a process of its own.

decode:  so many sequences that all decode: the steps are timed in which each of them gets a token.
mixed:   twice as many requests as run at once, prompts and outputs of differing lengths; when one is done the next is
         added: output tokens over the whole time.

Tokens are drawn at TEMPERATURE. With random weights the likeliest token is easily the same for all sequences, which
then would all go to the same experts.
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
    """A number of sequences that run at once, and what each of them asks.

    kind:          "decode" or "mixed"
    prompt_tokens: of each; where mixed, their mean
    output_tokens: the mean of each; of a decode load, steps that are timed
    vocab:         prompts are of tokens below
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
        """Tokens of the longest prompt and its output."""
        return max(len(request.prompt) + request.max_tokens for request in requests(self))


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


@cache
def requests(load: Load) -> list[Request]:
    """The same in every process. Of a decode load, long enough that the first are not done when the last begin."""
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
    """ms:            median of a step; NaN for a mixed load
    seconds:       that output_tokens took
    context:       mean number of keys of a sequence in the timed steps; NaN where unknown
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
        """A step has ended that gave so many tokens; whether enough have been seen."""
        self._generated += num_tokens
        if num_tokens < self.load.num_sequences:
            self._stamps.clear()
        if not self._stamps:
            self._before = self._generated
        self._stamps.append(time.perf_counter())
        return len(self._stamps) > self.load.output_tokens

    def answer(self) -> Answer:
        load, stamps = self.load, self._stamps
        times = [after - before for before, after in itertools.pairwise(stamps)]
        if not times:
            return Answer(float("nan"), float("nan"), 0, float("nan"), "no two steps gave every sequence a token")
        context = load.prompt_tokens + (self._before + self._generated) / 2 / load.num_sequences
        tokens = load.num_sequences * len(times)
        return Answer(statistics.median(times) * 1000, stamps[-1] - stamps[0], tokens, context)


Run = Callable[[Load], tuple[Answer, dict[str, Any]]]


def serve(make: Callable[[], Run], loads: Iterable[Load]) -> None:
    """The end of a peer: make it, run one load after the other, say each answer at once, for the process may be stopped
    any time. A load that fails says so."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
    run, nan = make(), float("nan")
    for load in loads:
        try:
            answer, facts = run(load)
        except Exception as error:
            answer, facts = Answer(nan, nan, 0, nan, f"{type(error).__name__}: {str(error)[:500]}"), {}
        channel.write(json.dumps({"load": asdict(load), "answer": asdict(answer), "facts": facts}) + "\n")
        channel.flush()


def parse(text: str) -> list[Load]:
    """What `serve` is told on the command line: a JSON list of loads."""
    return [Load(**one) for one in json.loads(text)]
