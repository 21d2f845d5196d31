"""LineAnswerer answers the lines of batches at one replica, at the priority of bulk."""

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from moray.serve.batches import Answered, LineAnswer, ReplicaClosingError, ReplicaFailedError
from moray.serve.endpoint import Caller, Endpoint
from moray.serve.errors import ApiError
from moray.serve.openai.requests import answer

logger = logging.getLogger(__name__)

QUEUE_FACTOR = 2  # lines in the engine for each of its places: one runs, and one is ready to follow


class LineRequest(NamedTuple):
    """Holds one line to answer.

    seed:  text that its samples follow from, if its body has no seed
    body:  a JSON value
    """

    url: str
    body: Any
    seed: str


class LineAnswerer:
    """Answers lines, of which it gives the engine no more at a time than keep it full.

    replica:   a name of this replica
    max_rows:  lines that it should have at a time
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.replica = uuid4().hex
        self._endpoint = endpoint
        self.max_rows = QUEUE_FACTOR * endpoint.engine.limits.max_num_seqs
        self._places = asyncio.Semaphore(self.max_rows)

    async def answer(self, lines: Sequence[LineRequest]) -> Answered:
        """Answer lines.

        Raises ReplicaFailedError or ReplicaClosingError where the engine stops before they are done.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(line)) for line in lines]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return Answered(self.replica, self.max_rows, [task.result() for task in tasks])

    async def _answer(self, line: LineRequest) -> LineAnswer:
        async with self._places:
            started_s, request_id = time.monotonic(), f"req_{uuid4().hex}"
            try:
                status, body = await answer(self._endpoint, line.url, line.body, Caller(None, line.seed))
                text = json.dumps(body, allow_nan=False)
            except Exception as error:
                # As the guard does: where it was raised, not its message, which may quote a prompt.
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s in a line of a batch for %s\n%s", type(error).__name__, line.url, frames)
                bug = ApiError(500, "internal_error", "the endpoint has a bug; its log says where")
                status, body, text = bug.status, bug.body, json.dumps(bug.body)
            if status == 503:
                engine = self._endpoint.engine
                raise (
                    ReplicaFailedError if engine.failure is not None and not engine.is_closing else ReplicaClosingError
                )
            self._endpoint.metrics.batch_requests.labels(line.url, str(status)).inc()
            usage = body.get("usage", {})
            return LineAnswer(
                status,
                request_id,
                text,
                usage.get("prompt_tokens"),
                usage.get("completion_tokens"),
                time.monotonic() - started_s,
            )
