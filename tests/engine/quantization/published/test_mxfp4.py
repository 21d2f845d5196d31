"""Tests of MXFP4 as gpt-oss is published in it: its numbers, what is refused, and whole models of such experts."""

import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_checkpoints import MXFP4 as CONFIG
from published_checkpoints import made_mxfp4 as made
from published_checkpoints import publish_mxfp4
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Reference
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.stored_weights import check_quantized
from moray.engine.checkpoint.weight_files import ITEM_SIZE, StoredTensor
from moray.engine.checkpoint.weight_sizes import measure_weights
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.config import EngineConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError
from moray.engine.json_options import JsonOptions
from moray.engine.params import SamplingParams
from moray.engine.quantization.choose import stored_format
from moray.engine.quantization.published import read_scheme
from moray.engine.quantization.scheme import Scheme
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner

EXPERT = "model.layers.0.mlp.experts.1.up_proj"
TOKENS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def scheme_of(config: dict[str, Any] = CONFIG) -> tuple[Scheme | None, list[str]]:
    options = JsonOptions({"quantization_config": config})
    return read_scheme(options, FAMILIES["gpt_oss"].names), options.problems


def test_experts_alone_are_quantized() -> None:
    scheme, problems = scheme_of()
    assert scheme is not None and problems == []
    assert (scheme.kind, scheme.group_size, scheme.label) == ("fp4", 32, "mxfp4 fp4")
    others = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.router", "lm_head", "model.embed_tokens"
    assert [scheme.quantizes(name) for name in (EXPERT, *others)] == [True, *[False] * 4]
    few, _ = scheme_of({"quant_method": "mxfp4"})
    assert few is not None and [few.quantizes(name) for name in (EXPERT, *others)] == [True, *[False] * 4]


def test_fields_that_are_not_known_are_refused_by_name() -> None:
    _, problems = scheme_of(CONFIG | {"block_size": 16})
    assert len(problems) == 1 and problems[0].startswith("quantization_config.block_size is 16")


def test_numbers_are_those_of_the_specification_and_of_transformers() -> None:
    (blocks, exponents), scheme = made(1, 4, 3), scheme_of()[0]
    exponents[0, 0] = torch.tensor([0, 1, 252])
    assert scheme is not None
    stored = {"m.blocks": blocks[0], "m.scales": exponents[0]}
    parts = stored_format(scheme).parts("m", (4, 96))
    assert {name: (part.shape, part.dtypes) for name, part in parts.items()} == {
        name: (tuple(tensor.shape), ("U8",)) for name, tensor in stored.items()
    }
    found = stored_format(scheme).assemble("m", (4, 96), stored).dequantize()
    for row in range(4):
        for k in range(96):
            code = int(blocks[0, row, k // 32, k % 32 // 2]) >> 4 * (k % 2) & 15
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            by_hand = math.ldexp((-1) ** sign * magnitude, int(exponents[0, row, k // 32]) - 127)
            assert float(found[row, k]) == by_hand, (row, k)
    theirs = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(found, theirs[0].T)
    assert torch.equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("exponent", [253, 255])
def test_scales_that_are_no_numbers_or_too_large_are_refused(exponent: int) -> None:
    (blocks, exponents), scheme = made(4, 3), scheme_of()[0]
    exponents[2, 1] = exponent
    assert scheme is not None
    with pytest.raises(CheckpointError, match=r"^m\.scales has an exponent beyond 252, or one of no number\.$"):
        stored_format(scheme).assemble("m", (4, 96), {"m.blocks": blocks, "m.scales": exponents})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint with MXFP4 experts, and the same in bfloat16 as transformers dequantizes it."""
    return publish_mxfp4(tmp_path_factory.mktemp("gpt-oss"))


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    config = read_model_config(folder)
    runner = ModelRunner(load_model(folder, config, dtype), config, dtype, block_size=16)
    runner.allocate_cache(4)
    seq = Sequence(0, Request("r", TOKENS, SamplingParams()))
    seq.block_table = array("i", range(4))
    return runner.compute_logits(runner.run([Scheduled(seq, len(TOKENS))]), range(len(TOKENS))).float()


def test_answers_are_those_of_the_reference_on_the_dequantized_weights(pair: tuple[Path, Path]) -> None:
    published, exact = pair
    wanted = Reference(exact).logits(TOKENS)
    torch.testing.assert_close(logits(exact), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(published), wanted, atol=1e-4, rtol=0)
    half = logits(published, torch.bfloat16)
    assert (half - wanted).abs().median() < 0.1 and not torch.equal(half, wanted)


def test_tokens_are_those_of_the_dequantized_checkpoint(pair: tuple[Path, Path]) -> None:
    found = []
    for folder in pair:
        engine = Engine(str(folder), EngineConfig(device="cpu", dtype="float32", kv_cache_memory=400_000))
        for i in range(4):
            params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=i)
            engine.add(Request(str(i), TOKENS[i : 8 + 5 * i], params))
        found.append({})
        while engine.has_work:
            for output in engine.step():
                if output.completion is not None:
                    found[-1][output.request_id] = output.completion.token_ids
    assert found[0] == found[1] and len(found[0]) == 4


def test_sizes_are_those_of_codes_and_scales(pair: tuple[Path, Path]) -> None:
    coded, plain = (
        measure_weights(split_stacks(Checkpoint(folder).tensors, "gpt_oss"), read_model_config(folder), 2)
        for folder in pair
    )
    assert coded.num_parameters == plain.num_parameters
    for ranks in (1, 2):
        of_experts = 2 * 8 * (2 * 64 + 64) * 64 // ranks  # of layers, experts, outputs and inputs
        saved = of_experts * 2 - of_experts // 2 - of_experts // 32
        assert plain.rank_bytes[ranks] - coded.rank_bytes[ranks] == saved


def headers_of_gpt_oss_20b() -> dict[str, StoredTensor]:
    """Return the tensors of the published files, by their names and shapes."""
    h, i, experts, vocab, q, kv = 2880, 2880, 32, 201088, 4096, 512
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (vocab, h)),
        "model.norm.weight": ("BF16", (h,)),
        "lm_head.weight": ("BF16", (vocab, h)),
    }
    for n in range(24):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": ("BF16", (h,)) for norm in ("input", "post_attention")}
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = ("BF16", (rows, columns))
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = ("BF16", (rows,))
        shapes[f"{layer}.self_attn.sinks"] = ("BF16", (64,))
        shapes[f"{layer}.mlp.router.weight"] = ("BF16", (experts, h))
        shapes[f"{layer}.mlp.router.bias"] = ("BF16", (experts,))
        for name, rows, columns in (("gate_up", 2 * i, h), ("down", h, i)):
            matrix = f"{layer}.mlp.experts.{name}_proj"
            shapes[f"{matrix}_blocks"] = ("U8", (experts, rows, columns // 32, 16))
            shapes[f"{matrix}_scales"] = ("U8", (experts, rows, columns // 32))
            shapes[f"{matrix}_bias"] = ("BF16", (experts, rows))
    return {
        name: StoredTensor(name, "f", dtype, shape, 0, math.prod(shape) * ITEM_SIZE[dtype])
        for name, (dtype, shape) in shapes.items()
    }


def test_the_published_model_has_in_memory_what_it_has_in_its_files() -> None:
    stored = headers_of_gpt_oss_20b()
    config = read_model_config(Path(__file__).parents[4] / "benchmarks/configs/gpt-oss-20b")
    config = replace(config, quantization=scheme_of()[0])
    tensors = split_stacks(stored, "gpt_oss")
    check_quantized(tensors, config, "m")
    sizes = measure_weights(tensors, config, 2)
    assert sizes.num_parameters == 20_914_757_184
    assert sizes.num_bytes == sum(tensor.num_bytes for tensor in stored.values()) == 13_761_264_768
    assert sizes.rank_bytes[2] < 0.55 * sizes.num_bytes


def test_it_is_not_quantized_a_second_time(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"is quantized already \(mxfp4 fp4\)"):
        with_quantization(read_model_config(pair[0]), "int8", "m")


def test_a_missing_or_misshapen_tensor_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    (tmp_path / "config.json").write_text((pair[0] / "config.json").read_text())
    for changed, words in (
        ({f"{name}_scales": None}, "model.layers.1.mlp.experts.0.down_proj.scales"),
        ({f"{name}_blocks": tensors[f"{name}_blocks"][:, :, :1].contiguous()}, "down_proj.blocks"),
    ):
        kept = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path, read_model_config(tmp_path), torch.float32)
