"""Tests that the checks of a template before a job agree with what transformers does when it renders the first chat."""

from datetime import date

import pytest

from moray.engine.errors import RequestError
from moray.engine.text.chat_template import find_template_mistake
from moray.engine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "?"}]


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
