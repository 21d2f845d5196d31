"""Prepare with the real tokenizer: the result of every kind of row."""

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_jobs import TINY, damage, make_spec, write_input
from pyarrow import fs

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Shard, Slice
from moray.batch.stages.block_schemas import PREPARED
from moray.batch.stages.prepare import Prepare, stream_key
from moray.batch.stages.prompts import Prompts
from moray.engine.errors import CheckpointError, InputError
from moray.engine.sampling.scoring import scoring_params
from moray.engine.text.tokenizer import Tokenizer

VOCAB = 500
MAX_LEN = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    """Write columns as the input and prepare all of its rows; return one dict per row."""

    def run(columns: dict[str, Any] | pa.Table, **sections: Any) -> list[dict[str, Any]]:
        write_input(tmp_path / "in/a.parquet", columns)
        return rows_of(block_of(tmp_path, tokenizer, **sections))

    return run


def block_of(folder: Path, tokenizer: Tokenizer, slices: list[Slice] | None = None, **sections: Any) -> pa.Table:
    spec = make_spec(folder, **sections)
    files = read_input(spec)
    kept = pa.schema([files.output_schema.field(name) for name in files.kept_columns])
    reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
    prepared = Prepare(spec, reader, Prompts(spec, tokenizer, VOCAB), kept, MAX_LEN)
    slices = slices or [Slice(file.path, 0, file.num_rows) for file in files.files if file.num_rows]
    return prepared.block(Shard(3, tuple(slices)), "part-x")


def rows_of(block: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = block.to_pylist()
    for row in rows:
        row["params"] = row["params"] and pickle.loads(row["params"])
    return rows


def failures(rows: list[dict[str, Any]]) -> list[tuple[str, str] | None]:
    return [row["error"] and (row["error"]["stage"], row["error"]["code"]) for row in rows]


def test_a_prompt_goes_through_as_it_stands(prepare: Any, tokenizer: Tokenizer) -> None:
    (row,) = prepare({"prompt": ["max(3, 5) ="], "id": ["r0"]})
    assert row["prompt_token_ids"] == tokenizer.encode_prompt("max(3, 5) =")
    assert row["num_prompt_tokens"] == len(row["prompt_token_ids"])
    assert (row["source_file"], row["source_row"], row["error"]) == ("a.parquet", 0, None)
    assert (row["shard"], row["shard_rows"], row["part"]) == (3, 1, "part-x")
    assert (row["input.prompt"], row["input.id"], row["params"].max_tokens) == ("max(3, 5) =", "r0", 8)


def test_rows_that_cannot_run_have_errors_next_to_those_that_can(prepare: Any) -> None:
    rows = prepare({"prompt": [None, "", "fine", "word " * 100]})
    assert failures(rows) == [("read", "null_input"), ("tokenize", "empty_prompt"), None, ("too_long", "too_long")]
    assert rows[0]["error"]["message"] == "column 'prompt' is null in this row"
    needed = rows[3]["num_prompt_tokens"] + 8
    assert rows[3]["error"]["message"].startswith(f"needs {needed} tokens (prompt {needed - 8} + max_tokens 8); ")
    assert "this model holds 40" in rows[3]["error"]["message"]
    assert [row["prompt_token_ids"] is None for row in rows] == [True, True, False, True]
    assert [row["params"] is None for row in rows] == [True, True, False, True]


def test_text_that_is_not_utf8_is_a_bad_row(prepare: Any) -> None:
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    rows = prepare({"prompt": bad}, output={"keep": "none"})
    assert failures(rows) == [None, ("read", "bad_utf8")]


def test_a_kept_text_that_is_not_utf8_can_be_read_in_the_output(prepare: Any) -> None:
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    rows = prepare({"prompt": ["a", "b"], "note": bad})
    assert [row["input.note"] for row in rows] == ["ok", "\ufffd\ufffd"]
    assert failures(rows) == [None, None]


def test_a_template_takes_columns(prepare: Any, tokenizer: Tokenizer) -> None:
    columns = {"a": ["x", None], "n": [7, 8]}
    rows = prepare(columns, template={"prompt": "{a} has {n} {{}}"}, output={"keep": "none"})
    assert rows[0]["prompt_token_ids"] == tokenizer.encode_prompt("x has 7 {}")
    assert failures(rows) == [None, ("template", "null_column")]
    assert rows[1]["error"]["message"] == "column 'a' is null in this row"


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))


def chat(*turns: tuple[str | None, str | None]) -> list[dict[str, str | None]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_messages_go_through_the_chat_template(prepare: Any, tokenizer: Tokenizer) -> None:
    chats = [chat(("user", "hello")), None, [], chat(("user", None)), [None]]
    rows = prepare(
        {"chat": pa.array(chats, MESSAGES)}, input={"messages": "chat"}, template={"chat": TEMPLATE, "system": None}
    )
    assert rows[0]["prompt_token_ids"] == tokenizer.encode_chat(chat(("user", "hello")), TEMPLATE)
    assert failures(rows) == [None, ("read", "null_input"), *[("template", "bad_messages")] * 3]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if 'name' in m %}!{% endif %}\n{% endfor %}"


def test_a_system_message_is_put_before_chats_that_have_none(prepare: Any, tokenizer: Tokenizer) -> None:
    chats = [chat(("user", "hi")), chat(("system", "mine"), ("user", "hi"))]
    rows = prepare(
        {"chat": pa.array(chats, MESSAGES)}, input={"messages": "chat"}, template={"chat": TEMPLATE, "system": "job's"}
    )
    wanted = [chat(("system", "job's"), ("user", "hi")), chats[1]]
    assert [row["prompt_token_ids"] for row in rows] == [
        tokenizer.encode_chat(messages, TEMPLATE) for messages in wanted
    ]


def test_token_ids_are_untouched(prepare: Any) -> None:
    ids = [[5, 1, VOCAB - 1], [], None, [3, None], [VOCAB], [-1]]
    rows = prepare({"ids": pa.array(ids, pa.list_(pa.int64()))}, input={"token_ids": "ids"})
    assert rows[0]["prompt_token_ids"] == [5, 1, VOCAB - 1]
    assert failures(rows) == [
        None, ("tokenize", "empty_prompt"), ("read", "null_input"), *[("tokenize", "bad_token_id")] * 3,
    ]  # fmt: skip
    assert rows[4]["error"]["message"] == "token id 0 is 500; this model's go from 0 to 499"


SCORE: dict[str, Any] = {"task": "score", "input": {"continuation": "choices"}}


def test_choices_come_with_their_context(prepare: Any, tokenizer: Tokenizer) -> None:
    columns = {"prompt": ["max(3, 5) =", "2 + 2 = "], "choices": [[" 5", " 3"], ["4", "  5", "a b"]]}
    rows = prepare(columns, **SCORE)
    assert failures(rows) == [None, None]
    assert [row["params"] for row in rows] == [scoring_params(None)] * 2
    encode = tokenizer.encode_prompt
    wanted = [("max(3, 5) =", [" 5", " 3"]), ("2 + 2 =", [" 4", "   5", " a b"])]
    for row, (context, choices) in zip(rows, wanted, strict=True):
        assert row["prompt_token_ids"] == encode(context)
        assert row["num_prompt_tokens"] == len(encode(context))
        assert [row["prompt_token_ids"] + ids for ids in row["continuations"]] == [encode(context + c) for c in choices]


def test_one_continuation_a_row(prepare: Any, tokenizer: Tokenizer) -> None:
    rows = prepare({"prompt": ["2 + 2 =", "x"], "choices": [" 4", None]}, **SCORE, output={"logprobs": 2})
    assert rows[0]["continuations"] == [tokenizer.encode_prompt("2 + 2 = 4")[rows[0]["num_prompt_tokens"] :]]
    assert rows[0]["params"] == scoring_params(2)
    assert failures(rows) == [None, ("read", "null_input")]
    assert rows[1]["error"]["message"] == "column 'choices' is null in this row"


def test_continuations_that_cannot_be_scored_fail_their_row(prepare: Any) -> None:
    choices = [[" a", None], [], [" a", ""], None, [" a"], [" a", " word" * 100], [" a"]]
    rows = prepare({"prompt": ["2 + 2 ="] * 4 + [None, "2 + 2 =", "2"], "choices": choices}, **SCORE)
    assert failures(rows) == [
        ("read", "null_input"), ("tokenize", "empty_continuation"), ("tokenize", "empty_continuation"),
        ("read", "null_input"), ("read", "null_input"), ("too_long", "too_long"), None,
    ]  # fmt: skip
    messages = [row["error"] and row["error"]["message"] for row in rows]
    assert messages[:5] == [
        "entry 1 of column 'choices' is null in this row", "column 'choices' is empty in this row",
        "continuation 1 is empty", "column 'choices' is null in this row", "column 'prompt' is null in this row",
    ]  # fmt: skip
    n = rows[5]["num_prompt_tokens"]
    assert messages[5].startswith(f"needs {n + 100} tokens (prompt {n} + continuation 100); this model holds 40.")
    assert [row["continuations"] is None for row in rows] == [True] * 6 + [False]


def test_a_context_and_a_continuation_as_long_as_the_model_holds(prepare: Any) -> None:
    ids = pa.array([[5] * 30, [5] * 30], pa.list_(pa.int32()))
    choices = pa.array([[[7] * 10, [7]], [[7], [7] * 11]], pa.list_(pa.list_(pa.int32())))
    rows = prepare(
        {"ids": ids, "choices": choices}, **SCORE | {"input": {"token_ids": "ids", "continuation": "choices"}}
    )
    assert failures(rows) == [None, ("too_long", "too_long")]


def test_continuations_of_token_ids_are_token_ids(prepare: Any) -> None:
    columns = {
        "ids": pa.array([[5, 6], [5], [5], []], pa.list_(pa.int64())),
        "choices": pa.array([[7, 8], [VOCAB], [], [7]], pa.list_(pa.int64())),
    }
    spec = SCORE | {"input": {"token_ids": "ids", "continuation": "choices"}}
    rows = prepare(columns, **spec)
    assert rows[0]["continuations"] == [[7, 8]]
    assert failures(rows) == [
        None, ("tokenize", "bad_token_id"), ("tokenize", "empty_continuation"), ("tokenize", "empty_prompt"),
    ]  # fmt: skip
    lists = pa.array([[[7, 8], [9]], [[7], None], [[7], [None]], [[7], []]], pa.list_(pa.list_(pa.int64())))
    rows = prepare({"ids": pa.array([[5, 6]] * 4, pa.list_(pa.int64())), "choices": lists}, **spec)
    assert rows[0]["continuations"] == [[7, 8], [9]]
    assert failures(rows)[1:] == [
        ("read", "null_input"), ("tokenize", "bad_token_id"), ("tokenize", "empty_continuation"),
    ]  # fmt: skip
    assert rows[2]["error"]["message"] == "continuation 1: token id 0 is null; this model's go from 0 to 499"


def test_continuations_of_a_chat_begin_where_its_template_ends(prepare: Any, tokenizer: Tokenizer) -> None:
    chats = [chat(("user", "2 + 2?")), [None], None]
    columns = {"chat": pa.array(chats, MESSAGES), "choices": ["4"] * 3}
    rows = prepare(columns, **SCORE | {"input": {"messages": "chat", "continuation": "choices"}})
    assert rows[0]["prompt_token_ids"] == tokenizer.encode_chat(chats[0] or [])
    assert rows[0]["continuations"] == [tokenizer.encode_prompt("4")]
    assert failures(rows) == [None, ("template", "bad_messages"), ("read", "null_input")]


def test_a_context_may_be_made_by_a_template(prepare: Any, tokenizer: Tokenizer) -> None:
    columns = {"a": ["2 + 2", None], "choices": [" 4", " 5"]}
    rows = prepare(columns, **SCORE, template={"prompt": "{a} ="}, output={"keep": "none"})
    assert rows[0]["prompt_token_ids"] == tokenizer.encode_prompt("2 + 2 =")
    assert failures(rows) == [None, ("template", "null_column")]


def test_continuations_that_are_not_utf8_are_bad_rows(prepare: Any) -> None:
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    rows = prepare({"prompt": ["2 + 2 ="] * 2, "choices": bad}, **SCORE, output={"keep": "none"})
    assert failures(rows) == [None, ("read", "bad_utf8")]


def test_a_column_that_holds_no_continuations_is_a_mistake_of_the_input(prepare: Any) -> None:
    with pytest.raises(
        InputError, match=r"column 'choices' \(input.continuation\) must be text or a list of texts, is"
    ):
        prepare({"prompt": ["a"], "choices": [5]}, **SCORE)
    with pytest.raises(InputError, match=r"has no column 'choices' \(input.continuation\)"):
        prepare({"prompt": ["a"]}, **SCORE)
    ids = {"ids": pa.array([[1]], pa.list_(pa.int32())), "choices": ["a"]}
    with pytest.raises(InputError, match="must be a list of whole numbers or a list of such lists, is string"):
        prepare(ids, **SCORE | {"input": {"token_ids": "ids", "continuation": "choices"}})


def test_a_prompt_may_open_the_reasoning(prepare: Any) -> None:
    columns = {"prompt": ["a", "a<think>\n", "a<think></think>\n\n"]}
    assert [row["begins_open"] for row in prepare(columns, output={"reasoning": "think"})] == [None, True, False]
    assert [row["begins_open"] for row in prepare(columns)] == [None] * 3


def test_sampling_columns_are_a_rows_own(prepare: Any) -> None:
    columns = {"prompt": ["a", "b", "c"], "limit": [3.0, None, 0.0], "s": [11, 12, 13]}
    rows = prepare(columns, sampling={"columns": {"max_tokens": "limit", "seed": "s"}, "temperature": 1.0})
    assert [row["params"] and (row["params"].max_tokens, row["params"].seed) for row in rows] == [
        (3, 11),
        (8, 12),
        None,
    ]
    assert failures(rows) == [None, None, ("read", "bad_params")]
    assert "max_tokens" in rows[2]["error"]["message"]


def test_a_rows_stream_depends_on_its_seed_file_and_index_alone(prepare: Any) -> None:
    rows = prepare({"prompt": ["a", "a", "b"], "s": [0, 5, 0]}, sampling={"columns": {"seed": "s"}})
    keys = [row["stream_key"] for row in rows]
    assert keys == [stream_key(0, "a.parquet", 0), stream_key(5, "a.parquet", 1), stream_key(0, "a.parquet", 2)]
    assert len({*keys, stream_key(0, "b.parquet", 0), stream_key(0, "a.parquet", 1)}) == 5
    assert keys[0] == 9871114736084436681  # a key that changed would change every sampled answer


def test_kept_columns_may_be_called_what_they_like(prepare: Any) -> None:
    columns = {"prompt": ["a"], "params": [1], "shard": ["s"], "input.x": [2.0], "stream_key": [None]}
    (row,) = prepare(columns)
    assert row["shard"] == 3
    assert {name: row[f"input.{name}"] for name in columns} == {name: values[0] for name, values in columns.items()}


def test_a_shard_over_several_files_keeps_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b/c"):
        write_input(tmp_path / f"in/{name}.parquet", {"prompt": [f"{name} {i}" for i in range(5)]})
    block = block_of(tmp_path, tokenizer, [Slice("a.parquet", 3, 2), Slice("b/c.parquet", 0, 2)])
    assert block["input.prompt"].to_pylist() == ["a 3", "a 4", "b/c 0", "b/c 1"]
    assert block["source_row"].to_pylist() == [3, 4, 0, 1]
    assert block.schema.names[: len(PREPARED)] == PREPARED.names


def test_rows_that_cannot_be_decoded_are_bad_rows_of_the_same_schema(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = [f"prompt {i}" for i in range(6)]
    write_input(tmp_path / "in/a.parquet", {"prompt": prompts, "n": range(6)}, row_group_size=3)
    damage(tmp_path / "in/a.parquet", row_group=0)
    rows = rows_of(block_of(tmp_path, tokenizer, [Slice("a.parquet", 0, 2), Slice("a.parquet", 2, 4)]))
    assert failures(rows) == [("read", "unreadable")] * 3 + [None] * 3
    assert rows[0]["error"]["message"].startswith("rows 0 to 1 of a.parquet cannot be read: ")
    assert [row["input.n"] for row in rows] == [None] * 3 + [3, 4, 5]
    assert [row["source_row"] for row in rows] == list(range(6))


def test_a_file_that_is_gone_is_no_matter_of_its_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    with pytest.raises(InputError, match=r"b\.parquet: is not there any more"):
        block_of(tmp_path, tokenizer, [Slice("b.parquet", 0, 1)])


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    spec = make_spec(tmp_path, input={"messages": "chat"})
    with pytest.raises(CheckpointError, match="no chat template"):
        Prompts(spec, Tokenizer(plain), VOCAB)
