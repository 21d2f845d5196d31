"""Parse input.where: a condition on the columns of a row, in Python's syntax, and nothing that could do more."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

_EXAMPLE = "lang == 'en' and score >= 0.5"
_CONSTANTS = {"true": True, "false": False, "null": None}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_TOKEN = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`([^`]+)`""")
_PLACEHOLDER = "_moray_column_"
MAX_LENGTH = 10_000  # characters


@dataclass(frozen=True)
class Column:
    """Stands for a row's value in a column."""

    name: str


@dataclass(frozen=True)
class Value:
    """Is a text, a number, true, false, or a list of them for `in`."""

    value: Any


@dataclass(frozen=True)
class Predicate:
    """Combines columns, values and other predicates.

    word:  and, or, not, in, null, or one of == != < <= > >=
    """

    word: str
    parts: tuple["Node", ...]


Node = Column | Value | Predicate


def parse_where(text: str) -> Node:
    """Return the condition. Raises ValueError where the text is none."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"is longer than {MAX_LENGTH:,} characters")
    quoted: list[str] = []  # names of columns in backquotes

    def hide(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        quoted.append(match[2])
        return f"{_PLACEHOLDER}{len(quoted) - 1}"

    try:
        tree = ast.parse(_TOKEN.sub(hide, text).strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = "; write == for equal" if re.search(r"(?<![=!<>])=(?!=)", text) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"is no condition such as {_EXAMPLE}: {reason}{hint}") from None
    return _Reader(quoted).read(tree.body)


def find_columns(node: Node) -> tuple[str, ...]:
    """Return the columns that a condition reads, each once."""
    return tuple(dict.fromkeys(_columns(node)))


def _columns(node: Node) -> Iterator[str]:
    if isinstance(node, Column):
        yield node.name
    elif isinstance(node, Predicate):
        for part in node.parts:
            yield from _columns(part)


class _Reader:
    """Turns Python's syntax tree into a condition, and refuses all other syntax by name."""

    def __init__(self, quoted: Sequence[str]) -> None:
        self._quoted = quoted

    def read(self, node: ast.expr) -> Node:
        """Return a predicate, or a column of true and false."""
        match node:
            case ast.BoolOp():
                return Predicate("and" if isinstance(node.op, ast.And) else "or", tuple(map(self.read, node.values)))
            case ast.UnaryOp(op=ast.Not()):
                return Predicate("not", (self.read(node.operand),))
            case ast.Compare():
                operands = [node.left, *node.comparators]
                chain = [self._compare(*pair) for pair in zip(node.ops, operands, operands[1:], strict=False)]
                return chain[0] if len(chain) == 1 else Predicate("and", tuple(chain))
            case ast.Name():
                found = self._operand(node)
                if isinstance(found, Column):
                    return found
        raise ValueError(f"has {ast.unparse(node)!r} where a comparison is needed, such as {_EXAMPLE}")

    def _compare(self, operator: ast.cmpop, left: ast.expr, right: ast.expr) -> Predicate:
        one, other = self._operand(left), self._operand(right)
        if isinstance(operator, ast.In | ast.NotIn):
            if not isinstance(other, Value) or not isinstance(other.value, tuple) or isinstance(one, Value):
                raise ValueError("needs a column before `in` and a list after it, such as lang in ['en', 'de']")
            found = Predicate("in", (one, other))
            return Predicate("not", (found,)) if isinstance(operator, ast.NotIn) else found
        nulls = [part for part in (one, other) if isinstance(part, Value) and part.value is None]
        if isinstance(operator, ast.Is | ast.IsNot) or nulls:
            if len(nulls) != 1 or not isinstance(operator, ast.Is | ast.IsNot | ast.Eq | ast.NotEq):
                raise ValueError("compares with `is` or null in another way than: column is null, column is not null")
            found = Predicate("null", (other if nulls[0] is one else one,))
            return found if isinstance(operator, ast.Is | ast.Eq) else Predicate("not", (found,))
        if isinstance(one, Value) and isinstance(other, Value):
            raise ValueError(f"compares {one.value!r} with {other.value!r}; a comparison needs a column")
        if any(isinstance(part, Value) and isinstance(part.value, tuple) for part in (one, other)):
            raise ValueError("compares with a list; use `in`")
        return Predicate(_COMPARISONS[type(operator)], (one, other))

    def _operand(self, node: ast.expr) -> Column | Value:
        match node:
            case ast.Name(id=name) if name in _CONSTANTS:
                return Value(_CONSTANTS[name])
            case ast.Name(id=name) if name.startswith(_PLACEHOLDER):
                return Column(self._quoted[int(name.removeprefix(_PLACEHOLDER))])
            case ast.Name(id=name):
                return Column(name)
            case ast.Constant(value=str() | bool() | int() | float() | None as value):
                return Value(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return Value(-value)
            case ast.List() | ast.Tuple() | ast.Set():
                values = [self._operand(item) for item in node.elts]
                if all(isinstance(item, Value) and not isinstance(item.value, tuple | NoneType) for item in values):
                    return Value(tuple(item.value for item in values if isinstance(item, Value)))
        raise ValueError(f"has {ast.unparse(node)!r}; allowed are columns, texts, numbers, true, false, null and lists")
