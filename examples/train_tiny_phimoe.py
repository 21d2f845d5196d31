"""Train examples/tiny-phimoe from nothing on the questions of tasks.py: `python examples/train_tiny_phimoe.py`.

Runs on the CPU with transformers' PhimoeForCausalLM in float32 and writes bfloat16 weights under the published names.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tasks
import tiny_tokenizer
import torch
from tiny_config import CONFIG, GENERATION_CONFIG, phimoe_config
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PhimoeForCausalLM, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "tiny-phimoe"
ROWS = 16  # rows of a batch
ROW = 128  # tokens of a packed row
WARMUP = 100  # steps
BALANCE = 0.01  # weight of balance_loss
IGNORE = -100  # label of a token without a loss


@dataclass(frozen=True)
class Round:
    """Describes a round of training.

    decay:    steps at the end in which the learning rate falls
    peak:     highest learning rate
    weights:  task -> how often it is asked, relative to the others
    """

    steps: int
    decay: int
    peak: float
    weights: dict[str, float]


ROUNDS = (
    Round(3914, 1300, 3e-3, {"add": 3.0, "largest": 2.0, "sort": 2.0, "reverse": 1.5, "count": 2.0, "fact": 1.0}),
    # Sorting and facts take longest.
    Round(900, 700, 2e-3, {"add": 1.0, "largest": 0.5, "sort": 4.0, "reverse": 1.5, "fact": 3.0}),
    Round(800, 500, 2e-3, {"add": 1.5, "largest": 1.0, "sort": 3.0, "reverse": 1.0, "fact": 4.0}),
)


@dataclass
class Batch:
    """Holds packed rows, each [ROWS, ROW]. Positions start at 0 in each example, so examples do not see each other."""

    input_ids: Tensor
    positions: Tensor
    labels: Tensor


class Examples:
    """Yields training examples for ever, as (token ids, labels); only the answer and its stop token have labels."""

    def __init__(self, tok: PreTrainedTokenizerBase, weights: dict[str, float], seed: int) -> None:
        self.tok = tok
        self.rng = random.Random(seed)
        self.questions = tasks.training(self.rng, weights)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tok(text).input_ids
        return ids

    def raw(self, question: tasks.Question) -> tuple[list[int], list[int]]:
        prompt = self.encode(question.prompt)
        answer = self.encode(f" {question.answer}{tiny_tokenizer.END_OF_TEXT}")
        return prompt + answer, [IGNORE] * len(prompt) + answer

    def chat(self, question: tasks.Question) -> tuple[list[int], list[int]]:
        messages = [{"role": "system", "content": tiny_tokenizer.SYSTEM}] if self.rng.random() < 0.25 else []
        if self.rng.random() < 0.1:
            earlier = next(self.questions)
            messages.append({"role": "user", "content": earlier.question})
            messages.append({"role": "assistant", "content": earlier.answer})
        messages.append({"role": "user", "content": question.question})
        text = self.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        prompt = self.encode(text)
        answer = self.encode(question.answer + tiny_tokenizer.END_OF_TURN)
        return prompt + answer, [IGNORE] * len(prompt) + answer

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        for question in self.questions:
            yield self.raw(question) if self.rng.random() < 0.5 else self.chat(question)


def batches(examples: Iterator[tuple[list[int], list[int]]]) -> Iterator[Batch]:
    """Yield batches of rows filled with whole examples; one that does not fit starts the next row."""
    example = next(examples)
    while True:
        packed: list[tuple[list[int], list[int], list[int]]] = []
        for _ in range(ROWS):
            ids: list[int] = []
            labels: list[int] = []
            positions: list[int] = []
            assert len(example[0]) <= ROW, f"an example of {len(example[0])} tokens does not fit a row of {ROW}"
            while len(ids) + len(example[0]) <= ROW:
                ids += example[0]
                labels += example[1]
                positions += range(len(example[0]))
                example = next(examples)
            rest = ROW - len(ids)
            packed.append((ids + [0] * rest, [*positions, *range(rest)], labels + [IGNORE] * rest))
        yield Batch(*(torch.tensor(column) for column in zip(*packed, strict=True)))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Return how unevenly tokens are divided between experts, summed over the layers; a layer's minimum is top_k.

    transformers' own loss adds up the layers first, so that an overloaded expert in one layer and an idle one in
    another cancel out.
    """
    total = torch.zeros(())
    for logits in router_logits:
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(top_k).indices, 1.0)
        total = total + logits.shape[1] * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    return total


def loss_of(model: PhimoeForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    output = model.model(
        input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, output_router_logits=True
    )
    labels = batch.labels[:, 1:]
    known = labels != IGNORE
    logits = model.lm_head(output.last_hidden_state[:, :-1][known])
    loss = cross_entropy(logits, labels[known])
    return loss, loss + BALANCE * balance_loss(output.router_logits, model.config.num_experts_per_tok)


def save(model: PhimoeForCausalLM, folder: Path) -> None:
    """Write bfloat16 weights and the configs; transformers knows the published tensor names, but not the config's."""
    model.bfloat16().save_pretrained(folder)
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def rate(step: int, steps: int, decay: int) -> float:
    """Return the share of the peak learning rate: warm-up, plateau and a linear fall to 0 in the last `decay` ones."""
    return min(step / WARMUP, 1.0, (steps - step) / decay)


def train(model: PhimoeForCausalLM, stream: Iterator[Batch], part: Round) -> None:
    """Train the model for one round."""
    model.set_experts_implementation("eager")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), part.peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, part.steps, part.decay))
    start = time.monotonic()
    for step in range(1, part.steps + 1):
        loss, objective = loss_of(model, next(stream))
        optimizer.zero_grad()
        torch.autograd.backward(objective)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            wall, cpu = time.monotonic() - start, time.process_time()
            print(f"step {step} of {part.steps}: loss {loss.item():.4f}; {wall:.0f} s, {cpu:.0f} of CPU", flush=True)


def main(folder: Path, seed: int) -> None:
    tok = tiny_tokenizer.write(folder)
    config = phimoe_config(input_jitter_noise=0.0)
    for number, part in enumerate(ROUNDS):
        torch.manual_seed(seed + number)
        if number == 0:
            model = PhimoeForCausalLM(config)
            print(f"{model.num_parameters():,} parameters, {len(tok)} tokens in the vocabulary")
        else:
            model = PhimoeForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        train(model, batches(iter(Examples(tok, part.weights, seed + number))), part)
        save(model, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One thread: the sums keep their order, so that a run can be repeated, and small matrices gain little by a second.
    torch.set_num_threads(1)
    main(options.folder, options.seed)
