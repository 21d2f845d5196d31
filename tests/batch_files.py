"""Input files of batches, and waiting for their end."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import openai
from http_calls import MODEL
from openai.types import Batch
from patience import PATIENCE_S

FINAL = ("completed", "failed", "expired", "cancelled")


def chat_line(number: int, text: str, **fields: Any) -> dict[str, Any]:
    """A line that asks for a chat; greedy unless `fields` have another temperature."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body | fields}


def jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def wait_until(
    client: openai.OpenAI, batch_id: str, is_reached: Callable[[Batch], bool] = lambda one: one.status in FINAL
) -> Batch:
    """Poll a batch until it is in a state, and check that its counts only grow."""
    end_s, done = time.monotonic() + PATIENCE_S, 0
    while True:
        batch = client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed + batch.request_counts.failed >= done, "the counts went back"
        done = batch.request_counts.completed + batch.request_counts.failed
        if is_reached(batch):
            return batch
        assert batch.status not in FINAL, f"it is {batch.status} already"
        assert time.monotonic() < end_s, f"the batch is still {batch.status}"
        time.sleep(0.02)
