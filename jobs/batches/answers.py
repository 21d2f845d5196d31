"""Turns a replica's answers into what a BatchRun needs, and learns from them how many lines should be in flight."""

import time
from collections.abc import Awaitable, Callable, Sequence

from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.job import RequestLine
from moray.jobs.batches.run import Answer, WorkerDied
from moray.serve.batches import Answered, LineAnswer, ReplicaFailedError
from moray.serve.openai.line_answers import LineRequest

START_ROWS = 64  # in flight before a replica has said how many it needs
FORGET_S = 300.0  # after which a replica that has answered nothing is not counted any more

Ask = Callable[[Sequence[LineRequest]], Awaitable[Answered]]


class Replicas:
    """Asks replicas, and sets the target of a budget to what those that answer need together.

    ask:    asks one of them. Raises ReplicaFailedError where it died or its engine failed
    clock:  seconds, monotonic
    """

    def __init__(self, ask: Ask, budget: RowBudget, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._budget = budget
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}  # name -> when it answered, and how many lines it needs

    def answer_for(self, seed: str) -> Answer:
        """Return what answers the lines of a batch.

        seed: text that, with its number, the samples of a line follow from which has no seed of its own
        """

        async def answer(requests: Sequence[RequestLine]) -> Sequence[LineAnswer]:
            lines = [LineRequest(request.url, request.body, f"{seed} {request.number}") for request in requests]
            try:
                answered = await self._ask(lines)
            except ReplicaFailedError:
                raise WorkerDied from None
            self._see(answered)
            return answered.answers

        return answer

    def _see(self, answered: Answered) -> None:
        now_s = self._clock()
        self._seen[answered.replica] = now_s, answered.max_rows
        self._seen = {name: seen for name, seen in self._seen.items() if now_s - seen[0] < FORGET_S}
        self._budget.target = sum(rows for _, rows in self._seen.values())
