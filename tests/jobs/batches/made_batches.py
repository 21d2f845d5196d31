"""Stores with batches, and replicas that answer lines without a model."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moray.jobs.batches.answers import Replicas
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.coordinator import Coordinator
from moray.jobs.batches.ids import BATCH, FILE, new_id
from moray.jobs.batches.lifecycle import Lifecycle
from moray.jobs.batches.record import BatchRecord
from moray.jobs.batches.settings import Settings
from moray.jobs.batches.store import BatchStore
from moray.jobs.batches.stored_file import StoredFile
from moray.serve.args import EndpointArgs
from moray.serve.batches import Answered, LineAnswer, ReplicaFailedError
from moray.serve.openai.line_answers import LineRequest

MODEL, URL, OWNER = "tiny", "/v1/completions", "anybody"
NOW_S = 1_800_000_000.0


def line(number: int, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": str(number)} | fields
    return {"custom_id": f"c{number}", "method": "POST", "url": URL, "body": body}


def jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


class Echo:
    """A replica that answers a line with its prompt, and counts how often each was asked.

    poison:  prompts of lines that end it
    gate:    opened, it answers; closed, it waits
    """

    def __init__(self, poison: Sequence[str] = (), max_rows: int = 32) -> None:
        self.asked: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_before_gate = 0  # lines that are answered though the gate is closed
        self._poison = set(poison)
        self._max_rows = max_rows

    async def ask(self, lines: Sequence[LineRequest]) -> Answered:
        prompts = [one.body["prompt"] for one in lines]
        self.asked.update(prompts)
        self.at_once += len(lines)
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0)
            if self.num_before_gate < len(lines):
                await self.gate.wait()
            else:
                self.num_before_gate -= len(lines)
            if self._poison & set(prompts):
                raise ReplicaFailedError
        finally:
            self.at_once -= len(lines)
        return Answered("echo", self._max_rows, [self._answer(one) for one in lines])

    def _answer(self, one: LineRequest) -> LineAnswer:
        if "refused" in one.body:
            body = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "refused"}}
            return LineAnswer(400, "req", json.dumps(body), None, None, 0.1)
        return LineAnswer(200, "req", json.dumps({"echo": one.body["prompt"], "seed": one.seed}), 3, 2, 0.1)


class MadeStore:
    """A store in a folder, its clock, and coordinators over it.

    now_s:  what its clock shows
    """

    def __init__(self, path: Path | str, **settings: Any) -> None:
        self.store = BatchStore(str(path))
        self.store.prepare()
        self.now_s = NOW_S
        args = EndpointArgs(model="/models/tiny", batch_store=str(path))
        fast = {"poll_s": 0.01, "retry_s": 0.01}
        self.settings = replace(Settings.of(args, self.store), **(fast | settings))

    def add_file(self, content: bytes, purpose: str = "batch") -> str:
        file_id = new_id(FILE, self.now_s)
        writer = self.store.create_content(OWNER, file_id)
        writer.write(content)
        digest = writer.close()
        now = int(self.now_s)
        self.store.add_file(OWNER, StoredFile(file_id, len(content), now, now + 1000, "in.jsonl", purpose, digest))
        return file_id

    def add_batch(
        self, lines: Sequence[dict[str, Any]] | bytes, window_s: int = 24 * 3600, **fields: Any
    ) -> BatchRecord:
        content = lines if isinstance(lines, bytes) else jsonl(lines)
        batch = BatchRecord(
            new_id(BATCH, self.now_s), OWNER, URL, self.add_file(content), "24h", window_s, int(self.now_s), **fields
        )
        self.store.copy_input(OWNER, batch.input_file_id, batch.id)
        self.store.add_batch(batch)
        return batch

    def batch(self, batch: BatchRecord) -> BatchRecord:
        found = self.store.batch(OWNER, batch.id)
        assert found is not None
        return found

    def lines(self, file_id: str | None) -> dict[str, Any]:
        """The lines of an output file by custom_id; none occurs twice."""
        if file_id is None:
            return {}
        values = [json.loads(one) for one in b"".join(self.store.read_content(OWNER, file_id)).splitlines()]
        found = {value["custom_id"]: value for value in values}
        assert len(found) == len(values), "a custom_id occurs twice"
        return found

    def coordinator(self, replica: Echo, target: int = 32) -> Coordinator:
        budget = RowBudget(target)
        replicas = Replicas(replica.ask, budget)
        return Coordinator(Lifecycle(self.store, self.settings, replicas.answer_for, budget, lambda: self.now_s))

    async def until(self, coordinator: Coordinator, is_reached: Callable[[], object]) -> None:
        """Run a coordinator until a state is reached, and then end it at once, as a kill would."""
        running = asyncio.create_task(coordinator.run())
        try:
            async with asyncio.timeout(60):
                while not is_reached():
                    assert not running.done(), running.exception()
                    await asyncio.sleep(0.005)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
