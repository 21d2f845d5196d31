"""Tests of tokens counted by expert and layer against the choices of the reference's routers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import FAMILIES, Reference
from torch import Tensor, nn

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request

NUM_TOKENS = 6


def chosen(reference: Reference, texts: list[list[int]], num_experts: int) -> Tensor:
    """Return how often each expert is chosen in full forwards of the texts, [num_layers, num_experts]."""
    counts: dict[nn.Module, Tensor] = {}

    def count(gate: nn.Module, _: Any, output: Any) -> None:
        ids = output[2] if isinstance(output, tuple) else output.sort(dim=-1, descending=True, stable=True)[1][..., :2]
        counts[gate] = counts.get(gate, 0) + ids.flatten().bincount(minlength=num_experts)

    gates = [module for name, module in reference.model.named_modules() if name.endswith((".gate", ".router"))]
    hooks = [gate.register_forward_hook(count) for gate in gates]
    for token_ids in texts:
        reference.logits(token_ids)
    for hook in hooks:
        hook.remove()
    return torch.stack([counts[gate] for gate in gates])


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_counts_equal_those_of_the_reference(checkpoints: dict[str, Path], architecture: str, is_async: bool) -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=9, async_scheduling=is_async)
    engine = Engine(str(checkpoints[architecture]), config)
    assert engine.expert_tokens().sum() == 0
    prompts = [torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 8, 15, 20)]
    texts: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)))
    while engine.has_work:
        for output in engine.step():
            texts.setdefault(output.request_id, list(prompts[int(output.request_id)])).extend(output.new_token_ids)
    tokens = engine.expert_tokens()
    ran = [text[:-1] for text in texts.values()]  # the last token is never run
    assert torch.equal(tokens, chosen(Reference(checkpoints[architecture]), ran, engine.model_config.num_experts))
    top_k = engine.model_config.num_experts_per_tok
    assert (tokens.sum(dim=1) == top_k * engine.metrics.computed_tokens).all()
    engine.runner.expert_load.reset()
    assert tokens.sum() > 0 == engine.expert_tokens().sum(), "what was read does not change any more"
