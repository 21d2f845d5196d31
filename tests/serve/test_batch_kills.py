"""Processes of `moray serve` are killed in the middle of batches: every line is answered, and none twice."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_files import FINAL, chat_line, jsonl, wait_until
from hold import Hold
from moray_serve import MorayServe
from patience import PATIENCE_S

from moray.batch.output.verify import verify

CHAT = "/v1/chat/completions"
NUM_LINES, LINES_PER_PART = 300, 8
ALLOWED = 20  # parts of a batch before its end is held; it has 38


def client_of(endpoint: MorayServe) -> openai.OpenAI:
    # The package tries again by itself, as for a user: while a replica is replaced, connections are refused. It waits
    # for at most 8 s between two tries.
    retries = int(PATIENCE_S / 6)
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="x", max_retries=retries, timeout=PATIENCE_S)


def start(store: Path) -> MorayServe:
    endpoint = MorayServe("--dtype", "float32", "--set", "max_num_seqs=16", "--batches", str(store))
    endpoint.wait_ready()
    return endpoint


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(str(file_id)).text.splitlines()]


def expect_all(
    client: openai.OpenAI, store: Path, batch_id: str, texts: dict[str, str] | None = None
) -> dict[str, str]:
    """Wait for the end; every line has one answer, and those of all batches of these lines are the same."""
    done = wait_until(client, batch_id)
    assert done.status == "completed" and done.request_counts is not None
    assert (done.request_counts.completed, done.error_file_id) == (NUM_LINES, None)
    answers = results(client, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"request-{number}" for number in range(NUM_LINES)]
    found = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in answers}
    assert verify(str(store / "jobs" / batch_id)).closes
    assert texts is None or found == texts
    return found


def create(client: openai.OpenAI) -> str:
    lines = [chat_line(number, f"Add {number} and 16.", temperature=1, max_tokens=24) for number in range(NUM_LINES)]
    for line in lines:
        line["body"]["seed"] = 5
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


@pytest.mark.slow
@pytest.mark.alone
def test_ten_kills_at_random_moments(tmp_path: Path, hold: Hold) -> None:
    """A batch that is killed in its midst cannot end before: the parts after `ALLOWED` more are held."""
    generator = random.Random(11)
    store = tmp_path / "out"
    endpoint = start(store)

    def create_held() -> str:
        hold.at(len(list(store.rglob("part-*.parquet"))) + ALLOWED, "commit")
        return create(client)

    def parts(batch_id: str) -> set[str]:
        return {path.name for path in (store / "jobs" / batch_id).glob("part-*.parquet")}

    def wait_for_parts(batch_id: str, num: int) -> None:
        endpoint.wait_for(lambda: len(parts(batch_id)) >= num)

    try:
        client = client_of(endpoint)
        undisturbed = expect_all(client, store, create(client))
        for victims in (["moray"], ["batches"], ["moray", "batches"], ["batches", "moray", "batches"]):
            batch_id = create_held()
            moments = sorted(generator.sample(range(ALLOWED), len(victims)))
            for victim, moment in zip(victims, moments, strict=True):
                wait_for_parts(batch_id, moment)
                pids = endpoint.replicas(victim)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                endpoint.wait_for(lambda: set(endpoint.replicas(victim)) - set(pids))  # noqa: B023
            hold.release()
            expect_all(client, store, batch_id, undisturbed)
        batch_id = create_held()
        for moment in sorted(generator.sample(range(1, ALLOWED), 3)):  # everything at once, with Ray and its daemons
            wait_for_parts(batch_id, moment)
            endpoint.kill()
            kept = parts(batch_id)
            time.sleep(1)  # Ray's daemons see that their parent is gone
            endpoint = start(store)
            client = client_of(endpoint)
            batch = client.batches.retrieve(batch_id)
            assert batch.status not in FINAL and batch.request_counts is not None
            assert batch.request_counts.completed >= LINES_PER_PART * len(kept)
            assert kept <= parts(batch_id)
        hold.release()
        expect_all(client, store, batch_id, undisturbed)
    finally:
        hold.release()
        endpoint.stop()
