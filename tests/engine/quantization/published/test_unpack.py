"""Tests that published weights are read exactly: those that the real programs stored, and damaged ones."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from published_checkpoints import CONFIGS, FOLDER, Coded, encode, store
from safetensors.torch import load_file
from torch import Tensor

from moray.engine.errors import CheckpointError
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.choose import stored_format
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published import METHODS, read_scheme
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.weight import QuantizedWeight

SHAPE = (32, 32)
NAMES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
         torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # fmt: skip


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    options = JsonOptions({"quantization_config": config})
    scheme = read_scheme(options, MatrixNames("embed", "gate", "head"))
    assert not options.problems and scheme is not None
    return scheme


def stored_by_the_programs(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return suffix -> stored tensor, and the weight that the program itself reads."""
    tensors = {
        name.removeprefix(f"{case}/"): tensor
        for name, tensor in load_file(FOLDER / "linears.safetensors").items()
        if name.startswith(f"{case}/")
    }
    return tensors, tensors.pop("expected")


def read(config: Mapping[str, Any], stored: Mapping[str, Tensor], shape: tuple[int, int] = SHAPE) -> QuantizedWeight:
    return stored_format(scheme_of(config)).assemble("m", shape, {f"m.{name}": part for name, part in stored.items()})


@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_programs_stored_is_read_bit_by_bit(case: str) -> None:
    stored, expected = stored_by_the_programs(case)
    weight = read(CONFIGS[case], stored)
    assert torch.equal(weight.dequantize(), expected)
    scheme = scheme_of(CONFIGS[case])
    assert weight.kind == scheme.kind and (weight.zeros is None) == scheme.symmetric
    assert weight.scales.shape == (32, -(-32 // weight.group_size))


@pytest.mark.parametrize("case", CONFIGS)
def test_names_shapes_and_types_are_those_that_the_programs_stored(case: str) -> None:
    stored, _ = stored_by_the_programs(case)
    scheme = scheme_of(CONFIGS[case])
    parts = stored_format(scheme).parts("m", SHAPE)
    for name, tensor in stored.items():
        part = parts[f"m.{name}"]
        assert part.fits(tuple(tensor.shape)) and NAMES[tensor.dtype] in part.dtypes, name
    assert {name for name, part in parts.items() if not part.is_optional} <= {f"m.{name}" for name in stored}
    method = METHODS[scheme.method]
    assert method.shape(scheme, tuple(stored[method.codes(scheme)].shape)) == SHAPE


@pytest.mark.parametrize("case", CONFIGS)
def test_our_own_packing_is_that_of_the_programs(case: str) -> None:
    """Whole checkpoints in these tests are packed with it."""
    stored, expected = stored_by_the_programs(case)
    weight = read(CONFIGS[case], stored)
    half = {"fp8": 0, "int4": 8, "int8": 128}[weight.kind]
    zeros = (torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros).float() + half
    every = 16 if "block" in case else 32 if "fp8-tensor" in case else 1
    coded = Coded(weight.codes.float() + half, zeros[::every], weight.scales[::every], expected)
    packed = store(case, coded)
    assert packed.keys() == stored.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor.float(), stored[name].float()), name


@pytest.mark.parametrize(
    "case", [case for case in CONFIGS if case.startswith("compressed-tensors") and "group" not in case]
)
def test_widths_that_no_word_or_block_divides(case: str) -> None:
    """37 rows of 45 inputs: words have unused bits, and the last block is smaller."""
    coded = encode(case, torch.randn(37, 45, generator=torch.Generator().manual_seed(0)))
    stored = store(case, coded)
    parts = stored_format(scheme_of(CONFIGS[case])).parts("m", (37, 45))
    assert all(parts[f"m.{name}"].fits(tuple(tensor.shape)) for name, tensor in stored.items())
    assert torch.equal(read(CONFIGS[case], stored, (37, 45)).dequantize(), coded.weight)


def test_fp8_of_other_programs_has_scales_under_other_names() -> None:
    """Packed as the configs of published models describe it: one scale a weight (AutoFP8), or 128 by 128 (Qwen)."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(160, 130, generator=generator).to(torch.float8_e4m3fn)
    one = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "*.gate"]}
    for scale in (torch.tensor(0.03), torch.tensor([0.03])):
        assert torch.equal(
            read(one, {"weight": codes, "weight_scale": scale}, (160, 130)).dequantize(), codes.float() * 0.03
        )
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    scales = torch.rand(2, 2, generator=generator)
    each = scales.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :130]
    found = read(blocks, {"weight": codes, "weight_scale_inv": scales}, (160, 130))
    assert torch.equal(found.dequantize(), codes.float() * each) and found.group_size == 128


def test_a_zero_point_of_0_is_stored_as_the_largest_number_by_gptq_v1() -> None:
    stored, _ = stored_by_the_programs("gptq-int4-asym")
    stored["qzeros"] = torch.full_like(stored["qzeros"], -1)
    weight = read(CONFIGS["gptq-int4-asym"], stored)
    assert weight.zeros is not None and (weight.zeros == -8).all()


def refusal(case: str, **changes: Tensor) -> str:
    stored, _ = stored_by_the_programs(case)
    with pytest.raises(CheckpointError) as error:
        read(CONFIGS[case], stored | changes)
    return str(error.value)


def test_values_that_contradict_the_config_are_refused_by_name() -> None:
    order = torch.arange(32).flip(0).int() // 16
    assert refusal("gptq-int4", g_idx=order) == (
        "m.g_idx permutes the inputs (desc_act), which is not supported; quantize with desc_act false."
    )
    assert refusal("gptq-int4", qzeros=torch.zeros(2, 4).int()) == (
        "m.qzeros is not 8 everywhere, but the config says sym is true."
    )
    assert refusal("gptq-int4", bias=torch.ones(32)) == "m.bias is not 0, but the model has no bias there."
    assert refusal("compressed-tensors-words-int4-group", weight_shape=torch.tensor([32, 31])) == (
        "m.weight_shape is [32, 31], but the model's config makes it [32, 32]."
    )
    assert refusal("compressed-tensors-elements-int8-channel", weight_zero_point=torch.ones(32, 1).char()) == (
        "m.weight_zero_point is not 0, but the config says that it is symmetric."
    )
    assert refusal("compressed-tensors-elements-int4-group", weight=torch.full(SHAPE, 9).char()) == (
        "m.weight has a code beyond 4 bits."
    )
    nan = torch.full(SHAPE, float("nan")).to(torch.float8_e4m3fn)
    assert refusal("compressed-tensors-elements-fp8-tensor", weight=nan) == "m.weight has a value that is no number."
    assert refusal("awq", scales=torch.full((2, 32), float("inf")).half()) == (
        "m.scales has a scale that is infinite or no number."
    )


def test_zero_points_that_older_programs_store_for_symmetric_weights_are_read_over() -> None:
    case = "compressed-tensors-elements-int8-channel"
    stored, expected = stored_by_the_programs(case)
    weight = read(CONFIGS[case], stored | {"weight_zero_point": torch.zeros(32, 1).char()})
    assert weight.zeros is None and torch.equal(weight.dequantize(), expected)
