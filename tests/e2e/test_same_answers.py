"""The endpoint answers what a batch job writes: the same prompts, the same chats, in fp32 and bf16.

The answers to chats are split as those of a model that reasons, at the commas that the tiny model writes.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_calls import MODEL, call
from made_jobs import TINY, make_spec, read_output, write_input
from served import Served, served
from watcher import Watcher

from moray.batch.output.verify import verify
from moray.batch.runtime.driver import run_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


REASONING = {"start": "(", "end": ", "}


def batch(folder: Path, rows: list[dict[str, Any]], kind: str, dtype: str, sampling: dict[str, Any]) -> Any:
    is_chat = kind == "messages"
    write_input(folder / "in/a.parquet", pa.Table.from_pylist([{kind: row[kind]} for row in rows]))
    spec = make_spec(
        folder,
        model={"dtype": dtype},
        input={kind: kind},
        sampling=sampling | {"max_tokens": 24},
        output={"logprobs": 1} | ({"reasoning": REASONING} if is_chat else {}),
    )
    result = run_job(spec, display=Watcher())
    prompts = [str(row[kind]) for row in rows]
    num_equal = 0 if sampling.get("temperature") else len(prompts) - len(set(prompts))
    assert result.status.copied_rows == num_equal and verify(str(folder / "out")).closes
    rows = read_output(folder)
    texts = [(row["reasoning"], row["generated_text"]) if is_chat else row["generated_text"] for row in rows]
    logprobs = [[token["logprob"] for token in row["logprobs"]] for row in rows]
    return list(zip(texts, (row["finish_reason"] for row in rows), logprobs, strict=True))


def ask_prompt(local: Served, row: dict[str, Any], sampling: dict[str, Any]) -> Any:
    body = {"model": MODEL, "prompt": row["prompt"], "max_tokens": 24, "temperature": 0, "logprobs": 1} | sampling
    (choice,) = call(f"{local.url}/v1/completions", body).json["choices"]
    num_tokens = len(choice["logprobs"]["tokens"]) - (choice["finish_reason"] == "stop" and "stop" not in sampling)
    return choice["text"], choice["finish_reason"], choice["logprobs"]["token_logprobs"][:num_tokens]


def ask_chat(local: Served, row: dict[str, Any], sampling: dict[str, Any]) -> Any:
    body = {
        "model": MODEL,
        "messages": row["messages"],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
    } | sampling
    (choice,) = call(f"{local.url}/v1/chat/completions", body | {"top_logprobs": 1}).json["choices"]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    message = choice["message"]
    return (message.get("reasoning"), message["content"]), choice["finish_reason"], logprobs


@pytest.mark.parametrize(
    ("kind", "ask", "dtype"),
    [
        ("prompt", ask_prompt, "float32"),
        ("messages", ask_chat, "bfloat16"),
        ("prompt", ask_prompt, "bfloat16"),
        ("messages", ask_chat, "float32"),
    ],
)
def test_greedy(tmp_path: Path, kind: str, ask: Any, dtype: str) -> None:
    table = pq.read_table(TINY.parent / "heldout.parquet")
    rows = table.take([*range(0, table.num_rows, 8), 0, 8, 8]).to_pylist()  # a job computes the last ones once
    with served(dtype=dtype, reasoning=REASONING) as local, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda row: ask(local, row, {}), rows))
    assert answers == batch(tmp_path, rows, kind, dtype, {})
    assert len({text for text, _, _ in answers}) > 20
    if kind == "messages":
        assert {reasoning is None for (reasoning, _), _, _ in answers} == {True, False}


def test_with_stop_strings_and_penalties(tmp_path: Path) -> None:
    sampling = {"stop": ["a", ", "], "repetition_penalty": 1.2, "frequency_penalty": 0.5, "min_tokens": 2}
    rows = pq.read_table(TINY.parent / "heldout.parquet").slice(0, 30).to_pylist()
    with served() as local, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda row: ask_prompt(local, row, sampling)[:2], rows))
    assert answers == [answer[:2] for answer in batch(tmp_path, rows, "prompt", "float32", sampling)]
