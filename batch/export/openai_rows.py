"""Turn the rows of a job into the lines of an output file of OpenAI's Batch API."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from moray.batch.export.json_rows import Row

CUSTOM_ID = "custom_id"  # the column with the ids of requests, where the job kept one


def to_openai(rows: Iterable[Row], model: str, *, is_chat: bool) -> Iterator[Row]:
    """Yield a line for each input row: its samples are the choices.

    model:    the name of the model
    is_chat:  whether the job's input is messages
    """
    for (file, number), samples in groupby(rows, key=lambda row: (row["source_file"], row["source_row"])):
        name = f"{file}:{number}"
        yield _line(name, list(samples), model, is_chat)


def _line(name: str, samples: Sequence[Row], model: str, is_chat: bool) -> Row:
    first = samples[0]
    error, custom_id = first["error"], first.get(CUSTOM_ID)
    line: Row = {"id": f"batch_req_{name}", "custom_id": name if custom_id is None else custom_id}
    if error is not None:
        return line | {"response": None, "error": {"code": error["code"], "message": error["message"]}}
    prompt, generated = first["num_prompt_tokens"], sum(row["num_generated_tokens"] for row in samples)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "model": model,
        "choices": [_choice(row, is_chat) for row in samples],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }
    return line | {"response": {"status_code": 200, "request_id": name, "body": body}, "error": None}


def _choice(row: Row, is_chat: bool) -> Row:
    choice: dict[str, Any] = {"index": row["sample"], "finish_reason": row["finish_reason"], "logprobs": None}
    if not is_chat:
        return choice | {"text": row["generated_text"]}
    message = {"role": "assistant", "content": row["generated_text"]}
    if row.get("reasoning") is not None:
        message["reasoning_content"] = row["reasoning"]
    return choice | {"message": message}
