"""Grammars that end their process, or would run for ever, end the one that checks them, and nothing else."""

import pytest

from moray.engine.errors import RequestError
from moray.engine.structured.checker import GrammarChecker, check_apart
from moray.engine.structured.constraint import Structured

FINE = Structured("regex", "a+")
CHAIN = Structured("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "a"')
SLOW = Structured.from_value(
    "json_schema", {"type": "string", "allOf": [{"pattern": f".*{number}.*"} for number in range(60)]}
)


def test_what_ends_the_process_or_takes_too_long_is_a_mistake_and_the_next_one_is_checked() -> None:
    checker = GrammarChecker()
    for structured, message in ((CHAIN, "is too large or too deeply nested"), (SLOW, "takes longer than 0.3 s")):
        with pytest.raises(RequestError, match=message) as found:
            checker.check(structured, cpu_limit_s=0.3)
        assert found.value.code == "bad_grammar"
        checker.check(FINE, cpu_limit_s=10)
    checker.close()


def test_a_mistake_has_the_words_that_it_has_in_this_process() -> None:
    wrong = Structured("regex", "(a")
    check_apart(FINE)
    with pytest.raises(RequestError) as here:
        wrong.check()
    with pytest.raises(RequestError) as apart:
        check_apart(wrong)
    assert (apart.value.code, apart.value.message) == (here.value.code, here.value.message)
