"""Tests that quantized models on the Triton kernels give the tokens of what their codes stand for."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dequantized import dequantized
from published_checkpoints import publish_mxfp4
from triton_backend import TRITON

import moray.engine.runner.open_model
from moray.engine.backends.cuda.backend import CudaBackend
from moray.engine.backends.cuda.quantized import PackedCodesFormat
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import DeviceError
from moray.engine.params import SamplingParams
from moray.engine.quantization.on_load import quantize
from moray.engine.quantization.scheme import ON_LOAD_KINDS, OnLoadKind
from moray.engine.quantization.weight import QuantizedWeight
from moray.engine.request import Request

CONFIG = EngineConfig(dtype="float32", max_num_seqs=3, max_num_batched_tokens=12, kv_cache_memory=200_000)


def generate(folder: Path, config: EngineConfig) -> dict[str, list[int]]:
    """Run two prompts, in steps that hold a part of them, together and with decoding."""
    engine = Engine(str(folder), config)
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate((3, 17)):
        prompt = torch.randint(5, 160, (length,), generator=generator).tolist()
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


@pytest.mark.parametrize(
    "kind", ["int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ON_LOAD_KINDS if kind != "int4")]
)
@pytest.mark.parametrize(
    "architecture", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phimoe", "phi-msft"))]
)
def test_tokens_equal_the_cpus_on_the_dequantized_weights(
    one_layer: dict[str, Path], tmp_path: Path, architecture: str, kind: OnLoadKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both multiply in fp32 by what the codes stand for."""
    folder = one_layer[architecture]
    want = generate(dequantized(folder, tmp_path / "plain", kind), replace(CONFIG, device="cpu"))
    assert {len(tokens) for tokens in want.values()} == {4}
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    assert generate(folder, replace(CONFIG, quantization=kind)) == want


@pytest.mark.slow
def test_tokens_of_mxfp4_experts_equal_the_cpus_on_the_dequantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, exact = publish_mxfp4(tmp_path)
    want = generate(exact, replace(CONFIG, device="cpu"))
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    assert generate(published, CONFIG) == want


@pytest.mark.parametrize("kind", ON_LOAD_KINDS)
def test_activations_keep_their_dtype_on_every_gpu(kind: OnLoadKind) -> None:
    """No GPU is asked what it can multiply: the fingerprint of a job does not say on which it ran."""
    weight = quantize(torch.ones(16, 128), kind)
    kernel = CudaBackend.quantized_formats[kind].pack_linear(weight, None, torch.bfloat16, 16)
    assert isinstance(kernel, partial) and kernel.keywords["weight"].format == kind


def quantized(n: int, k: int, group_size: int) -> QuantizedWeight:
    return QuantizedWeight("int8", torch.ones(n, k, dtype=torch.int8), torch.ones(n, -(-k // group_size)), group_size)


def test_groups_that_no_kernel_multiplies_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"groups of 48 inputs; a GPU's kernels multiply groups of 32, 64 or mult"):
        PackedCodesFormat().pack_linear(quantized(16, 96, 48), None, torch.bfloat16, 16)
