"""Mistakes that would fail every row, or the engine's start, are found before anything runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_jobs import TINY, make_spec, write_input

from moray.batch.plan.planner import PlannedJob, plan_job
from moray.engine.core.limits import cache_bytes
from moray.engine.errors import CheckpointError, SpecError, UserError

BLOCK = 16  # tokens
CHATS = [[{"role": "user", "content": "hi"}]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model, without a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tokenizer_config.json").unlink()
    return folder


def plan(folder: Path, column: str = "prompt", **sections: Any) -> PlannedJob:
    values = {"prompt": ["a"], "messages": CHATS, "length": [1], "end": ["b"]}
    write_input(folder / "in/a.parquet", values)
    source = {"prompt": None, "messages": None} | {column: column} | sections.pop("input", {})
    return plan_job(make_spec(folder, input=source, output={"keep": "none"}, **sections))


def mistakes(folder: Path, **sections: Any) -> list[str]:
    with pytest.raises(SpecError) as error:
        plan(folder, **sections)
    return str(error.value).splitlines()


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    assert mistakes(tmp_path, sampling={"stop_token_ids": [5, 1024], "logit_bias": {1023: 1.0, 999999: 1.0}}) == [
        "sampling.logit_bias: the model's token ids end at 1023; has [999999]",
        "sampling.stop_token_ids: the model's token ids end at 1023; has [1024]",
    ]
    plan(tmp_path, sampling={"stop_token_ids": [1023], "logit_bias": {1023: 1.0}})


def test_a_cache_that_holds_no_block_or_no_row(tmp_path: Path) -> None:
    config = plan(tmp_path).config
    block = cache_bytes(BLOCK, config, 2)
    assert mistakes(tmp_path, engine={"kv_cache_memory": block - 1}) == [
        f"engine.kv_cache_memory: must hold a block of 16 tokens, {block:,} bytes, is {block - 1:,}"
    ]
    double = {"dtype": "float32", "max_model_len": 4096}
    assert mistakes(tmp_path, model=double, engine={"kv_cache_memory": block}) == [
        "model.max_model_len: must be at most the model's context (max_position_embeddings), 2,048, is 4,096",
        f"engine.kv_cache_memory: must hold a block of 16 tokens, {2 * block:,} bytes, is {block:,}",
    ]
    plan(tmp_path, sampling={"max_tokens": 16}, engine={"kv_cache_memory": block})
    assert mistakes(tmp_path, sampling={"max_tokens": 17}, engine={"kv_cache_memory": 2 * block - 1}) == [
        f"engine.kv_cache_memory: must hold a row with sampling.max_tokens (17), {2 * block:,} bytes, "
        f"is {2 * block - 1:,}"
    ]
    of_rows = {"max_tokens": 17, "columns": {"max_tokens": "length"}}
    plan(tmp_path, sampling=of_rows, engine={"kv_cache_memory": block})
    plan(tmp_path, task="score", input={"continuation": "end"}, engine={"kv_cache_memory": block})


def test_a_chat_template_that_is_none(tmp_path: Path, model: Path) -> None:
    path = {"path": str(model)}
    for name, content in (
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ foo("})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "{{ foo("}]})),
        ("chat_template.jinja", "{{ foo("),
    ):
        shutil.copy(TINY / "tokenizer_config.json", model)
        (model / name).write_text(content)
        with pytest.raises(CheckpointError) as error:
            plan(tmp_path, "messages", model=path)
        assert str(error.value) == (
            f"{model}/{name}: the chat template is not valid Jinja: line 1: unexpected 'end of template'; fix it, "
            "or give template.chat"
        )
        plan(tmp_path, "messages", model=path, template={"chat": "{{ messages }}"})
        plan(tmp_path, model=path)


@pytest.mark.parametrize(
    "files",
    [
        {},  # prepare reports it, in the words of the tokenizer
        {
            "tokenizer_config.json": json.dumps({"chat_template": "{{ foo("}),
            "chat_template.jinja": "{% generation %}{% endgeneration %}",
        },
    ],
)
def test_other_chat_templates_are_none_of_the_jobs(tmp_path: Path, model: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (model / name).write_text(content)
    plan(tmp_path, "messages", model={"path": str(model)})


def test_several_chat_templates_without_a_default(tmp_path: Path, model: Path) -> None:
    named = [{"name": name, "template": "{{ messages }}"} for name in ("tool_use", "rag")]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    path = {"path": str(model)}
    with pytest.raises(
        CheckpointError, match=r"several chat templates \(tool_use, rag\), none named default; name one of them default"
    ):
        plan(tmp_path, "messages", model=path)
    plan(tmp_path, "messages", model=path, template={"chat": "{{ messages }}"})
    plan(tmp_path, model=path)


def test_a_tokenizer_config_that_is_none(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON"):
        plan(tmp_path, "messages", model={"path": str(model)})


def test_weights_that_are_cut_short(tmp_path: Path, model: Path) -> None:
    """A worker would find it only after Ray has started."""
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-100])
    message = rf"model\.safetensors is cut short or damaged: its header says {len(whole):,} bytes, it has "
    with pytest.raises(CheckpointError, match=message):
        plan(tmp_path, model={"path": str(model)})
