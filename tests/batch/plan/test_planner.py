"""Mistakes that would fail every row, or the engine's start, are found before anything runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_jobs import TINY, make_spec, write_input

from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder, claim_folder
from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.plan.provenance import describe_origin
from moray.engine.core.limits import cache_bytes
from moray.engine.errors import CheckpointError, OutputError, SpecError, UserError
from moray.engine.runner.quantize_checkpoint import quantize_checkpoint

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


def test_quantized_weights_are_smaller_and_another_job(tmp_path: Path) -> None:
    """The tiny model, by hand: 4 layers of experts and attention; the rest stays in bfloat16."""
    plain, int8 = plan(tmp_path), plan(tmp_path, model={"quantization": "int8"})
    shape = plain.config
    experts = shape.num_layers * shape.num_experts * 3 * shape.hidden_size * shape.intermediate_size
    rows = shape.num_layers * shape.num_experts * (2 * shape.intermediate_size + shape.hidden_size)
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    attention = shape.num_layers * heads * shape.hidden_size
    rows += shape.num_layers * (heads - shape.num_heads * shape.head_dim + shape.hidden_size)
    saved = plain.model_info.weights_bytes - int8.model_info.weights_bytes
    assert saved == experts + attention - 4 * rows
    assert int8.model_info.num_parameters == plain.model_info.num_parameters
    assert plain.model_info.quantization is None and "model.quantization" not in plain.plan.fingerprint.others
    assert int8.plan.fingerprint.others["model.quantization"] == int8.model_info.quantization == "int8/1"
    assert describe_origin(int8, "r")["quantization"] == "int8/1"
    claim_folder(OutputFolder(str(tmp_path / "out")), int8.spec, int8.plan)
    (tmp_path / "out" / int8.plan.part_name(int8.plan.shards[0])).touch()
    int4 = plan(tmp_path, model={"quantization": "int4"})
    with pytest.raises(OutputError, match=r"model\.quantization: int8/1 -> int4/1"):
        check_folder(OutputFolder(str(tmp_path / "out")), int4.plan)
    check_folder(OutputFolder(str(tmp_path / "out")), plan(tmp_path, model={"quantization": "int8"}).plan)


def test_a_quantized_checkpoint_and_a_format_on_load(tmp_path: Path) -> None:
    quantize_checkpoint(TINY, tmp_path / "model", "int4")
    published = plan(tmp_path, model={"path": str(tmp_path / "model")})
    on_load = plan(tmp_path, model={"quantization": "int4"})
    assert published.model_info.weights_bytes == on_load.model_info.weights_bytes
    assert published.model_info.num_parameters == on_load.model_info.num_parameters
    assert published.model_info.quantization == "compressed-tensors int4"
    with pytest.raises(
        CheckpointError, match=r"quantized already \(compressed-tensors int4\), so it cannot be .* int8"
    ):
        plan(tmp_path, model={"path": str(tmp_path / "model"), "quantization": "int8"})


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
