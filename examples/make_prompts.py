"""Write the held-out questions and the demo's inputs, the same ones each time: `python examples/make_prompts.py`."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tasks
from choices import choices
from tiny_tokenizer import SYSTEM

EXAMPLES = Path(__file__).parent
PER_TASK = 100  # held-out questions of a task
PER_TASK_SHOWN = 60  # of them, those in the demo
PER_TASK_CHOSEN = 40  # of them, those with choices
FILES = 3  # files of each input
TOO_LONG = " ".join(f"{number} + {number} =" for number in range(1000))
TEXT = [("id", pa.string()), ("task", pa.string())]
MESSAGES = ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
HELD_OUT = pa.schema([*TEXT, ("prompt", pa.string()), MESSAGES, ("expected", pa.string())])
PROMPTS = pa.schema([*TEXT, ("prompt", pa.string()), ("expected", pa.string())])
CHOICES = pa.schema([*TEXT, ("prompt", pa.string()), ("choices", pa.list_(pa.string())), ("expected", pa.string())])
CHATS = pa.schema([*TEXT, MESSAGES, ("expected", pa.string())])


def held_out() -> list[dict[str, Any]]:
    """Return PER_TASK rows of each task; every fourth chat has a system message."""
    rows = []
    for task in tasks.ASKED:
        for number, question in enumerate(tasks.held_out(task, PER_TASK, seed=1)):
            system = [{"role": "system", "content": SYSTEM}] if number % 4 == 0 else []
            messages = [*system, {"role": "user", "content": question.question}]
            rows.append(
                {"id": f"{task}-{number:03}", "task": task, "prompt": question.prompt, "messages": messages}
                | {"expected": question.answer}
            )
    return rows


def shown() -> list[dict[str, Any]]:
    """Return the held-out rows of the demo, with the tasks mixed."""
    rows = [row for row in held_out() if int(row["id"][-3:]) < PER_TASK_SHOWN]
    random.Random(0).shuffle(rows)
    return rows


def wrong_prompts() -> list[dict[str, Any]]:
    """Return rows that no model can answer: each becomes an error row of the output."""
    wrong = {"wrong-null": None, "wrong-empty": "", "wrong-too-long": TOO_LONG}
    return [{"id": name, "task": "wrong", "prompt": prompt, "expected": None} for name, prompt in wrong.items()]


def wrong_chats() -> list[dict[str, Any]]:
    wrong = {"wrong-null": None, "wrong-too-long": [{"role": "user", "content": TOO_LONG}]}
    return [{"id": name, "task": "wrong", "messages": chat, "expected": None} for name, chat in wrong.items()]


def chosen() -> list[dict[str, Any]]:
    """Return held-out questions with answers to choose from, each after a space, as it would continue the prompt."""
    rng = random.Random(0)
    rows = [
        {"id": f"{task}-{number:03}", "task": task, "prompt": question.prompt, "expected": question.answer}
        | {"choices": [f" {choice}" for choice in choices(question, rng)]}
        for task in tasks.ASKED
        for number, question in enumerate(tasks.held_out(task, PER_TASK_CHOSEN, seed=1))
    ]
    rng.shuffle(rows)
    return rows


def wrong_choices() -> list[dict[str, Any]]:
    wrong: dict[str, tuple[str, list[str | None]]] = {
        "wrong-null": ("2 + 2 =", [" 4", None]),
        "wrong-none": ("2 + 2 =", []),
        "wrong-too-long": (TOO_LONG, [" 4"]),
    }
    rows = [{"id": name, "prompt": prompt, "choices": given} for name, (prompt, given) in wrong.items()]
    return [row | {"task": "wrong", "expected": None} for row in rows]


def spread(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write the rows to FILES files of one row group each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        part = [{name: row[name] for name in schema.names} for row in rows[number::FILES]]
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"{folder.name}-{number}.parquet")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the chats of the rows as JSON lines, as chat datasets are published: every second one in ShareGPT's names,
    and one line that is no JSON."""
    lines = []
    for number, row in enumerate(rows):
        if number % 2:
            names = {"user": "human", "system": "system"}
            chat = [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]
        else:
            chat = row["messages"]
        lines.append(json.dumps({"id": row["id"], "messages": chat, "expected": row["expected"]}, ensure_ascii=False))
    lines.insert(20, lines[20][:-10])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def insert(rows: list[dict[str, Any]], wrong: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the wrong ones inserted among them."""
    for number, row in enumerate(wrong):
        rows.insert(20 + 10 * number, row)
    return rows


def main(folder: Path = EXAMPLES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(held_out(), HELD_OUT), folder / "heldout.parquet")
    spread(folder / "prompts", insert(shown(), wrong_prompts()), PROMPTS)
    spread(folder / "chat", insert(shown(), wrong_chats()), CHATS)
    write_lines(folder / "lines" / "chats.jsonl.gz", shown()[:100])
    spread(folder / "choices", insert(chosen(), wrong_choices()), CHOICES)


if __name__ == "__main__":
    main()
