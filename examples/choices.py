"""Make wrong answers to a question: of the same kind as the right one and, for numbers, close to it."""

import random

from tasks import COUNTRIES, Question

NUM_WRONG = 3


def choices(question: Question, rng: random.Random) -> list[str]:
    """Return the answer and up to NUM_WRONG wrong ones, in random order."""
    wrong = sorted(set(_candidates(question, rng)) - {question.answer})
    chosen = [question.answer, *rng.sample(wrong, min(NUM_WRONG, len(wrong)))]
    return rng.sample(chosen, len(chosen))


def _candidates(question: Question, rng: random.Random) -> list[str]:
    _, *key = question.key.split()
    match question.task:
        case "add":
            return [str(abs(int(question.answer) + step)) for step in (-10, -2, -1, 1, 2, 10)]
        case "largest":
            return key
        case "sort":
            return [", ".join(rng.sample(key, len(key))) for _ in range(20)]
        case "reverse":
            word = key[0]
            return [word, *("".join(rng.sample(word, len(word))) for _ in range(20))]
        case "fact":
            return [country[key[1]] for country in COUNTRIES.values()]
    raise ValueError(f"task {question.task!r} has no choices")
