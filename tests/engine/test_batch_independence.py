"""Tests that greedy answers and logprobs in bf16, at a real model's widths, do not depend bit by bit on the batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import PHIMOE, write

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request, TokenLogprobs
from moray.kernels.cpu import self_check
from moray.kernels.cpu.linear import paths

# The widths of benchmarks/bench_model.py, whose linear layers took several kernels of oneDNN on a CPU with AMX.
WIDE = PHIMOE | {
    "hidden_size": 1024,
    "intermediate_size": 1600,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "vocab_size": 2048,
    "rope_scaling": None,
}
NUM_ROWS, NUM_TOKENS, NUM_LOGPROBS = 40, 12, 3
Answer = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("wide"), WIDE, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answers(folder: Path, order: list[int], num_threads: int = 1, **config: Any) -> dict[str, Answer]:
    engine = Engine(str(folder), EngineConfig(num_threads=num_threads, kv_cache_memory=64 << 20, **config))
    lengths = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 40, (NUM_ROWS,), generator=lengths).tolist()
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=NUM_LOGPROBS)
    for row in order:
        generator = torch.Generator().manual_seed(row)
        prompt = torch.randint(3, WIDE["vocab_size"], (sizes[row],), generator=generator).tolist()
        engine.add(Request(str(row), tuple(prompt), params))
    found: dict[str, Answer] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.logprobs is not None
                found[output.request_id] = output.completion.token_ids, output.completion.logprobs
    return found


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    in_order = list(range(NUM_ROWS))
    want = answers(folder, in_order, max_num_seqs=64)
    assert len(want) == NUM_ROWS and len({tokens for tokens, _ in want.values()}) > NUM_ROWS // 2
    assert all(len(tokens) == len(logprobs) == NUM_TOKENS for tokens, logprobs in want.values())
    shuffled = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    assert answers(folder, in_order, max_num_seqs=1) == want
    assert answers(folder, in_order, max_num_seqs=7) == want
    assert answers(folder, shuffled, max_num_seqs=64, num_threads=2) == want
    assert answers(folder, shuffled, max_num_seqs=16, max_num_batched_tokens=19) == want


def test_a_path_that_fails_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the shape, the failed path and the path used instead; the engine reports its kernels."""
    best, second = paths(torch.bfloat16)[:2]
    find_mistakes = self_check.find_mistakes

    def fail_for_some(weight: torch.Tensor, path: str) -> Iterator[str]:
        yield from ["other bits"] if path == best and weight.shape == (1600, 1024) else find_mistakes(weight, path)

    monkeypatch.setattr(self_check, "find_mistakes", fail_for_some)
    monkeypatch.setattr(self_check, "_results", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with caplog.at_level("INFO", logger="moray.engine.backends.cpu.backend"):
        engine = Engine(str(folder), EngineConfig(kv_cache_memory=64 << 20))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"Linear layers bfloat16 [1600, 1024]: rows computed by {best} depend on their batch, or are wrong, on this "
        f"CPU; {second} is used."
    ]
    assert f"{best} and {second}" in engine.products or f"{second} and {best}" in engine.products
    assert "1 left a path that failed" in engine.products and engine.products in caplog.text
