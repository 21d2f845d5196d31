"""Tests of quantization on load: the codes of one weight, and whole models against transformers and each other."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dequantized import dequantized
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FIRST_FAMILIES, LATER_FAMILIES, PHIMOE, Reference, write
from torch import Tensor

from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import EngineConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError, DeviceError
from moray.engine.layers.linear import Linear
from moray.engine.layers.moe import Experts
from moray.engine.models import ARCHITECTURES
from moray.engine.params import SamplingParams
from moray.engine.quantization.on_load import LARGEST_CODE, quantize
from moray.engine.quantization.scheme import ON_LOAD_KINDS, OnLoadKind, Scheme
from moray.engine.quantization.weight import QuantizedWeight, stack_rows
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner
from moray.engine.runner.quantized_weights import QuantizedWeights
from moray.engine.sampling.scoring import scoring_params
from moray.kernels.cpu import quantized as kernels
from moray.kernels.cpu import self_check

KINDS = get_args(OnLoadKind)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_by_hand(weight: Tensor, kind: OnLoadKind, group_size: int) -> tuple[list[list[float]], list[list[float]]]:
    """The codes and scales of a weight, element by element, in Python's numbers and numpy's fp32."""
    import numpy as np

    codes, scales = [], []
    for row in weight.float().numpy():
        codes.append([])
        scales.append([])
        for first in range(0, len(row), group_size):
            group = row[first : first + group_size]
            scale = np.float32(np.abs(group).max() / np.float32(LARGEST_CODE[kind]))
            if kind == "int4":
                scale = np.float32(torch.tensor(scale).bfloat16().item())
            scales[-1].append(float(scale))
            for value in group:
                quotient = np.float32(value / scale)
                if kind == "fp8":
                    codes[-1].append(torch.tensor(quotient).to(torch.float8_e4m3fn).item())
                else:
                    lowest, highest = (-8, 7) if kind == "int4" else (-127, 127)
                    codes[-1].append(min(max(round(float(quotient)), lowest), highest))  # Python rounds half to even
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group_size"), [("int8", None), ("int4", 32), ("int4", 48), ("fp8", None)])
def test_codes_are_those_of_the_definition(kind: OnLoadKind, group_size: int | None, dtype: torch.dtype) -> None:
    """A group of 48 in 64 inputs leaves a shorter last one."""
    weight = (random(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0]).unsqueeze(1)).to(dtype)
    found = quantize(weight, kind, group_size)
    codes, scales = codes_by_hand(weight, kind, group_size or 64)
    assert found.codes.float().tolist() == codes and found.scales.tolist() == scales
    assert (found.kind, found.group_size, found.zeros) == (kind, group_size or 64, None)
    each = torch.tensor(scales).repeat_interleave(group_size or 64, dim=1)[:, :64]
    assert torch.equal(found.dequantize(), torch.tensor(codes) * each)


def test_halves_are_rounded_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize(weight, "int8").codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_smallest_numbers_have_codes(kind: OnLoadKind) -> None:
    weight = torch.zeros(3, 32)
    weight[1, 0], weight[2, 0] = 1e-44, 1e-30
    found = quantize(weight, kind, 32).dequantize()
    assert found.isfinite().all() and not found[:2].any()
    assert found[2, 0] == pytest.approx(1e-30, rel=0.01) and not found[2, 1:].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_no_numbers_are_refused(kind: OnLoadKind, value: float) -> None:
    weight = random(4, 64)
    weight[2, 40] = value
    with pytest.raises(ValueError, match="infinite or no number"):
        quantize(weight, kind, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_stacked_have_the_codes_of_the_stack(kind: OnLoadKind) -> None:
    """So q, k and v can be quantized one after the other, and in chunks of rows."""
    weight = random(300, 64)
    whole = quantize(weight, kind, 32)
    parts = stack_rows([quantize(part, kind, 32) for part in weight.split([7, 93, 200])])
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8))
    assert torch.equal(whole.scales, parts.scales)


def test_stacked_rows_without_zero_points_get_zeros() -> None:
    one = quantize(random(2, 64), "int4", 32)
    other = replace(one, zeros=torch.full((2, 2), 3, dtype=torch.int8))
    both = stack_rows([one, other])
    assert both.zeros is not None and both.zeros.tolist() == [[0, 0], [0, 0], [3, 3], [3, 3]]
    assert torch.equal(both.dequantize()[2:], other.dequantize()) and torch.equal(
        both.dequantize()[:2], one.dequantize()
    )


class Model:
    """A loaded checkpoint, which runs one sequence at a time."""

    def __init__(self, folder: Path, kind: OnLoadKind | None, dtype: torch.dtype = torch.float32) -> None:
        config = with_quantization(read_model_config(folder), kind, str(folder))
        self.original = config.rope.original_max_position_embeddings
        self.model = load_model(folder, config, dtype)
        self.runner = ModelRunner(self.model, config, dtype, block_size=16)
        self.runner.allocate_cache(16)

    def logits(self, token_ids: list[int]) -> Tensor:
        seq = Sequence(0, Request("r", token_ids, SamplingParams()))
        seq.rope_set = int(self.original is not None and len(token_ids) > self.original)
        seq.block_table = array("i", range(16))
        hidden_states = self.runner.run([Scheduled(seq, len(token_ids))])
        return self.runner.compute_logits(hidden_states, range(len(token_ids))).float()


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (n,), generator=torch.Generator().manual_seed(1000 * seed + n)).tolist()


def greedy(folder: Path, config: EngineConfig, prompts: dict[str, list[int]], n: int) -> dict[str, tuple[int, ...]]:
    engine = Engine(str(folder), config)
    for name, prompt in prompts.items():
        engine.add(Request(name, prompt, SamplingParams(max_tokens=n, ignore_eos=True)))
    found = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                found[output.request_id] = output.completion.token_ids
    return found


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *product(["phimoe"], KINDS),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in product(FIRST_FAMILIES[1:], KINDS)),
        *product(LATER_FAMILIES, ["int8"]),
    ],
)
def test_answers_are_those_of_the_reference_on_the_dequantized_weights(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: OnLoadKind
) -> None:
    reference = Reference(dequantized(checkpoints[architecture], tmp_path / "plain", kind))
    model = Model(checkpoints[architecture], kind)
    for n in (1, 17, 60):
        torch.testing.assert_close(model.logits(tokens(n)), reference.logits(tokens(n)), atol=1e-4, rtol=0)
    prompts = {str(n): tokens(n, seed=3) for n in (3, 9, 20)}
    config = EngineConfig(device="cpu", quantization=kind, kv_cache_memory=1 << 20)
    for name, found in greedy(checkpoints[architecture], config, prompts, 10).items():
        assert list(found) == reference.greedy(prompts[name], 10)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_logits_are_those_of_bfloat16_on_the_dequantized_weights(
    checkpoints: dict[str, Path], tmp_path: Path, kind: OnLoadKind
) -> None:
    """About as near to fp32 as unquantized weights are in bfloat16: codes are exact, so only activations are rounded.

    The median, because rounding sends some tokens to another expert.
    """
    plain = dequantized(checkpoints["mixtral"], tmp_path / "plain", kind)
    reference = Reference(plain)
    exact = reference.logits(tokens(60))
    found = Model(checkpoints["mixtral"], kind, torch.bfloat16).logits(tokens(60))
    rounded = Model(plain, None, torch.bfloat16).logits(tokens(60))
    assert (found - exact).abs().median() < 1.5 * (rounded - exact).abs().median()


def test_a_kernel_that_is_wrong_on_this_cpu_is_not_used(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Model(checkpoints["mixtral"], "int8").logits(tokens(20))
    instruction_sets = kernels.isas()
    right = kernels.KERNELS[kernels.paths("int8", torch.float32)[0], "int8", False]

    def run(weight: Any, *rest: Any) -> None:
        codes, scales, zeros, group_steps, lengths = weight
        right.run((codes, scales * scales.dtype.type(1.05), zeros, group_steps, lengths), *rest)

    monkeypatch.setattr(self_check, "_results", {})  # later tests would be told of the planted kernel
    monkeypatch.setattr(kernels, "isas", lambda: ("planted", *instruction_sets))
    monkeypatch.setitem(kernels.KERNELS, ("planted", "int8", False), replace(right, run=run))
    assert torch.equal(Model(checkpoints["mixtral"], "int8").logits(tokens(20)), before)


@pytest.mark.parametrize("architecture", FIRST_FAMILIES)
def test_weights_of_attention_and_experts_are_quantized_and_no_others(
    checkpoints: dict[str, Path], architecture: str
) -> None:
    packed: list[str] = []

    class Spy:
        def pack_linear(
            self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, num_outputs: int
        ) -> Any:
            packed.append(f"linear {list(weight.shape)}")

        def pack_experts(self, experts: Iterator[Any], dtype: torch.dtype, *, num_experts: int, activation: Any) -> Any:
            shapes = [(list(expert.up.shape), list(expert.down.shape)) for expert in experts]
            assert len(shapes) == num_experts
            packed.append(f"{num_experts} experts {shapes[0]}")

    folder = checkpoints[architecture]
    config = with_quantization(read_model_config(folder), "int8", str(folder))
    backend = type("Spying", (type(CPU),), {"quantized_formats": {"int8": Spy()}})()
    model = load_model(folder, config, torch.float32, backend)
    h, i, e = config.hidden_size, config.intermediate_size, config.num_experts
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    up = i if architecture == "phi-msft" else 2 * i
    assert packed == [f"linear {[qkv, h]}", f"linear {[h, h]}", f"{e} experts {([up, h], [h, i])}"] * 2
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert sum(module._kernel is not None for module in linears) == 3  # two routers and the head
    assert all(module.weight is None for module in linears)
    left = [name for name, param in model.named_parameters() if param.dim() > 1 and "bias" not in name]
    assert len(left) == 1 and ("embed" in left[0] or "wte" in left[0])
    assert all(getattr(m, name) is None for m in model.modules() if isinstance(m, Experts) for name in (m.up, m.down))


def test_routers_gates_and_heads_stay_as_they_are_and_shared_experts_do_not(checkpoints: dict[str, Path]) -> None:
    def quantized(architecture: str) -> set[str]:
        config = with_quantization(read_model_config(checkpoints[architecture]), "int4", "")
        weights = QuantizedWeights(config.quantization, ARCHITECTURES[architecture].tensor_map(config))
        return {name.split("layers.0.")[1] for name in weights.params if ".layers.0." in f".{name}"}

    attention = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    experts = {"moe.experts.gate_up_proj", "moe.experts.down_proj"}
    assert all(quantized(name) == attention | experts for name in ("qwen3_moe", "granitemoe", "olmoe"))
    shared = {"shared.expert.gate_up_proj", "shared.expert.down_proj"}
    assert quantized("qwen2_moe") == attention | experts | shared


def test_a_device_without_the_kernels_refuses_before_it_loads(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    backend = type("Bare", (type(CPU),), {"quantized_formats": {"int8": CPU.quantized_formats["int8"]}})()
    config = with_quantization(read_model_config(checkpoints["mixtral"]), "fp8", "")
    with pytest.raises(DeviceError, match=r"\(cpu\) has no kernels for fp8 weights; it has: int8"):
        load_model(tmp_path / "nothing is read", config, torch.float32, backend)


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoints: dict[str, Path]) -> None:
    config = replace(read_model_config(checkpoints["mixtral"]), quantization=Scheme("compressed-tensors", "int4", 128))
    assert with_quantization(config, None, "here") == config
    with pytest.raises(
        CheckpointError, match=r"here is quantized already \(compressed-tensors int4\).*to int8 on load"
    ):
        with_quantization(config, "int8", "here")


def test_every_problem_of_the_files_is_found_before_data_is_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.3"
    del tensors[f"{expert}.w1.weight"]
    tensors[f"{expert}.w2.weight"] = torch.zeros(64, 47)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int32)
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.zeros(64, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints["mixtral"] / "config.json").read_text())
    with pytest.raises(CheckpointError) as error:
        Model(tmp_path, "int8")
    assert str(error.value).splitlines()[1:] == [
        f"Missing: {expert}.w1.weight.",
        "Not of this model: model.layers.0.self_attn.q_proj.weight_scale.",
        f"Of another shape: {expert}.w2.weight [64, 47], must be [64, 48].",
        "Of a dtype other than F64, F32, F16, BF16: model.layers.0.self_attn.q_proj.weight I32.",
    ]


def test_a_value_that_is_no_number_names_its_tensor(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints["mixtral"] / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight has a value that is infinite"
    ):
        Model(tmp_path, "fp8")


@pytest.mark.parametrize(
    ("widths", "group_size"),
    [((256, 384), 128), ((256, 320), 64), ((64, 96), 32), ((64, 48), 32), ((4096, 6400), 128), ((4096, 14336), 128)],
)
def test_int4_has_the_largest_groups_that_divide_all_widths(
    checkpoints: dict[str, Path], widths: tuple[int, int], group_size: int
) -> None:
    config = read_model_config(checkpoints["mixtral"])
    config = replace(config, hidden_size=widths[0], intermediate_size=widths[1], head_dim=widths[0] // config.num_heads)
    scheme = with_quantization(config, "int4", "").quantization
    assert scheme is not None and scheme.group_size == group_size


WIDE = PHIMOE | {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("wide"), WIDE, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ON_LOAD_KINDS)
def test_answers_do_not_depend_on_the_batch(wide: Path, kind: OnLoadKind) -> None:
    """Bit by bit: batches of 1, 7 and 64, prompts in chunks, another order."""
    num_rows = 20
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)
    sizes = torch.randint(2, 40, (num_rows,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(order: list[int], task: str = "generate", **config: Any) -> dict[str, Any]:
        engine = Engine(str(wide), EngineConfig(device="cpu", quantization=kind, kv_cache_memory=16 << 20, **config))
        for row in order:
            generator = torch.Generator().manual_seed(row)
            prompt = torch.randint(3, 512, (sizes[row],), generator=generator).tolist()
            engine.add(Request(str(row), prompt, params if task == "generate" else scoring_params(None)))
        found = {}
        while engine.has_work:
            for output in engine.step():
                if (done := output.completion) is not None:
                    found[output.request_id] = (done.token_ids, done.logprobs, done.prompt_logprobs)
        return found

    in_order = list(range(num_rows))
    shuffled = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).tolist()
    want = run(in_order, max_num_seqs=64)
    assert len(want) == num_rows and len({tokens for tokens, _, _ in want.values()}) > num_rows // 2
    assert run(in_order, max_num_seqs=1) == want
    assert run(in_order, max_num_seqs=7) == want
    assert run(shuffled, max_num_seqs=64, max_num_batched_tokens=19) == want
    scores = run(in_order, "score")
    assert len(scores) == num_rows and run(shuffled, "score", max_num_seqs=7, max_num_batched_tokens=19) == scores
    assert json.dumps(want) != json.dumps(scores)
