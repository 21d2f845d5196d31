"""Contexts up to the model's last position, in fp32 against transformers, on both sides of LongRoPE's switch.

The reference is transformers' PhiMoE on all tokens of a sequence at once, without a cache. Its attention is computed
from 64 queries at a time (long_reference.py), since a matrix of all scores would not fit. All logits of the generated
tokens are compared, within 1e-4, and each token must be the best one of the reference.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from long_reference import LongReference
from tiny_checkpoints import PHIMOE, write
from torch import Tensor

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.scoring import scoring_params

DEADLINE_S = 3600  # of the test of 131,072 tokens, which takes minutes of both cores where nothing else runs


def model_of(folder: Path, context: int, original: int, **changes: Any) -> Path:
    """Write a model with so long a context, whose sequences of more than `original` tokens use the long factors.

    Its mscales leave scores so small that float32 rounds them well: with 1.4, transformers' own attention is 1e-4 away
    from float64 at 64,000 keys.
    """
    mscales = {"short_mscale": 1.0, "long_mscale": 0.6}
    rope = {**PHIMOE["rope_scaling"], **mscales, "original_max_position_embeddings": original}
    lengths = {"max_position_embeddings": context, "sliding_window": context}
    return write(
        folder, {**PHIMOE, **lengths, "original_max_position_embeddings": original, "rope_scaling": rope, **changes}
    )


def tokens(length: int) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def run(engine: Engine, requests: dict[str, tuple[list[int], int]]) -> dict[str, tuple[list[int], Tensor]]:
    """Run greedy requests, name -> (prompt, max_tokens), at the same time.

    Returns all tokens of each, and the logits of the generated ones, [max_tokens, vocab_size].
    """
    token_ids = {name: list(prompt) for name, (prompt, _) in requests.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in requests}
    launch = engine.sampler.launch

    def keep(rows: Tensor, samples: Any) -> Any:
        for row, sample in zip(rows.clone(), samples, strict=True):
            logits[sample.seq.request.request_id].append(row)
        return launch(rows, samples)

    engine.sampler.launch = keep  # type: ignore[method-assign]
    for name, (prompt, max_tokens) in requests.items():
        engine.add(Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
    while engine.has_work:
        for output in engine.step():
            token_ids[output.request_id] += output.new_token_ids
    engine.sampler.launch = launch  # type: ignore[method-assign]
    assert all(len(token_ids[name]) == len(prompt) + n for name, (prompt, n) in requests.items())
    return {name: (token_ids[name], torch.stack(logits[name])) for name in requests}


def check(reference: LongReference, token_ids: list[int], logits: Tensor, original: int) -> None:
    """Check the logits of the last tokens, and that each was the best one.

    A token is chosen with the factors of the length before it: short up to `original`, long for all after it.
    """
    first = len(token_ids) - len(logits)
    halves = [range(first, min(len(token_ids), original + 1)), range(max(first, original + 1), len(token_ids))]
    for lengths in filter(None, halves):
        want = reference.logits_from(token_ids[: lengths.stop - 1], lengths.start - 1)
        got = logits[lengths.start - first : lengths.stop - first]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        chosen = want.gather(1, torch.tensor(token_ids[lengths.start : lengths.stop])[:, None]).squeeze(1)
        assert (chosen > want.max(1).values - 2e-4).all(), "not greedy"


def test_logits_up_to_the_last_position(tmp_path: Path) -> None:
    """A whole context, one that outgrows the short factors, and short ones, all in the same steps."""
    context, original = 1500, 64
    folder = model_of(tmp_path, context, original)
    engine = Engine(str(folder), EngineConfig(device="cpu", max_num_batched_tokens=96, kv_cache_memory=1 << 22))
    requests = {
        "whole": (tokens(context - 40), 40),
        "grows": (tokens(original - 20), 60),
        "short": (tokens(9), 30),
        "last": (tokens(context - 1), 1),
    }
    reference = LongReference(folder)
    for token_ids, logits in run(engine, requests).values():
        check(reference, token_ids, logits, original)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
def test_131072_tokens_with_4096_new_ones(tmp_path: Path) -> None:
    """The whole context of Phi-3.5-MoE: 126,976 tokens of prompt and 4,096 new ones, beside a short sequence."""
    context, original = 131_072, 4096
    one_layer = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    folder = model_of(tmp_path, context, original, **one_layer, num_local_experts=4)
    engine = Engine(str(folder), EngineConfig(device="cpu", kv_cache_memory=1 << 25, num_threads=2))
    requests = {"whole": (tokens(context - 4096), 4096), "grows": (tokens(original - 30), 60)}
    reference = LongReference(folder)
    for token_ids, logits in run(engine, requests).values():
        check(reference, token_ids, logits, original)


def test_what_is_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    engine = Engine(str(model_of(tmp_path, 600, 64)), EngineConfig(device="cpu", kv_cache_memory=1 << 22))
    for prompt, max_tokens in ((600, 1), (599, 2), (1, 600), (601, 0)):
        with pytest.raises(RequestError) as caught:
            engine.add(Request("r", tokens(prompt), SamplingParams(max_tokens=max_tokens)))
        assert caught.value.code == "too_long"
        needed = f"needs {prompt + max_tokens:,} tokens (prompt {prompt:,} + max_tokens {max_tokens:,})"
        assert caught.value.message.startswith(f"{needed}; this model holds 600.")
    engine.add(Request("r", tokens(550), scoring_params(None), continuations=[tokens(50)]))
    with pytest.raises(RequestError):
        engine.add(Request("s", tokens(550), scoring_params(None), continuations=[tokens(51)]))
    outputs = [output for _ in range(20) if engine.has_work for output in engine.step()]
    assert len(outputs[-1].completion.prompt_logprobs) == 600  # type: ignore[union-attr, arg-type]
