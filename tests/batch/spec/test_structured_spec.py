"""sampling.structured, output.parse and task classify in a spec: what is read, what is refused, what a row may say."""

import json
from pathlib import Path
from typing import Any

import pytest

from moray.batch.fingerprint import compute_fingerprint
from moray.batch.parsed.json_type import JSON, JsonType
from moray.batch.spec import JobSpec, load_spec
from moray.batch.spec.structured import _read_checked
from moray.engine.errors import RequestError, SpecError
from moray.engine.structured.constraint import Structured

SMALLEST = "model: {path: m}\ninput: {path: i}\noutput: {path: o}\n"
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
NO_CHOICES = "sampling: task classify needs structured.choice, a list of at least 2 texts"
TEXT = json.dumps(PERSON, separators=(",", ":"))


def load(folder: Path, text: str, *overrides: str) -> JobSpec:
    (folder / "job.yaml").write_text(SMALLEST + text)
    return load_spec(folder / "job.yaml", overrides)


def digest(spec: JobSpec) -> str:
    return compute_fingerprint(spec, {}, {}).hexdigest


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ("{json_schema: {type: object, properties: {name: {type: string}, age: {type: integer}}}}",
         "json_schema", TEXT),
        (f"{{json_schema: '{TEXT}'}}", "json_schema", TEXT),
        ("{json_schema: true}", "json_schema", "true"),
        ("{regex: '[0-9]+'}", "regex", "[0-9]+"),
        ("{choice: ['yes', 'no']}", "choice", '["yes","no"]'),
        ("{grammar: 'start: \"a\"'}", "grammar", 'start: "a"'),
        ("{json_object: true, regex: null}", "json_object", ""),
    ],
)  # fmt: skip
def test_every_kind_is_read_and_written_back(tmp_path: Path, value: str, kind: Any, text: str) -> None:
    for spec in (
        load(tmp_path, f"sampling: {{structured: {value}}}\n"),
        load(tmp_path, "", f"sampling.structured={value}"),
    ):
        assert spec.sampling.structured == Structured(kind, text)
        assert spec.sampling_params().structured == spec.sampling.structured
        again = JobSpec.from_yaml(spec.to_yaml())
        assert again == spec and digest(again) == digest(spec)
    assert spec.is_structured and compute_fingerprint(spec, {}, {}).is_structured


def test_a_schema_from_a_file_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON, indent=2))
    monkeypatch.chdir(tmp_path)
    read = load(tmp_path, "", "sampling.structured.json_schema=person.json")
    assert read.sampling.structured == Structured("json_schema", TEXT) and "person.json" not in read.to_yaml()
    (tmp_path / "moved.json").write_text(json.dumps(PERSON))
    moved = load(tmp_path, "", f"sampling.structured.json_schema={tmp_path}/moved.json")
    assert digest(moved) == digest(read)
    (tmp_path / "moved.json").write_text(json.dumps(PERSON | {"required": ["age"]}))
    changed = load(tmp_path, "", "sampling.structured.json_schema=moved.json")
    assert digest(changed) != digest(read)


def test_the_order_of_properties_is_in_the_fingerprint() -> None:
    def spec(schema: Any) -> JobSpec:
        sections = {"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}}
        return JobSpec.model_validate(sections | {"sampling": {"structured": {"json_schema": schema}}})

    turned = PERSON | {"properties": dict(reversed(PERSON["properties"].items()))}  # type: ignore[attr-defined]
    assert digest(spec(turned)) != digest(spec(PERSON)) == digest(spec(json.dumps(PERSON)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.structured={json_schema: {not: {}}}",
         'sampling.structured: json_schema: Unimplemented keys: ["not"]'),
        ("sampling.structured={json_schema: {type: objet}}", "sampling.structured: json_schema: "),
        ("sampling.structured={regex: '(a'}", "sampling.structured: regex at character 1: unclosed group"),
        ("sampling.structured={grammar: 'start: b'}",
         "sampling.structured: grammar at line 1, column 8: unknown name: "),
        ("sampling.structured={choice: []}", "sampling.structured: choice is empty; it needs at least one text"),
        ("sampling.structured={choice: [1, 2]}", "sampling.structured: choice must be a list of texts, is [1, 2]"),
        ("sampling.structured={json_object: false}", "sampling.structured: json_object must be true, is false"),
        ("sampling.structured={regex: a, choice: [b]}",
         "sampling.structured: must have exactly one of json_schema, regex, choice, grammar, json_object, has regex "
         "and choice; set the others to null"),
        ("sampling.structured={}", "sampling.structured: must have exactly one of json_schema, regex, choice, grammar, "
         "json_object, has none; set the others to null"),
        ("sampling.structured={json: {}}", "sampling.structured: unknown key 'json'; "),
        ("sampling.structured=person.json", "sampling.structured: must be null or a map with one of json_schema, "),
        ("sampling.structured.json_schema=gone.json",
         "sampling.structured: json_schema: gone.json cannot be read: No such file or directory"),
        ("sampling.structured.json_schema=s3://bucket/person.json",
         "sampling.structured: json_schema must be an object, its JSON text, or the path of a .json file on this "),
        ("sampling.structured={json_schema: {1: 2}}",
         "sampling.structured: json_schema has the key 1, which must be text; quote it"),
        ("sampling={ignore_eos: true, structured: {regex: a}}",
         "sampling.structured: ignore_eos must be false with structured: a text ends where it obeys"),
        ("sampling={ignore_eos: true, columns: {structured.regex: r}}",
         "sampling.columns: ignore_eos must be false with structured: a text ends where it obeys"),
        ("sampling.columns={structured: s}", "sampling.columns: unknown field 'structured'; did you mean "),
        ("sampling.columns={structured.json_object: s}", "sampling.columns: unknown field 'structured.json_object'"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_at_load(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load(tmp_path, "", override)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {structured: {regex: a}}", "output: parse needs JSON: json_schema or json_object in "
         "sampling.structured, which has regex"),
        ("sampling: {}", "output: parse needs JSON: json_schema or json_object in sampling.structured, which has "
         "nothing"),
        ("sampling: {columns: {structured.json_schema: s}}", "output: parse is for one schema for all rows, but "
         "sampling.columns has structured.json_schema; drop parse and read generated_text"),
        ("sampling: {structured: {json_object: true}}\ntask: score", "input: task score needs continuation"),
    ],
)  # fmt: skip
def test_what_cannot_be_parsed_into_columns(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load(tmp_path, text + "\n", "output.parse=true")
    assert str(error.value).startswith(message)


def test_a_schema_with_too_many_fields_for_columns(tmp_path: Path) -> None:
    pairs = {
        f"d{i}": {"type": "object", "properties": {side: {"$ref": f"#/$defs/d{i + 1}"} for side in "ab"}}
        for i in range(12)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": pairs | {"d12": {"type": "string"}}}
    (tmp_path / "wide.json").write_text(json.dumps(schema))
    overrides = [f"sampling.structured.json_schema={tmp_path}/wide.json"]
    assert load(tmp_path, "", *overrides).parsed_type is None
    with pytest.raises(SpecError, match=r"^output: parse: the schema has more than 1,000 fields"):
        load(tmp_path, "", *overrides, "output.parse=true")


def test_the_type_of_what_is_parsed(tmp_path: Path) -> None:
    structured = f"sampling: {{structured: {{json_schema: '{TEXT}'}}}}\n"
    assert load(tmp_path, structured).parsed_type is None
    fields = {"name": JsonType("text"), "age": JsonType("integer")}
    assert load(tmp_path, structured, "output.parse=true").parsed_type == JsonType("object", fields)
    assert load(tmp_path, "sampling: {structured: {json_object: true}}\n", "output.parse=true").parsed_type == JSON


def test_reasoning_has_no_room(tmp_path: Path) -> None:
    for sampling in ("structured: {regex: a}", "columns: {structured.regex: r}"):
        with pytest.raises(SpecError, match=r"^output: reasoning must be null with sampling\.structured"):
            load(tmp_path, f"sampling: {{{sampling}}}\n", "output.reasoning=think")


def test_values_of_a_row(tmp_path: Path) -> None:
    columns = ", ".join(f"structured.{kind}: {kind}" for kind in ("json_schema", "regex", "choice", "grammar"))
    spec = load(tmp_path, f"sampling: {{structured: {{regex: 'a+'}}, columns: {{{columns}, max_tokens: m}}}}\n")
    assert spec.is_structured and compute_fingerprint(spec, {}, {}).is_structured

    def structured(**row: Any) -> Structured | None:
        return spec.sampling_params({f"structured.{kind}": value for kind, value in row.items()}).structured

    assert structured() == structured(regex=None, choice=None) == Structured("regex", "a+")
    assert structured(choice=["x", "y"]) == Structured("choice", '["x","y"]')
    assert structured(json_schema=json.dumps(PERSON, indent=1)) == Structured("json_schema", TEXT)
    assert structured(json_schema=PERSON) == Structured("json_schema", TEXT), "JSON lines have it as an object"
    for row, code, message in (
        ({"regex": "b", "choice": ["x"]}, "bad_params",
         "structured: a row may have one kind, this one has regex and choice; set all but one to null"),
        ({"json_schema": '{"not": {}}'}, "bad_grammar", 'json_schema: Unimplemented keys: ["not"]'),
        ({"json_schema": "{"}, "bad_grammar", "json_schema is not JSON: "),
        ({"regex": {"a": 1}}, "bad_grammar", "regex must be text, is {'a': 1}"),
        ({"choice": [{"a": 1}]}, "bad_grammar", "choice must be a list of texts, is [{'a': 1}]"),
        ({"choice": ["x", None]}, "bad_grammar", "choice must be a list of texts, is ['x', None]"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as error:
            structured(**row)
        assert error.value.code == code and error.value.message.startswith(message)


def test_a_column_may_be_set_by_its_dotted_name(tmp_path: Path) -> None:
    in_yaml = load(tmp_path, "sampling: {columns: {max_tokens: m, structured.regex: r}}\n")
    in_override = load(tmp_path, "sampling: {columns: {max_tokens: m}}\n", "sampling.columns.structured.regex=r")
    assert in_override == in_yaml and in_yaml.sampling.structured_columns == {"regex": "r"}


def test_rows_with_one_schema_are_checked_once(tmp_path: Path) -> None:
    spec = load(tmp_path, "sampling: {columns: {structured.json_schema: s}}\n")
    _read_checked.cache_clear()
    for _ in range(50):
        assert spec.sampling_params({"structured.json_schema": TEXT}).structured == Structured("json_schema", TEXT)
        with pytest.raises(RequestError):
            spec.sampling_params({"structured.json_schema": '{"not": {}}'})
    assert (_read_checked.cache_info().misses, _read_checked.cache_info().hits) == (2, 98)


def test_a_spec_that_scores_takes_no_grammar(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="task score samples nothing; drop structured"):
        load(tmp_path, "task: score\n", "input.continuation=c", "sampling.structured={regex: a}")


def test_a_spec_that_classifies(tmp_path: Path) -> None:
    spec = load(tmp_path, "task: classify\nsampling: {structured: {choice: ['yes', 'no']}}\n")
    assert (spec.choices, spec.is_scoring, spec.is_structured) == (("yes", "no"), True, False)
    again = JobSpec.from_yaml(spec.to_yaml())
    assert again.to_yaml() == spec.to_yaml() and digest(again) == digest(spec)
    others = compute_fingerprint(spec, {}, {}).others
    assert others["sampling.structured"] == {"choice": ["yes", "no"]}
    assert [name for name in others if name.startswith("sampling")] == ["sampling.structured"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling={}", NO_CHOICES),
        ("sampling.structured={choice: [a]}", NO_CHOICES),
        ("sampling.structured={regex: a}", NO_CHOICES),
        ("sampling.temperature=1", "sampling: task classify samples nothing; drop temperature"),
        ("sampling.columns={structured.choice: c}", "sampling: task classify samples nothing; drop columns"),
        ("input.token_ids=ids", "input: task classify needs text: prompt or messages; with token_ids use task score"),
        ("input.continuation=c", "input: continuation is for task score; task classify takes none"),
        ("output.logprobs=1", "output: logprobs is not for task classify; task score writes the logprobs "),
        ("output.token_ids=true", "output: token_ids is not for task classify; task score "),
        ("output.parse=true", "output: parse is for task generate; task classify writes no text"),
        ("output.reasoning=think", "output: reasoning is for task generate; task classify writes no text"),
        ("template.bos=never", "template: bos is for prompts and task generate; drop it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_task_classify(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load(tmp_path, "task: classify\nsampling: {structured: {choice: [a, b]}}\n", override)
    assert str(error.value).startswith(message)
