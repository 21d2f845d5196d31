"""The columns of an input: those that the job needs, of a type it can use, and those it keeps, of one type."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batch.input.column_types import CONTINUATION_TYPES, INPUT_TYPES, TEMPLATE_TYPE, normalise, sampling_type
from batch.input.footer import InputFile
from batch.output.schema import COLUMNS
from batch.spec import JobSpec
from batch.spec.problems import nearest
from batch.spec.template import PromptTemplate
from engine.errors import InputError, Problem, SpecError

_SHOWN = 20
_KEEP = "output.keep"
_KEEP_LESS = "name the columns to keep in output.keep"


@dataclass(frozen=True)
class _Use:
    """A column that the spec names at `where`, and the type it must have."""

    column: str
    where: str
    allowed: str
    is_right: Callable[[pa.DataType], bool]


def check_columns(spec: JobSpec, files: Sequence[InputFile]) -> tuple[str, ...]:
    """Columns that the spec names, each once. Raises InputError where a file lacks one or has it of a wrong type."""
    uses = list(_uses(spec))
    raise_all(problem for file in files for problem in _check_file(file, uses))
    return tuple(dict.fromkeys(use.column for use in uses))


def prompt_columns(spec: JobSpec) -> tuple[str, ...]:
    """Columns that prompts and their sampling are made of; what is only kept is not among them."""
    return tuple(dict.fromkeys(use.column for use in _uses(spec) if use.where != _KEEP))


def unify_kept(spec: JobSpec, files: Sequence[InputFile]) -> "list[pa.Field[Any]]":
    """The kept columns with one type each; a column without values in one file (null) takes the others' type.

    Raises InputError where a column differs between files, SpecError where one has the name of an output column.
    """
    fields = []
    problems: list[str] = []
    for name in _kept_names(spec, files[0].schema):
        first: InputFile | None = None
        for file in files:
            if name not in file.schema.names:
                problems.append(f"{file.path}: has no column {name!r}, which {files[0].path} has; {_KEEP_LESS}")
            elif not pa.types.is_null(kind := file.schema.field(name).type):
                first = first or file
                known = first.schema.field(name).type
                if normalise(kind) != normalise(known):
                    problems.append(
                        f"{file.path}: column {name!r} is {kind}, but {known} in {first.path}; {_KEEP_LESS}"
                    )
        fields.append(pa.field(name, normalise(first.schema.field(name).type) if first else pa.null()))
    raise_all(problems)
    return fields


def raise_all(problems: Iterable[str]) -> None:
    """Raises InputError with all problems, a line each, where there are any."""
    lines = list(problems)
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
    if lines:
        raise InputError("\n".join(lines))


def _uses(spec: JobSpec) -> Iterator[_Use]:
    """What the job reads beside what it keeps, and what the user asks to keep by name."""
    if spec.template.prompt is not None:
        for column in PromptTemplate(spec.template.prompt).columns:
            yield _Use(column, "template.prompt", *TEMPLATE_TYPE)
    else:
        yield _Use(spec.input.column, f"input.{spec.input.kind}", *INPUT_TYPES[spec.input.kind])
    if spec.input.continuation is not None:
        yield _Use(spec.input.continuation, "input.continuation", *CONTINUATION_TYPES[spec.input.kind])
    for field, column in spec.sampling.columns.items():
        yield _Use(column, f"sampling.columns.{field}", *sampling_type(field))
    for column in spec.output.keep if isinstance(spec.output.keep, tuple) else ():
        yield _Use(column, _KEEP, "of any type", lambda kind: True)


def _check_file(file: InputFile, uses: list[_Use]) -> Iterator[str]:
    names = file.schema.names
    twice = {name for name in names if names.count(name) > 1}
    for name in sorted(twice):
        yield f"{file.path}: has two columns named {name!r}"
    for use in uses:
        if use.column not in names:
            yield f"{file.path}: has no column {use.column!r} ({use.where}){nearest(use.column, names)}"
        elif use.column not in twice:
            kind = file.schema.field(use.column).type
            if not pa.types.is_null(kind) and not use.is_right(kind):
                yield f"{file.path}: column {use.column!r} ({use.where}) must be {use.allowed}, is {kind}"


def _kept_names(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    if spec.output.keep == "none":
        return ()
    columns = tuple(schema.names) if spec.output.keep == "all" else spec.output.keep
    ours = COLUMNS[spec.task]
    if reserved := [name for name in columns if name in ours]:
        others = ", ".join(name for name in columns if name not in ours)
        message = f"the job writes a column {reserved[0]!r} of its own; keep others: [{others}]"
        raise SpecError([Problem(_KEEP, message)])
    return columns
