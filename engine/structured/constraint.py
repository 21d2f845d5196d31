"""Structured: what a completion must obey: a JSON schema, a regular expression, a choice or a grammar.

llguidance follows it. It is strict: a keyword that it cannot follow is refused by its name, never ignored.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from moray.engine.errors import RequestError, show
from moray.engine.structured import json_schema, mistakes

Kind = Literal["json_schema", "regex", "choice", "grammar", "json_object"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_BYTES = 256 * 1024  # of the text
MAX_GBNF_BYTES = 16 * 1024  # llguidance translates it in Python: the time grows with the cube of its rules
MAX_COMPILED = 256  # different ones that an engine keeps compiled, those that were used last


@dataclass(frozen=True)
class Structured:
    """States what a completion must obey.

    kind: which of KINDS it is
    text: a JSON schema as compact JSON, with its properties in the order in which they are to be written; a regular
          expression in Rust's syntax; the choices as a JSON list of texts; a grammar in Lark's or GBNF's syntax, GBNF
          if it has `::=`; nothing for json_object, which is any JSON object

    Making one raises RequestError("bad_grammar") for what breaks a rule of ours; check() asks llguidance.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        """Check the rules that are ours: sizes, and what llguidance would do and should not."""
        if (mistake := _find_own_mistake(self)) is not None:
            raise _bad(mistake)

    @classmethod
    def from_value(cls, kind: Kind, value: object) -> Self:
        """Make one of what a user wrote, without asking llguidance; check() does.

        value: for json_schema an object, true or false, or JSON text of one; for regex and grammar a text; for choice a
               list of texts; for json_object true

        Raises RequestError("bad_grammar") for a value of another type, or one beyond the limits.
        """
        texts = {
            "json_schema": _schema_text,
            "regex": _plain_text,
            "grammar": _plain_text,
            "choice": _choice_text,
            "json_object": _object_text,
        }
        return cls(kind, texts[kind](kind, value))

    def check(self) -> None:
        """Raise RequestError("bad_grammar") unless llguidance can follow it; no tokenizer is needed.

        It takes about as long as compiling it, and may take hours or end the process: see check_apart.
        """
        if (mistake := _find_mistake(self)) is not None:
            raise _bad(mistake)

    def to_grammar(self) -> str:
        """Return the grammar as llguidance compiles it. Raises RequestError("bad_grammar") for GBNF with mistakes."""
        from llguidance import LLMatcher, regex_to_lark

        match self.kind:
            case "json_object":
                prepared = json_schema.prepare({"type": "object"})
            case "json_schema":
                prepared = json_schema.prepare(json.loads(self.text))
            case "regex" | "choice":
                # \d, \w and \s are ASCII, as in JSON Schema: a model should not answer with Arabic digits.
                return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self._to_regex(), 'dws')}/")
            case "grammar":
                return LLMatcher.grammar_from_lark(_gbnf_to_lark(self.text) if "::=" in self.text else self.text)
        return LLMatcher.grammar_from_json_schema(json.dumps(prepared, ensure_ascii=False, separators=(",", ":")))

    def _to_regex(self) -> str:
        """Return the regular expression; of choices the one that matches each of them."""
        return self.text if self.kind == "regex" else "|".join(map(re.escape, json.loads(self.text)))


def _schema_text(kind: Kind, value: object) -> str:
    if isinstance(value, str):
        _check_size(kind, value)
        value = _read_json(value)
    if not isinstance(value, Mapping | bool):
        raise _bad(f"{kind} must be an object, true or false, is {show(value)}")
    try:
        _check_keys(value)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise _bad(f"{kind} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise _bad(f"{kind} is not JSON: {error}") from None


def _read_json(text: str) -> Any:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _bad(f"json_schema has an object with the key {show(twice)} twice")
        return keys

    try:
        return json.loads(text, object_pairs_hook=refuse_twice)
    except RecursionError:
        raise _bad("json_schema is nested too deeply") from None
    except ValueError as error:
        raise _bad(f"json_schema is not JSON: {error}") from None


def _check_keys(value: object) -> None:
    """Refuse keys that are not text: JSON would make texts of them that nobody wrote."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise _bad(f"json_schema has the key {show(key)}, which must be text; quote it")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def _plain_text(kind: Kind, value: object) -> str:
    if not isinstance(value, str):
        raise _bad(f"{kind} must be text, is {show(value)}")
    return value


def _choice_text(kind: Kind, value: object) -> str:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise _bad(f"{kind} must be a list of texts, is {show(value)}")
    return json.dumps(list(value), ensure_ascii=False, separators=(",", ":"))


def _object_text(kind: Kind, value: object) -> str:
    if value is not True:
        raise _bad(f"{kind} must be true, is {show(value)}")
    return ""


def _check_size(kind: Kind, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _bad(f"{kind} is not valid Unicode at character {error.start}") from None
    if size > MAX_BYTES:
        raise _bad(f"{kind} has {size:,} bytes; at most {MAX_BYTES:,} are allowed")
    if kind == "grammar" and "::=" in text and size > MAX_GBNF_BYTES:
        raise _bad(
            f"{kind} has {size:,} bytes of GBNF; at most {MAX_GBNF_BYTES:,} are allowed. Lark's syntax may have "
            f"{MAX_BYTES:,}."
        )


def _find_own_mistake(structured: Structured) -> str | None:
    """Return what breaks a rule of ours, or None."""
    kind, text = structured.kind, structured.text
    try:
        _check_size(kind, text)
        if kind == "json_schema":
            return json_schema.find_mistake(json.loads(text))
    except RequestError as error:
        return error.message
    except RecursionError:
        return f"{kind} is nested too deeply"
    except ValueError as error:
        return f"{kind} is not JSON: {error}"
    if kind in ("regex", "grammar") and not text:
        return f"{kind} is empty"
    if kind == "choice":
        choices: list[str] = json.loads(text)
        if not choices:
            return "choice is empty; it needs at least one text"
        if "" in choices:
            return "choice has an empty text; each must have a character"
        if len(set(choices)) < len(choices):
            twice = next(choice for choice in choices if choices.count(choice) > 1)
            return f"choice has {show(twice)} twice"
    return None


def _find_mistake(structured: Structured) -> str | None:
    """Return why llguidance cannot make a completion obey, or None."""
    kind, text = structured.kind, structured.text
    try:
        if (message := _validate(structured)) is None:
            return None
        if kind == "json_schema":
            return mistakes.describe_schema(
                json.loads(text), message, lambda schema: _validate(Structured(kind, json.dumps(schema)))
            )
    except RequestError as error:
        return error.message
    except (ValueError, RecursionError) as error:
        return f"{kind}: {error}"
    if kind == "regex":
        return mistakes.describe_regex(message)
    return mistakes.describe_grammar(message, is_gbnf="::=" in text)


def _validate(structured: Structured) -> str | None:
    """Return llguidance's message about a grammar, or None if it can follow it."""
    from llguidance import LLMatcher

    grammars = [structured.to_grammar()]
    if structured.kind == "regex":  # the user's own comes first, so that places in it are those of the user's
        grammars.insert(0, LLMatcher.grammar_from_regex(structured.text))
    for grammar in grammars:
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if is_error:
            return messages[0].strip()
    return None


def _gbnf_to_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # it raises several, some of them plain ones
        raise _bad(f"grammar is not GBNF: {error or type(error).__name__}") from None


def _bad(message: str) -> RequestError:
    return RequestError("bad_grammar", message, field="structured")
