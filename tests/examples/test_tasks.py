"""The questions: right answers, held-out ones never in training, shipped files the script's own."""

import gzip
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import make_prompts
import pyarrow.parquet as pq
import pytest
import tasks
from repository import EXAMPLES


def test_training_never_asks_a_held_out_question() -> None:
    held_out = [question for task in tasks.ASKED for question in tasks.held_out(task, 100, seed=1)]
    weights = dict.fromkeys(tasks.TASKS, 1.0)
    trained = list(islice(tasks.training(random.Random(5), weights), 20_000))
    assert not {question.key for question in held_out} & {question.key for question in trained}
    texts = {text for question in trained for text in (question.prompt, question.question)}
    assert not texts & {text for question in held_out for text in (question.prompt, question.question)}


def test_swapped_numbers_are_the_same_question() -> None:
    rng = random.Random(0)
    questions = [tasks.add(rng) for _ in range(2000)]
    numbers = {tuple(q.prompt.split()[0:3:2]): q.held_out for q in questions if " + " in q.prompt}
    pairs = [(held, numbers[b, a]) for (a, b), held in numbers.items() if (b, a) in numbers]
    assert len(pairs) > 20
    assert all(one == other for one, other in pairs)


def test_each_fact_is_held_out_in_one_wording_and_trained_in_the_others() -> None:
    for relation, wordings in tasks.RELATIONS.items():
        for country in tasks.COUNTRIES:
            facts = [tasks.fact(country, relation, wording) for wording in range(len(wordings))]
            assert sum(fact.held_out for fact in facts) == 1


def test_a_task_without_enough_held_out_questions_says_so() -> None:
    with pytest.raises(ValueError, match="'fact' has fewer than 500 held-out questions"):
        tasks.held_out("fact", 500, seed=1)


RIGHT: dict[str, Callable[[list[str]], str]] = {
    "add": lambda key: str(int(key[0]) + int(key[1])),
    "largest": lambda key: str(max(map(int, key))),
    "sort": lambda key: ", ".join(key),
    "reverse": lambda key: "".join(reversed(key[0])),
    "fact": lambda key: tasks.COUNTRIES[key[0]][key[1]],
}


@pytest.mark.parametrize("task", tasks.ASKED)
def test_answers_are_right(task: str) -> None:
    for question in tasks.held_out(task, 50, seed=2):
        assert question.answer == RIGHT[task](question.key.split()[1:])


def test_the_shipped_prompts_are_what_the_script_writes(tmp_path: Path) -> None:
    make_prompts.main(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.parquet"))
    shipped = sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.parquet"))
    assert written == shipped
    for name in written:
        assert pq.read_table(tmp_path / name).equals(pq.read_table(EXAMPLES / name)), name
    lines = [gzip.decompress((folder / "lines/chats.jsonl.gz").read_bytes()) for folder in (tmp_path, EXAMPLES)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("folder", "column", "rows"), [("prompts", "prompt", 303), ("chat", "messages", 302)])
def test_the_demo_has_rows_that_cannot_be_answered(folder: str, column: str, rows: int) -> None:
    table = pq.read_table(EXAMPLES / folder).to_pylist()
    wrong = {row["id"]: row[column] for row in table if row["task"] == "wrong"}
    assert len(table) == rows
    assert wrong["wrong-null"] is None
    assert make_prompts.TOO_LONG in str(wrong["wrong-too-long"])
    assert len(make_prompts.TOO_LONG.split()) > 2048
    assert column == "messages" or wrong["wrong-empty"] == ""


def test_the_right_answer_is_one_of_the_choices_and_the_others_are_wrong() -> None:
    table = pq.read_table(EXAMPLES / "choices").to_pylist()
    asked = [row for row in table if row["task"] != "wrong"]
    assert (len(table), len(asked)) == (203, 200)
    for row in asked:
        assert row["choices"].count(f" {row['expected']}") == 1, row
        assert len(set(row["choices"])) == len(row["choices"]) == (3 if row["task"] == "largest" else 4), row
    assert len({row["choices"].index(f" {row['expected']}") for row in asked}) == 4
    wrong = {row["id"]: row["choices"] for row in table if row["task"] == "wrong"}
    assert wrong == {"wrong-null": [" 4", None], "wrong-none": [], "wrong-too-long": [" 4"]}
