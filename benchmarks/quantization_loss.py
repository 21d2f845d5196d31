"""Measure the loss of accuracy by quantization: right answers of the small trained model, and changed logits.

What is quantized are weights, the KV cache, or both.

Two models: the small trained one with its 500 held-out questions (each raw and as a chat), and a random one of 30 M
parameters whose weights have heavy tails and large columns. Each format is compared with the same weights in bfloat16,
and so is computing in float32, which shows what rounding to bfloat16 alone changes: the mean and the 99th percentile of
the Kullback-Leibler divergence of the next token, in nats, over all positions of the prompts, and how often the best
token is the same.

    python benchmarks/quantization_loss.py [--only NAME]
"""

import argparse
import json
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from moray.engine.backends.base import Backend
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.engine import Engine
from moray.engine.models import ARCHITECTURES
from moray.engine.models.base import CausalLM
from moray.engine.params import SamplingParams
from moray.engine.quantization.kv_cache import KvCacheScheme
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner

ROOT = Path(__file__).resolve().parents[1]
TINY, HELD_OUT = ROOT / "examples/tiny-phimoe", ROOT / "examples/heldout.parquet"
FLOAT32 = "float32"  # the same weights, activations in float32
FORMATS: dict[str, tuple[OnLoadKind | None, int | None]] = {
    "bfloat16": (None, None),
    FLOAT32: (None, None),
    "int8": ("int8", None),
    "fp8": ("fp8", None),
    "int4, groups of 32": ("int4", 32),
    "int4, groups of 64": ("int4", 64),
    "int4, groups of 128": ("int4", 128),
    "bfloat16, fp8 cache": (None, None),
    "int8, fp8 cache": ("int8", None),
}
FP8_CACHE = "fp8 cache"  # what is at the end of the names of formats with such a cache
BLOCK_SIZE, MAX_LENGTH = 16, 512
NUM_BLOCKS = MAX_LENGTH // BLOCK_SIZE
MAX_TOKENS = 24  # of an answer, as in examples/evaluate.py
RANDOM_PROMPTS, RANDOM_LENGTH = 8, 256
OUTLIER_COLUMNS, OUTLIER_FACTOR = 0.01, 3.0
RANDOM_CONFIG = {
    "model_type": "mixtral", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": MAX_LENGTH, "rope_theta": 1e6, "sliding_window": None,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip


def quantized(config: ModelConfig, kind: OnLoadKind | None, group_size: int | None) -> ModelConfig:
    """Return the config with weights quantized to a kind, in groups of this size."""
    config = with_quantization(config, kind, "the model")
    if config.quantization is None:
        return config
    return replace(config, quantization=replace(config.quantization, group_size=group_size))


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype in which a format of FORMATS is computed."""
    return torch.float32 if name == FLOAT32 else torch.bfloat16


def logits(folder: Path, name: str, prompts: list[list[int]]) -> Iterator[Tensor]:
    """Yield the logits of each prompt with a format, [tokens, vocab_size] fp32."""
    config, dtype = quantized(read_model_config(folder), *FORMATS[name]), dtype_of(name)
    if name.endswith(FP8_CACHE):
        config = replace(config, kv_cache=KvCacheScheme())
    runner = ModelRunner(load_model(folder, config, dtype), config, dtype, block_size=BLOCK_SIZE)
    runner.calibrate_cache()
    runner.allocate_cache(NUM_BLOCKS)
    for prompt in prompts:
        seq = Sequence(0, Request("r", prompt, SamplingParams()))
        seq.block_table = array("i", range(NUM_BLOCKS))
        hidden_states = runner.run([Scheduled(seq, len(prompt))])
        yield runner.compute_logits(hidden_states, range(len(prompt))).float()


def compare(folder: Path, prompts: list[list[int]], name: str) -> tuple[float, float, float]:
    """Return the mean and 99th percentile of the divergence from bfloat16, and the share of equal best tokens."""
    divergences, same = [], []
    for want, found in zip(logits(folder, "bfloat16", prompts), logits(folder, name, prompts), strict=True):
        p, q = want.log_softmax(-1), found.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        same.append(want.argmax(-1) == found.argmax(-1))
    each = torch.cat(divergences).double()
    return each.mean().item(), each.quantile(0.99).item(), torch.cat(same).double().mean().item()


def accuracy(prompts: list[list[int]], rows: list[dict[str, Any]], name: str) -> float:
    """Return the share of held-out questions with the right greedy answer."""

    def load(folder: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend) -> CausalLM:
        return load_model(folder, quantized(config, *FORMATS[name]), dtype, backend)

    engine_config = EngineConfig(
        device="cpu",
        dtype=str(dtype_of(name)).removeprefix("torch."),
        kv_cache_dtype="fp8" if name.endswith(FP8_CACHE) else None,
    )
    engine = Engine(str(TINY), engine_config, load=load)
    assert engine.tokenizer is not None
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=MAX_TOKENS)))
    right = 0
    while engine.has_work:
        for output in engine.step():
            if (done := output.completion) is not None:
                text = engine.tokenizer.decode(done.token_ids).strip()
                right += text == rows[int(output.request_id) % len(rows)]["expected"]
    return right / len(prompts)


def held_out() -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Return the prompts of all questions, raw and then as chats, and the questions."""
    sys.path.insert(0, str(ROOT / "examples"))
    from evaluate import prompt_ids
    from transformers import AutoTokenizer

    rows: list[dict[str, Any]] = pq.read_table(HELD_OUT).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [prompt_ids(tokenizer, row, form) for form in ("raw", "chat") for row in rows], rows


def write_outliers(folder: Path) -> Path:
    """Write a random model: Student's t with 4 degrees of freedom, and one column of a hundred three times as large."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RANDOM_CONFIG))
    torch.manual_seed(0)
    student = torch.distributions.StudentT(torch.tensor(4.0))
    tensors = {}
    for name, target in ARCHITECTURES["mixtral"].tensor_map(read_model_config(folder)).items():
        values = torch.randn(target.shape)
        if "norm" in name:
            values = 1 + values * 0.1
        elif "experts" in name or "_proj" in name:
            values = student.sample(target.shape) / 2**0.5  # of variance 1
            values[:, torch.rand(target.shape[1]) < OUTLIER_COLUMNS] *= OUTLIER_FACTOR
            values *= 1.5 / target.shape[1] ** 0.5
        elif "embed" in name:
            values *= 0.5
        else:
            values *= (6 if ".gate." in name else 1.5) / target.shape[1] ** 0.5
        tensors[name] = values.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="formats whose name contains this")
    args = parser.parse_args()
    prompts, rows = held_out()
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(3, 4096, (RANDOM_PROMPTS, RANDOM_LENGTH), generator=generator).tolist()
    print("| Weights | right answers | KL mean, 99% | same best token | outliers: KL mean, 99% | same best token |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as parent:
        outliers = write_outliers(Path(parent) / "outliers")
        for name in (name for name in FORMATS if args.only in name):
            cells = [f"{accuracy(prompts, rows, name):.1%}"]
            for folder, texts in ((TINY, prompts), (outliers, random)):
                mean, high, same = compare(folder, texts, name)
                cells += [f"{mean:.1e}, {high:.1e}", f"{same:.2%}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
