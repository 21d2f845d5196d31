"""The shipped model is what it says it is: published spelling, small, trained, and its experts all work."""

import json
from pathlib import Path
from typing import Any

import evaluate
import pyarrow.parquet as pq
import pytest
import tiny_tokenizer
import torch
from repository import EXAMPLES
from safetensors import safe_open
from tiny_config import CONFIG, GENERATION_CONFIG

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request

FOLDER = EXAMPLES / "tiny-phimoe"
PUBLISHED = Path(__file__).parent / "phi35moe_keys.json"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Every held-out row."""
    held_out: list[dict[str, Any]] = pq.read_table(evaluate.HELD_OUT).to_pylist()
    return held_out


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return evaluate.load(FOLDER, torch.float32)


def test_config_has_the_published_keys() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    published = json.loads(PUBLISHED.read_text())
    assert config == CONFIG
    assert sorted(config) == published["config"]
    assert sorted(config["rope_scaling"]) == published["rope_scaling"]
    assert json.loads((FOLDER / "generation_config.json").read_text()) == GENERATION_CONFIG


def test_mscale_is_a_value_of_the_config_not_the_formula() -> None:
    scaling = CONFIG["rope_scaling"]
    assert scaling["short_mscale"] != pytest.approx((1 + 0.6931 / 6.9315) ** 0.5, abs=0.1)
    head_dim = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    assert len(scaling["short_factor"]) == len(scaling["long_factor"]) == head_dim // 2
    assert all(
        long > short for short, long in zip(scaling["short_factor"][8:], scaling["long_factor"][8:], strict=True)
    )


def layer_names(layer: int) -> set[str]:
    prefix = f"model.layers.{layer}."
    attention = {f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")}
    norms = {f"{name}_layernorm.{kind}" for name in ("input", "post_attention") for kind in ("weight", "bias")}
    experts = {f"experts.{e}.w{n}.weight" for e in range(CONFIG["num_local_experts"]) for n in (1, 2, 3)}
    moe = {f"block_sparse_moe.{name}" for name in experts | {"gate.weight"}}
    return {prefix + name for name in attention | norms | moe}


def test_weights_are_bf16_under_the_published_names() -> None:
    outside = {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight", "lm_head.bias"}
    layers = (layer_names(layer) for layer in range(CONFIG["num_hidden_layers"]))
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == outside.union(*layers)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 2e6 <= sum(tensor.numel() for tensor in tensors.values()) <= 6e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6


def test_biases_are_trained() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        biases = [name for name in file.keys() if name.endswith(".bias")]  # noqa: SIM118
        assert all(file.get_tensor(name).abs().max() > 1e-3 for name in biases)


def test_tokenizer_is_the_one_the_script_trains(tmp_path: Path) -> None:
    tiny_tokenizer.write(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (FOLDER / "tokenizer.json").read_text()


def test_tokenizer_has_the_phi_chat_format(model: tuple[Any, Any]) -> None:
    tokenizer = model[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 4 + 5?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 4 + 5?<|end|>\n<|assistant|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text.replace("|>\n", "|>")
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|system|>"
    stops = ["<|endoftext|>", "<|assistant|>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids(stops) == GENERATION_CONFIG["eos_token_id"]


def test_tokenizer_keeps_any_text(model: tuple[Any, Any]) -> None:
    text = "Héllo, WÖRLD \t\n 12  日本語 🦈 don't…"
    assert model[1].decode(model[1](text).input_ids) == text


# In bf16 the order of a sum decides between two tokens that are as good as equal.
MOST_OTHERWISE = {torch.float32: 0, torch.bfloat16: 2}


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float32, "chat"),
        (torch.bfloat16, "raw"),
        pytest.param(torch.float32, "raw", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "chat", marks=pytest.mark.slow),
    ],
)
def test_both_answer_held_out_questions_alike(rows: list[dict[str, Any]], form: str, dtype: torch.dtype) -> None:
    model, tokenizer = evaluate.load(FOLDER, dtype)
    prompts = [evaluate.prompt_ids(tokenizer, row, form) for row in rows]
    theirs = evaluate.answers(model, tokenizer, prompts)
    ours = answers_of_engine(Engine(str(FOLDER), EngineConfig(dtype=str(dtype).removeprefix("torch."))), prompts)
    differing = [(row["prompt"], *pair) for row, *pair in zip(rows, theirs, ours, strict=True) if pair[0] != pair[1]]
    assert len(differing) <= MOST_OTHERWISE[dtype], differing
    for texts in (theirs, ours):
        right = evaluate.accuracy(rows, texts)
        assert len(right) == 5
        assert min(right.values()) >= 0.95, right


def answers_of_engine(engine: Engine, prompts: list[list[int]]) -> list[str]:
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=evaluate.MAX_NEW_TOKENS)))
    texts = [""] * len(prompts)
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                texts[int(output.request_id)] = engine.tokenizer.decode(output.completion.token_ids).strip()
    return texts


def test_every_expert_works(model: tuple[Any, Any], rows: list[dict[str, Any]]) -> None:
    prompts = [evaluate.prompt_ids(model[1], row, form) for row in rows[::5] for form in ("raw", "chat")]
    shares = evaluate.expert_shares(model[0], prompts)
    assert shares.shape == (CONFIG["num_hidden_layers"], CONFIG["num_local_experts"])
    assert shares.min() >= 0.25 and shares.max() <= 4, shares
