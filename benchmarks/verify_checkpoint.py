"""Compare the logits of a checkpoint with transformers': ten prompts through both, and a verdict.

    python benchmarks/verify_checkpoint.py hf://ibm-granite/granite-3.1-1b-a400m-instruct
    python benchmarks/verify_checkpoint.py FOLDER --dtype bfloat16

Logits are compared and not tokens: weights of experts that are normalised wrongly, for example, change the likeliest
token of one position in a hundred. In float32 the two programs agree but for the order of sums, so a position counts as
equal if no logit differs by more than 0.1% of the logits' standard deviation, and 98% of the positions must be: where
two experts tie nearly, rounding decides which one runs. bfloat16, for models that do not fit in float32, tells less:
half of the positions must agree within 20%, and some mistakes are smaller than that.

Both models are in memory one after the other, in the chosen dtype. A folder without a tokenizer gets random token ids.
Only the CPU is used. Exit code 0: equal; 1: not; 2: cannot be compared.
"""

import argparse
import gc
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray.engine.backends.formats import TORCH_DTYPES
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.config import ModelConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence as EngineSequence
from moray.engine.errors import UserError
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner
from moray.engine.text.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "def fibonacci(n: int) -> int:\n    ",
    "Q: A train leaves at 9:40 and arrives at 13:05. How long is the journey?\nA:",
    "Translate into German: The weather is fine today, but tomorrow it will rain.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", ',
    "Die Würde des Menschen ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT customer, SUM(price) FROM orders WHERE",
    "In thermodynamics, the second law states that the entropy of an isolated system never decreases. It follows that",
)
RANDOM_LENGTHS = (1, 2, 3, 5, 8, 13, 17, 21, 34, 55)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BLOCK_SIZE = 16
# dtype -> how far a logit may be off, in standard deviations of the logits, at a position that counts as equal; and the
# share of the positions that must be
LIMITS = {"float32": (1e-3, 0.98), "bfloat16": (0.2, 0.5)}
REFERENCE_OPTIONS: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Comparison:
    """Compares the logits of one prompt.

    worst:      largest difference of each position, in standard deviations of the reference's logits
    agreement:  share of the positions with the same likeliest token
    """

    worst: Tensor
    agreement: float

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> "Comparison":
        """Compare logits, both [num_tokens, vocab_size]."""
        worst = (ours - theirs).abs().amax(dim=1) / theirs.std()
        worst = torch.where(worst.isfinite(), worst, torch.inf)
        return cls(worst, (ours.argmax(1) == theirs.argmax(1)).float().mean().item())


def prompt_ids(folder: Path, config: ModelConfig) -> list[list[int]]:
    """Return the token ids of the prompts; of random ones where the folder has no tokenizer."""
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = Tokenizer(folder)
        return [tokenizer.encode_prompt(text) for text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in RANDOM_LENGTHS]


@torch.inference_mode()
def reference_logits(folder: Path, dtype: torch.dtype, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Return transformers' logits at all positions of the prompts, in fp32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **REFERENCE_OPTIONS)
    model.eval()
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]


def our_logits(folder: Path, config: ModelConfig, dtype: torch.dtype, prompts: Sequence[list[int]]) -> Iterator[Tensor]:
    """Yield our logits at all positions of each prompt, in fp32."""
    runner = ModelRunner(load_model(folder, config, dtype), config, dtype, block_size=BLOCK_SIZE)
    num_blocks = -(-max(map(len, prompts)) // BLOCK_SIZE)
    runner.allocate_cache(num_blocks)
    for ids in prompts:
        seq = EngineSequence(0, Request("prompt", ids, SamplingParams()))
        original = config.rope.original_max_position_embeddings
        seq.rope_set = int(original is not None and len(ids) > original)
        seq.block_table = array("i", range(num_blocks))
        yield runner.compute_logits(runner.run([Scheduled(seq, len(ids))]), range(len(ids))).float()


def compare(folder: Path, dtype: str) -> bool:
    """Print a line for each prompt and the verdict; return whether the logits are equal."""
    config = read_model_config(folder)
    if config.architecture == "phi-msft":
        raise UserError("transformers has no class for phi-msft with experts, so there is nothing to compare with.")
    if config.quantization is not None:
        raise UserError(f"{folder} is quantized ({config.quantization.label}); name the checkpoint it was made of.")
    prompts = prompt_ids(folder, config)
    theirs = reference_logits(folder, TORCH_DTYPES[dtype], prompts)
    gc.collect()
    comparisons = []
    print(f"{config.architecture} in {dtype}, {len(prompts)} prompts")
    print("tokens  worst difference  same likeliest token")
    for ids, ours, want in zip(prompts, our_logits(folder, config, TORCH_DTYPES[dtype], prompts), theirs, strict=True):
        comparisons.append(one := Comparison.of(ours, want))
        print(f"{len(ids):6}  {one.worst.max().item():16.2e}  {one.agreement:20.1%}")
    worst = torch.cat([one.worst for one in comparisons])
    tolerance, share = LIMITS[dtype]
    equal = int((worst <= tolerance).sum())
    is_equal = equal >= share * len(worst)
    print(
        f"{'EQUAL' if is_equal else 'NOT EQUAL'}: {equal} of {len(worst)} positions agree within {tolerance:g} "
        f"standard deviations of the logits; the worst differs by {worst.max().item():.2e}, "
        f"the median by {worst.median().item():.2e}"
    )
    return is_equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, hf://org/name[@revision], s3://.. or gs://..")
    parser.add_argument("--dtype", choices=list(LIMITS), default="float32")
    args = parser.parse_args(arguments)
    try:
        return 0 if compare(ModelSource(args.model).download(), args.dtype) else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
