"""Make questions with answers that can be checked, on which the tiny Phi-MoE is trained and tested.

Every question has a key, and the key alone decides whether it is held out. So a held-out question never occurs in
training, in any wording, neither as a raw prompt nor as a chat.
"""

import csv
import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "words"
SORT_WORDS = (FOLDER / "sorted.txt").read_text().split()
WORDS = (FOLDER / "spelled.txt").read_text().split()
with (FOLDER / "countries.csv").open() as file:
    COUNTRIES = {row["country"]: row for row in csv.DictReader(file)}

HELD_OUT_SHARE = 4  # one key in four


@dataclass(frozen=True)
class Question:
    """Holds a question in two forms, with its answer.

    key:       what is asked, without its wording
    prompt:    raw text; the model continues it with a space and the answer
    question:  the same as a user's message; the model answers with the answer alone
    held_out:  True where training must not use it
    """

    task: str
    key: str
    prompt: str
    question: str
    answer: str
    held_out: bool


def bucket(key: str, buckets: int) -> int:
    """Return the number of a key's bucket, by its hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % buckets


def hashed(task: str, key: str, wordings: list[tuple[str, str]], answer: str, rng: random.Random) -> Question:
    """Return a question in one of its wordings; the hash of its key decides whether it is held out."""
    prompt, question = rng.choice(wordings)
    key = f"{task} {key}"
    return Question(task, key, prompt, question, answer, bucket(key, HELD_OUT_SHARE) == 0)


def add(rng: random.Random) -> Question:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    wordings = [
        (f"{a} + {b} =", f"What is {a} + {b}?"),
        (f"The sum of {a} and {b} is", f"Add {a} and {b}."),
    ]
    # 17 + 25 and 25 + 17 share a key.
    return hashed("add", f"{min(a, b)} {max(a, b)}", wordings, str(a + b), rng)


def largest(rng: random.Random) -> Question:
    a, b, c = numbers = rng.sample(range(10, 100), 3)
    wordings = [
        (f"The largest of {a}, {b} and {c} is", f"Which is the largest: {a}, {b} or {c}?"),
        (f"max({a}, {b}, {c}) =", f"Find the largest of {a}, {b} and {c}."),
    ]
    return hashed("largest", " ".join(map(str, sorted(numbers))), wordings, str(max(numbers)), rng)


def sort(rng: random.Random) -> Question:
    words = rng.sample(SORT_WORDS, rng.randint(3, 4))
    listed = ", ".join(words)
    wordings = [
        (f"{listed} in alphabetical order:", f"Put these words in alphabetical order: {listed}."),
        (f"{listed} sorted:", f"Sort these words: {listed}."),
    ]
    return hashed("sort", " ".join(sorted(words)), wordings, ", ".join(sorted(words)), rng)


def some_word(rng: random.Random) -> str:
    """Return a real word or random letters: there are too few real words to learn spelling."""
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    letters = rng.sample(string.ascii_uppercase, rng.randint(3, 8))
    return "".join(rng.choices(letters, k=rng.randint(3, 8)))


def reverse(rng: random.Random, word: str) -> Question:
    wordings = [
        (f"{word} reversed is", f"Reverse the word {word}."),
        (f"{word} spelled backwards is", f"Spell {word} backwards."),
    ]
    return hashed("reverse", word, wordings, word[::-1], rng)


def count(rng: random.Random, word: str) -> Question:
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_uppercase)
    wordings = [
        (f"The number of {letter} in {word} is", f"How many times does {letter} occur in {word}?"),
        (f"Count of {letter} in {word}:", f"Count the letter {letter} in {word}."),
    ]
    return hashed("count", word, wordings, str(word.count(letter)), rng)


RELATIONS = {
    "capital": [
        ("The capital of {0} is", "What is the capital of {0}?"),
        ("The name of the capital of {0} is", "Name the capital of {0}."),
        ("{0}'s capital is", "Tell me the capital of {0}."),
        ("{0} is governed from its capital,", "Which city is the capital of {0}?"),
        ("If you visit the capital of {0}, you are in", "What is {0}'s capital?"),
    ],
    "continent": [
        ("{0} is a country in", "On which continent is {0}?"),
        ("The continent of {0} is", "Name the continent of {0}."),
        ("{0} lies in", "Where in the world does {0} lie?"),
        ("On the map, {0} is found in", "Tell me the continent of {0}."),
        ("If you visit {0}, you are in", "What continent is {0} in?"),
    ],
    "language": [
        ("In {0} people speak", "What language do people speak in {0}?"),
        ("The language of {0} is", "Name the language of {0}."),
        ("The main language in {0} is", "Which language is spoken in {0}?"),
        ("People in {0} talk to each other in", "Tell me the language of {0}."),
        ("A newspaper in {0} is written in", "What do people in {0} speak?"),
    ],
}


def fact(country: str, relation: str, wording: int) -> Question:
    """Return the question about a fact. One of its five wordings, chosen by the fact's hash, is held out."""
    prompt, question = (text.format(country) for text in RELATIONS[relation][wording])
    held_out = wording == bucket(f"{country} {relation}", len(RELATIONS[relation]))
    answer = COUNTRIES[country][relation]
    return Question("fact", f"fact {country} {relation} {wording}", prompt, question, answer, held_out)


def some_fact(rng: random.Random) -> Question:
    relation = rng.choice(list(RELATIONS))
    return fact(rng.choice(list(COUNTRIES)), relation, rng.randrange(len(RELATIONS[relation])))


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "add": add,
    "largest": largest,
    "sort": sort,
    "reverse": lambda rng: reverse(rng, some_word(rng)),
    "count": lambda rng: count(rng, some_word(rng)),
    "fact": some_fact,
}

# The tasks that the trained model is asked. Words are real ones, which a reader can check at a glance. Counting letters
# is trained too, but not learnt well enough.
ASKED: dict[str, Callable[[random.Random], Question]] = {
    "add": add,
    "largest": largest,
    "sort": sort,
    "reverse": lambda rng: reverse(rng, rng.choice(WORDS)),
    "fact": some_fact,
}


def training(rng: random.Random, weights: dict[str, float]) -> Iterator[Question]:
    """Yield questions for ever, none of them held out, with the tasks in proportion to `weights`."""
    while True:
        [task] = rng.choices(list(weights), list(weights.values()))
        question = TASKS[task](rng)
        if not question.held_out:
            yield question


def held_out(task: str, number: int, seed: int) -> list[Question]:
    """Return `number` held-out questions with different keys, the same ones for the same seed."""
    rng = random.Random(f"{seed} {task}")
    found: dict[str, Question] = {}
    for _ in range(1000 * number):
        question = ASKED[task](rng)
        if question.held_out:
            found.setdefault(question.key, question)
        if len(found) == number:
            return list(found.values())
    raise ValueError(f"task {task!r} has fewer than {number} held-out questions")
