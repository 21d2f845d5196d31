"""Inspect chat templates, in the dialect of Jinja that transformers uses.

The dialect has loop controls and `generation` blocks.
"""

import json
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import date, datetime, time
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from moray.engine.settings.problems import nearest

_TOOL_ROLE = re.compile("[\"']tool[\"']")
_CLOCK = "strftime_now"  # the function that a template calls for the date

# Names that a template may read and that nobody may set: what every template is given, and the other arguments of
# transformers' apply_chat_template. `documents` is one of those too, and a variable like any other here.
RESERVED = frozenset({
    "messages", "conversation", "conversations", "tools", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", "additional_special_tokens",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
})  # fmt: skip


class _Generation(Extension):
    """Renders the content of `{% generation %}` blocks, which mark the model's text for training, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own shape

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template_mistake(text: str) -> str | None:
    """Return where Jinja cannot parse a template, or None if it can."""
    try:
        _environment().compile(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def reads_clock(text: str) -> bool:
    """Return whether a template may put the date into its prompts, for which transformers offers only strftime_now."""
    return _CLOCK in _find_names(text)


def find_variables(text: str) -> list[str]:
    """Return the names of the variables that a template reads and that may be set, in order."""
    return sorted(_find_names(text) - RESERVED - {_CLOCK})


def reads_tools(text: str) -> bool:
    """Return whether a template puts the tools of a request into its prompts."""
    return "tools" in _find_names(text)


def shows_tool_calls(text: str) -> bool:
    """Return whether a template puts calls of tools in earlier answers, and the results of tools, into its prompts."""
    return "tool_calls" in text and _TOOL_ROLE.search(text) is not None


def find_reserved_mistake(name: str) -> str | None:
    """Return why nobody may set a variable of this name, or None."""
    if name == _CLOCK:
        return f"{name!r} is the clock of chat templates and cannot be set"
    return f"{name!r} is given to every chat template and cannot be set" if name in RESERVED else None


def find_variable_mistake(name: str, variables: Collection[str]) -> str | None:
    """Return why a variable of this name would not reach any prompt, or None.

    variables: those that the chat template reads; see find_variables
    """
    if name in variables:
        return None
    if (mistake := find_reserved_mistake(name)) is not None:
        return mistake
    return f"the chat template never reads {name!r}" + (nearest(name, variables) if variables else ", nor any other")


@lru_cache(maxsize=16)
def _find_names(text: str) -> frozenset[str]:
    """Return the names that a template reads from outside."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(text)))


@lru_cache(maxsize=16)
def stop_clock(text: str, today: date) -> str:
    """Return the template with a fixed clock instead of transformers' own; it shows the beginning of a day."""
    begin = datetime.combine(today, time())
    known = json.dumps({form: begin.strftime(form) for form in sorted(_find_formats(_environment().parse(text)))})
    unknown = "strftime_now needs formats that are literal in the template, not "
    clock = f'{{{{ ({known})[format] if format in {known} else raise_exception("{unknown}" ~ format) }}}}'
    return f"{{% macro {_CLOCK}(format) %}}{clock}{{% endmacro %}}\n{text}"  # Jinja is configured to drop that newline


def _find_formats(template: nodes.Template) -> set[str]:
    """Return the formats in which a template may ask for the date.

    They are the constant arguments of calls of the clock, and every constant text that could be a format, which may
    reach the clock through a variable or a macro.
    """
    texts: set[str] = set()
    for node in template.find_all((nodes.Const, nodes.Add, nodes.Concat)):
        with suppress(nodes.Impossible):
            value = node.as_const()
            if isinstance(value, str) and "%" in value:
                texts.add(value)
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == _CLOCK and call.args:
            with suppress(nodes.Impossible):
                texts.add(str(call.args[0].as_const()))
    return texts


def _environment() -> Environment:
    return Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])


def find_default_mistake(templates: Iterable[str]) -> str | None:
    """Return the mistake if none of a checkpoint's templates, given by their names, is named default; else None."""
    names = list(templates)
    if "default" in names:
        return None
    listed = ", ".join(names) or "none"
    return f"the checkpoint has several chat templates ({listed}), none named default; name one of them default"
