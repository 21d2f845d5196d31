"""Evaluate input.where on the rows of a file, as an expression of Arrow that nulls do not meet."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import types

from moray.batch.json_values import json_kinds
from moray.batch.spec.where import Column, Node, Value

_OPERATORS = {"==": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}

_UNKNOWN = pc.scalar(pa.scalar(None, pa.bool_()))  # what a comparison with null is


class Condition:
    """Is a condition on rows of one schema.

    schema:      the schema of the rows
    expression:  the condition as Arrow has it

    Raises ValueError where the columns do not have types that can be compared like that.
    """

    def __init__(self, node: Node, schema: pa.Schema) -> None:
        self.schema = schema
        self.expression: pc.Expression = self._build(node)
        try:
            kind = self.evaluate(schema.empty_table()).type
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(str(error).splitlines()[0]) from None
        if not types.is_boolean(kind):
            raise ValueError(f"is {kind}, not true or false")

    def evaluate(self, table: pa.Table) -> Any:
        """Return for each row whether it meets the condition, as an array of true, false and null."""
        return ds.dataset(table).to_table(columns={"is_met": self.expression})["is_met"]

    def _build(self, node: Node) -> Any:
        if isinstance(node, Value):
            return pc.scalar(node.value)
        if isinstance(node, Column):
            return _UNKNOWN if types.is_null(self._type(node)) else pc.field(node.name)
        match node.word:
            case "and" | "or" | "not" as word:
                parts = [self._build(part) for part in node.parts]
                if word == "not":
                    return ~parts[0]
                found = parts[0]
                for part in parts[1:]:
                    found = (found & part) if word == "and" else (found | part)
                return found
        one, other = (*node.parts, node.parts[0])[:2]
        if node.word == "null":
            assert isinstance(one, Column)
            return pc.field(one.name).is_null()
        if any(isinstance(part, Column) and types.is_null(self._type(part)) for part in (one, other)):
            return _UNKNOWN
        if node.word == "in":
            assert isinstance(one, Column) and isinstance(other, Value)
            kind, field = self._type(one), pc.field(one.name)
            values = [self._cast(value, kind, one.name).as_py() for value in other.value]
            return pc.if_else(field.is_valid(), field.isin(pa.array(values, None if values else kind)), _UNKNOWN)
        left, right = (self._operand(part, beside) for part, beside in ((one, other), (other, one)))
        return getattr(left, _OPERATORS[node.word])(right)

    def _operand(self, node: Node, beside: Node) -> Any:
        if isinstance(node, Value) and isinstance(beside, Column):
            return pc.scalar(self._cast(node.value, self._type(beside), beside.name))
        return self._build(node)

    def _type(self, column: Column) -> Any:
        field = self.schema.field(column.name)
        if json_kinds(field) is not None or isinstance(field.type, pa.BaseExtensionType) or types.is_nested(field.type):
            raise ValueError(f"column {column.name!r} has lists, maps or mixed values, which cannot be compared")
        return field.type

    def _cast(self, value: Any, kind: Any, name: str) -> Any:
        """Return a value of the condition as a scalar to compare with a column. Text stands for dates, times and
        decimals."""
        is_text, is_number = isinstance(value, str), isinstance(value, int | float) and not isinstance(value, bool)
        if types.is_temporal(kind) or types.is_decimal(kind):
            fits = is_text or (is_number and types.is_decimal(kind))
            value = str(value)
        elif types.is_string(kind):
            fits = is_text
        elif types.is_boolean(kind):
            fits = isinstance(value, bool)
        else:
            fits = is_number and (types.is_integer(kind) or types.is_floating(kind))
        if not fits:
            raise ValueError(f"column {name!r} is {kind}, and is compared with {value!r}")
        scalar: Any = pa.scalar(value)
        if types.is_temporal(kind) or types.is_decimal(kind):
            try:
                return scalar.cast(kind)
            except pa.ArrowException as error:
                raise ValueError(f"{value!r} is no {kind}: {str(error).splitlines()[0]}") from None
        return scalar
