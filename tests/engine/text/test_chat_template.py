"""Tests that the checks of a template before a job agree with what transformers does when it renders the first chat."""

from datetime import date
from inspect import Parameter, signature

import pytest

from moray.engine.errors import RequestError
from moray.engine.text.chat_template import RESERVED, find_template_mistake, find_variable_mistake, find_variables
from moray.engine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "?"}]
THINKS = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
EFFORT = (  # as in gpt-oss: a macro sets it where nobody does
    "{% macro system() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "Reasoning: {{ reasoning_effort }}{{ strftime_now('%Y') if dated }}{% endmacro %}{{ system() }}"
)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "{% for m in messages %}{% generation %}{{ m.content | tojson(indent=2) }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}{% endfor %}",
        "{{ raise_exception('no') if nobody is defined }}{% macro f(a=1) %}{{ a }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template(tokenizers: dict[str, Tokenizer], text: str) -> None:
    assert find_template_mistake(text) is None
    for tokenizer in tokenizers.values():
        tokenizer.render_chat(CHAT, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ foo(", "line 1: unexpected 'end of template'"),
        ("a\n{% for m in messages %}{{ m }}", "line 2: Unexpected end of template."),
        ("{% generation %}", "line 1: Unexpected end of template."),
        ("{{ messages | reversed }}", "line 1: No filter named 'reversed'."),
        ("\n\n{% call_me %}", "line 3: Encountered unknown tag 'call_me'."),
    ],
)
def test_what_is_no_template(tokenizers: dict[str, Tokenizer], text: str, message: str) -> None:
    found = find_template_mistake(text)
    assert found is not None and found.startswith(message)
    for tokenizer in tokenizers.values():
        with pytest.raises(RequestError) as caught:
            tokenizer.render_chat(CHAT, text)
        assert caught.value.code == "bad_messages" and message.split(": ")[1] in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "{{ strftime_now('%Y-%m-%d') }}",
        "{{ strftime_now('%Y-' + '%m-' ~ '%d') }}",
        "{% set form = '%Y-%m-%d' %}{{ strftime_now(form) }}",
        "{% set form = '%Y-' + '%m-' ~ '%d' %}{{ strftime_now(form) }}",
        "{% macro day(form) %}{{ strftime_now(form) }}{% endmacro %}{{ day('%Y-%m-%d') }}",
        "{{ strftime_now('2020-01-02') }}",
    ],
)
def test_a_template_is_given_the_date(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.render_chat(CHAT, text, date(2020, 1, 2)) == "2020-01-02"


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", []),
        (THINKS, ["enable_thinking"]),
        (EFFORT, ["dated", "reasoning_effort"]),
        ("{% set style = style | default('short') %}{{ style }}{% set own = 1 %}{{ own }}", ["style"]),
        ("{{ documents | tojson if documents }}{{ tools }}", ["documents"]),
    ],
)
def test_variables_that_a_template_reads(text: str, variables: list[str]) -> None:
    assert find_variables(text) == variables


def test_a_template_is_given_its_variables(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        plain, off = (tokenizer.render_chat(CHAT, THINKS, None, values) for values in ({}, {"enable_thinking": False}))
        assert off == plain + "<think></think>"
        (ids, error) = tokenizer.encode_chats([CHAT] * 2, THINKS, variables=[{"enable_thinking": False}, {}])
        assert ids != error and ids == tokenizer.encode_chat(CHAT, THINKS, {"enable_thinking": False})
        with pytest.raises(RequestError, match="the rendered chat is not valid Unicode"):
            tokenizer.render_chat(CHAT, "{{ style }}", None, {"style": "\ud800"})


def test_variables_that_reach_no_prompt() -> None:
    known = find_variables(THINKS)
    assert find_variable_mistake("enable_thinking", known) is None
    assert find_variable_mistake("enable_thinkin", known) == (
        "the chat template never reads 'enable_thinkin'; did you mean 'enable_thinking'?"
    )
    assert find_variable_mistake("style", []) == "the chat template never reads 'style', nor any other"
    for name in ("messages", "tools", "bos_token", "add_generation_prompt"):
        assert find_variable_mistake(name, known) == f"{name!r} is given to every chat template and cannot be set"
    assert (
        find_variable_mistake("strftime_now", known)
        == "'strftime_now' is the clock of chat templates and cannot be set"
    )


def test_no_variable_is_an_argument_of_transformers(tokenizers: dict[str, Tokenizer]) -> None:
    arguments = signature(tokenizers["byte_level"]._tokenizer.apply_chat_template).parameters.values()
    assert {one.name for one in arguments if one.kind is not Parameter.VAR_KEYWORD} - {"documents"} <= RESERVED
