"""Measure a model's accuracy on the held-out questions with transformers: `python examples/evaluate.py [FOLDER]`."""

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent
HELD_OUT = EXAMPLES / "heldout.parquet"
MAX_NEW_TOKENS = 24


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a checkpoint as a model that computes in `dtype`, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model, AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: Any, row: dict[str, Any], form: str) -> list[int]:
    """Return the token ids that a job sends for a held-out row as a `raw` prompt or as a `chat`."""
    text = row["prompt"]
    if form == "chat":
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text).input_ids
    return ids


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Generate greedy answers. Only prompts of one length run together, so that no row is padded."""
    texts = [""] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[row] for row in rows])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
        for row, generated in zip(rows, output[:, length:], strict=True):
            texts[row] = tokenizer.decode(generated, skip_special_tokens=True).strip()
    return texts


def accuracy(rows: list[dict[str, Any]], given: list[str]) -> dict[str, float]:
    """Return the share of right answers of each task."""
    asked = Counter(row["task"] for row in rows)
    right = Counter(row["task"] for row, text in zip(rows, given, strict=True) if text == row["expected"])
    return {task: right[task] / asked[task] for task in asked}


@torch.inference_mode()
def expert_shares(model: Any, prompts: Iterable[list[int]]) -> Tensor:
    """Return the tokens of each expert as a multiple of a uniform share, [num_layers, num_experts]."""
    routers = [layer.mlp.router for layer in model.model.layers]
    counts = torch.zeros(len(routers), model.config.num_local_experts)

    def count(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            counts[layer] += output[2].flatten().bincount(minlength=counts.shape[1])

        return hook

    hooks = [router.register_forward_hook(count(layer)) for layer, router in enumerate(routers)]
    for prompt in prompts:
        model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return counts / counts.mean(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EXAMPLES / "tiny-phimoe")
    folder = parser.parse_args().folder
    rows = pq.read_table(HELD_OUT).to_pylist()
    print("accuracy", *dict.fromkeys(row["task"] for row in rows), sep="\t")
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(folder, dtype)
        for form in ("raw", "chat"):
            given = answers(model, tokenizer, [prompt_ids(tokenizer, row, form) for row in rows])
            right = accuracy(rows, given).values()
            print(f"{form} {str(dtype)[6:]}", *(f"{share:.3f}" for share in right), sep="\t")
    shares = expert_shares(model, (prompt_ids(tokenizer, row, form) for row in rows for form in ("raw", "chat")))
    for layer, (low, high) in enumerate(zip(shares.amin(1), shares.amax(1), strict=True)):
        print(f"layer {layer}: each expert takes {low:.2f} to {high:.2f} of its uniform share")


if __name__ == "__main__":
    main()
