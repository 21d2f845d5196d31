"""Tests of the engine's greedy tokens against a full recompute, with all kinds of batches, chunks and preemptions."""

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from tiny_checkpoints import FIRST_FAMILIES, LATER_FAMILIES, MIXTRAL, PHIMOE, Reference, write

from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.core.limits import choose_limits
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError, NodeError, RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.engine.sampling.sampler import Sampler

ORIGINAL = PHIMOE["original_max_position_embeddings"]
LENGTHS = (1, 2, 15, 16, 17, 24, 25, 31, 32, 33, 47, 48, 60)  # around blocks and the LongRoPE boundary
NUM_TOKENS = 9  # from prompts of 24 .. 32 tokens on, the completion crosses the boundary


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(1000 * seed + n)).tolist()


def greedy(max_tokens: int = NUM_TOKENS, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
    for request in requests:
        engine.add(request)
    return drain(engine)


def drain(engine: Engine) -> dict[tuple[str, int], Completion]:
    done: dict[tuple[str, int], Completion] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert (output.request_id, output.sample) not in done
                done[output.request_id, output.sample] = output.completion
    assert engine.stats().free_blocks == engine.limits.num_blocks
    engine._scheduler.block_manager.check([])
    return done


Start = Callable[..., Engine]


@pytest.fixture(params=[False, True], ids=["step by step", "a step ahead"])
def start(request: pytest.FixtureRequest) -> Start:
    """Return a function that makes an Engine which reads a step's tokens at once, or after launching the next step."""
    return lambda folder, config=None: Engine(
        str(folder), replace(config or EngineConfig(), async_scheduling=request.param)
    )


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path]) -> dict[str, dict[int, list[int]]]:
    """Return greedy completions by architecture and prompt length, each token from a full forward of its prefix."""
    models = {name: Reference(checkpoints[name]) for name in FIRST_FAMILIES}
    return {name: {n: model.greedy(tokens(n), NUM_TOKENS) for n in LENGTHS} for name, model in models.items()}


BLOCK_BYTES = {"phimoe": 8192, "mixtral": 8192, "phi-msft": 20480}  # in fp32

CONFIGS = {
    "all at once": EngineConfig(),
    "one by one": EngineConfig(max_num_seqs=1),
    "small chunks": EngineConfig(max_num_batched_tokens=7),
    "a token a step": EngineConfig(max_num_seqs=1, max_num_batched_tokens=1),
}


@pytest.mark.parametrize("architecture", FIRST_FAMILIES)
@pytest.mark.parametrize("how", CONFIGS)
def test_greedy_tokens_equal_a_full_recompute(
    start: Start, checkpoints: dict[str, Path], references: dict[str, dict[int, list[int]]], architecture: str, how: str
) -> None:
    engine = start(checkpoints[architecture], CONFIGS[how])
    done = run(engine, [Request(str(n), tokens(n), greedy()) for n in LENGTHS])
    assert {n: list(done[str(n), 0].token_ids) for n in LENGTHS} == references[architecture]
    assert {c.finish_reason for c in done.values()} == {"length"}
    crossings = sum(n <= ORIGINAL < n + NUM_TOKENS - 1 for n in LENGTHS) if architecture == "phimoe" else 0
    assert engine.metrics.preemptions == crossings


@pytest.mark.parametrize("architecture", LATER_FAMILIES)
def test_greedy_tokens_of_the_later_families_equal_a_full_recompute(
    start: Start, checkpoints: dict[str, Path], architecture: str
) -> None:
    reference = Reference(checkpoints[architecture])
    engine = start(checkpoints[architecture], EngineConfig(max_num_batched_tokens=11))
    done = run(engine, [Request(str(n), tokens(n), greedy(5)) for n in (1, 16, 17, 33)])
    for n in (1, 16, 17, 33):
        assert list(done[str(n), 0].token_ids) == reference.greedy(tokens(n), 5)


@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in FIRST_FAMILIES[1:])]
)
def test_preempted_sequences_give_the_same_tokens(
    start: Start, checkpoints: dict[str, Path], architecture: str
) -> None:
    """Six sequences that grow over three blocks each share a cache of nine blocks."""
    reference = Reference(checkpoints[architecture])
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=32, kv_cache_memory=9 * BLOCK_BYTES[architecture])
    engine = start(checkpoints[architecture], config)
    lengths = (3, 5, 8, 11, 15, 16)
    done = run(engine, [Request(str(n), tokens(n), greedy(40)) for n in lengths])
    for n in lengths:
        assert list(done[str(n), 0].token_ids) == reference.greedy(tokens(n), 40)
    crossings = len(lengths) if architecture == "phimoe" else 0
    assert engine.metrics.preemptions > crossings


@pytest.mark.parametrize("architecture", FIRST_FAMILIES)
def test_requests_that_come_and_go_change_nothing(
    start: Start, checkpoints: dict[str, Path], references: dict[str, dict[int, list[int]]], architecture: str
) -> None:
    """New prompts are added to decoding ones at every other step, so that each step has another batch."""
    engine = start(checkpoints[architecture], EngineConfig(max_num_seqs=5, max_num_batched_tokens=20))
    waiting, done = list(LENGTHS), {}
    while waiting or engine.has_work:
        if waiting and engine.metrics.steps % 2 == 0:
            n = waiting.pop()
            engine.add(Request(str(n), tokens(n), greedy()))
        for output in engine.step() if engine.has_work else []:
            if output.completion:
                done[int(output.request_id)] = list(output.completion.token_ids)
        if not engine.has_work and waiting:
            n = waiting.pop()
            engine.add(Request(str(n), tokens(n), greedy()))
    assert done == references[architecture]


def test_prefix_hits_give_the_same_tokens(
    start: Start, checkpoints: dict[str, Path], references: dict[str, dict[int, list[int]]]
) -> None:
    for architecture, expected in references.items():
        engine = start(checkpoints[architecture])
        for _ in range(2):
            done = run(engine, [Request(str(n), tokens(n), greedy()) for n in LENGTHS])
            assert {n: list(done[str(n), 0].token_ids) for n in LENGTHS} == expected
        hits = [n - 1 - (n - 1) % engine.limits.block_size for n in LENGTHS]
        assert engine.metrics.cached_tokens >= sum(hits) > 0


def test_a_prefix_of_the_other_rope_set_is_no_hit(checkpoints: dict[str, Path]) -> None:
    """The first 16 tokens of a long prompt were cached with the long factors, so a short prompt must not use them."""
    long = tokens(60)
    engine = Engine(str(checkpoints["phimoe"]))
    run(engine, [Request("long", long, greedy())])
    done = run(engine, [Request("short", long[:20], greedy(5))])
    assert list(done["short", 0].token_ids) == Reference(checkpoints["phimoe"]).greedy(long[:20], 5)
    assert engine.metrics.cached_tokens == 0


def test_static_longrope_uses_the_long_factors_for_all(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The results are those of a model whose factors are all long."""
    scaling = PHIMOE["rope_scaling"]
    scaling = {**scaling, "short_factor": scaling["long_factor"], "short_mscale": scaling["long_mscale"]}
    always_long = Reference(write(tmp_path, {**PHIMOE, "rope_scaling": scaling}))
    engine = Engine(str(checkpoints["phimoe"]), EngineConfig(longrope="static"))
    done = run(engine, [Request(str(n), tokens(n), greedy()) for n in (5, 30, 40)])
    for n in (5, 30, 40):
        assert list(done[str(n), 0].token_ids) == always_long.greedy(tokens(n), NUM_TOKENS)
    assert engine.metrics.preemptions == 0
    within = Engine(str(checkpoints["phimoe"]), EngineConfig(longrope="static", max_model_len=ORIGINAL))
    done = run(within, [Request("5", tokens(5), greedy())])
    assert list(done["5", 0].token_ids) == Reference(checkpoints["phimoe"]).greedy(tokens(5), NUM_TOKENS)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in FIRST_FAMILIES[1:])]
)
def test_a_seeded_sample_is_the_same_whatever_runs_beside_it(
    checkpoints: dict[str, Path], architecture: str, dtype: str
) -> None:
    """Tokens and logprobs are equal bit by bit: alone, in any batch and order, in chunks, preempted, from the cache."""
    params = SamplingParams(max_tokens=14, temperature=1.5, top_p=0.95, ignore_eos=True, logprobs=2, n=2)
    wanted = [Request(f"w{n}", tokens(n), params, stream_key=77 + n) for n in (3, 16, 29, 50)]
    company = [Request(f"c{i}", tokens(1 + 5 * i % 70, i), params, stream_key=i) for i in range(14)]
    alone: dict[tuple[str, int], Completion] = {}
    lone = Engine(str(checkpoints[architecture]), EngineConfig(dtype=dtype))
    for request in wanted:
        alone |= run(lone, [request])
    assert len({c.token_ids for c in alone.values()}) == 8
    cache = 10 * BLOCK_BYTES[architecture] // (2 if dtype == "bfloat16" else 1)
    for config in (
        EngineConfig(dtype=dtype),
        EngineConfig(dtype=dtype, max_num_seqs=7, max_num_batched_tokens=19),
        EngineConfig(dtype=dtype, max_num_batched_tokens=64, kv_cache_memory=cache),
        EngineConfig(dtype=dtype, max_num_batched_tokens=64, kv_cache_memory=cache, async_scheduling=True),
    ):
        engine = Engine(str(checkpoints[architecture]), config)
        done = run(engine, company[:5] + wanted[:2] + company[5:9] + wanted[2:] + company[9:])
        again = run(engine, wanted[::-1] + company[::-1])
        assert engine.metrics.preemptions > 0 or config.kv_cache_memory is None
        for key, completion in alone.items():
            assert done[key] == completion and again[key] == completion, (config, key)


def test_samples_of_a_request_differ_and_share_their_prompt(start: Start, checkpoints: dict[str, Path]) -> None:
    engine = start(checkpoints["mixtral"])
    params = SamplingParams(max_tokens=8, temperature=1.0, n=5, ignore_eos=True)
    done = run(engine, [Request("r", tokens(40), params)])
    assert sorted(sample for _, sample in done) == [0, 1, 2, 3, 4]
    assert len({c.token_ids for c in done.values()}) == 5
    assert engine.metrics.cached_tokens == 4 * 32


def test_another_stream_key_is_another_sample(checkpoints: dict[str, Path]) -> None:
    engine = Engine(str(checkpoints["mixtral"]))
    params = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True)
    done = run(engine, [Request(str(key), tokens(10), params, stream_key=key) for key in range(4)])
    assert len({c.token_ids for c in done.values()}) == 4


def test_stop_tokens_end_the_text_and_are_not_in_it(
    start: Start, checkpoints: dict[str, Path], references: dict[str, dict[int, list[int]]]
) -> None:
    engine = start(checkpoints["mixtral"])
    full = references["mixtral"][17]
    stop = full[4]
    first = full.index(stop)
    done = run(engine, [Request("r", tokens(17), greedy(stop_token_ids=(stop,)))])["r", 0]
    assert (list(done.token_ids), done.finish_reason) == (full[:first], "stop")


def test_eos_of_the_config_ends_the_text_unless_ignored(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", MIXTRAL)
    full = Reference(plain).greedy(tokens(17), 6)
    ending = write(tmp_path / "ending", {**MIXTRAL, "eos_token_id": [1, full[3]]})
    engine = Engine(str(ending))
    done = run(engine, [Request("r", tokens(17), SamplingParams(max_tokens=6))])["r", 0]
    assert (list(done.token_ids), done.finish_reason) == (full[: full.index(full[3])], "stop")
    done = run(engine, [Request("r", tokens(17), greedy(6))])["r", 0]
    assert (list(done.token_ids), done.finish_reason) == (full, "length")
    done = run(engine, [Request("r", tokens(17), SamplingParams(max_tokens=6, min_tokens=6))])["r", 0]
    assert len(done.token_ids) == 6 and full[3] not in done.token_ids


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(max_num_batched_tokens=5)])
def test_logprobs_are_the_models_own(start: Start, checkpoints: dict[str, Path], config: EngineConfig) -> None:
    """Logprobs of prompt and completion equal transformers'; penalties, bias and temperature do not affect them."""
    for architecture, folder in checkpoints.items():
        engine, reference = start(folder, config), Reference(folder)
        params = SamplingParams(
            max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2, temperature=0.7, presence_penalty=1.5
        )
        prompt = tokens(40)
        run(engine, [Request("warm", prompt, greedy())])
        completion = run(engine, [Request("r", prompt, params)])["r", 0]
        assert completion.logprobs is not None and completion.prompt_logprobs is not None
        everything = prompt + list(completion.token_ids)
        table = reference.logits(everything).log_softmax(-1)
        assert completion.prompt_logprobs[0] is None and len(completion.prompt_logprobs) == len(prompt)
        for position, entry in enumerate((*completion.prompt_logprobs[1:], *completion.logprobs)):
            assert entry is not None and entry.token_id == everything[position + 1]
            row = table[position]
            if architecture == "phimoe" and position < len(prompt) - 1:
                assert len(entry.top) == 2
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-4)
            want = row.topk(len(entry.top))
            assert [p for _, p in entry.top] == pytest.approx(want.values.tolist(), abs=2e-4)


def test_abort_frees_everything(start: Start, checkpoints: dict[str, Path]) -> None:
    engine = start(checkpoints["mixtral"], EngineConfig(max_num_seqs=2))
    for name in "abc":
        engine.add(Request(name, tokens(20), greedy(50, n=2)))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    engine.abort("c")
    engine.abort("never seen")
    done = drain(engine)
    assert set(done) == {("b", 0), ("b", 1)}
    engine.add(Request("a", tokens(20), greedy(2)))
    assert list(drain(engine)) == [("a", 0)]


@pytest.mark.parametrize(
    ("prompt", "params", "code", "message"),
    [
        (tokens(200), greedy(100), "too_long",
         "needs 300 tokens (prompt 200 + max_tokens 100); this model holds 256. Shorten it or raise max_model_len."),
        (tokens(100), greedy(100), "no_cache_room",
         "needs 13 cache blocks of 16 tokens (prompt 100 + max_tokens 100); the KV cache has 8. Shorten it or raise "
         "engine.kv_cache_memory."),
        ([], greedy(), "empty_prompt", "the prompt has no tokens; it needs at least 1."),
        ([5, 160], greedy(), "bad_token_id", "the prompt has token id 160; this model's go from 0 to 159."),
        ([5, -1], greedy(), "bad_token_id", "the prompt has token id -1; this model's go from 0 to 159."),
        ([5], greedy(stop=("x",)), "no_tokenizer", "stop strings need a tokenizer; the model folder has none."),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused_with_numbers(
    checkpoints: dict[str, Path], prompt: list[int], params: SamplingParams, code: str, message: str
) -> None:
    engine = Engine(str(checkpoints["mixtral"]), EngineConfig(kv_cache_memory=2**16))
    with pytest.raises(RequestError) as caught:
        engine.add(Request("r", prompt, params))
    assert (caught.value.code, caught.value.message) == (code, message)
    assert not engine.has_work
    engine.add(Request("r", [5], greedy(1)))
    with pytest.raises(RequestError, match="request 'r' is already in the engine"):
        engine.add(Request("r", [5], greedy(1)))
    assert len(drain(engine)) == 1


def test_nan_logits_end_their_own_sequence_only(start: Start, checkpoints: dict[str, Path]) -> None:
    engine = start(checkpoints["mixtral"])
    with torch.no_grad():
        engine.runner.model.embed_tokens.weight[7] = torch.nan
    done = run(engine, [Request("bad", [5, 7], greedy(3)), Request("good", [5, 6], greedy(3))])
    assert done["bad", 0].finish_reason == "error"
    assert done["bad", 0].error == ("nan_logits", "the model's logits after token 2 are not finite numbers.")
    assert list(done["good", 0].token_ids) == Reference(checkpoints["mixtral"]).greedy([5, 6], 3)


def test_sampling_that_runs_out_of_memory_runs_once_more(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, prompt_logprobs=2, logprobs=1)
    request = Request("r", [5 + i % 100 for i in range(2 * CPU.logprob_rows)], params)

    def complete() -> Completion:
        return run(Engine(str(checkpoints["mixtral"]), EngineConfig()), [request])["r", 0]

    want, failures = complete(), list[str]()

    def sometimes(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def call(*args: Any) -> Any:
            if next(calls) % 3 == 1:
                failures.append(name)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return compute(*args)

        return call

    for name in ("launch_logprobs", "launch"):
        monkeypatch.setattr(Sampler, name, sometimes(name, getattr(Sampler, name)))
    assert complete() == want
    assert set(failures) == {"launch_logprobs", "launch"}


def test_memory_that_holds_no_block_is_the_machines_fault(checkpoints: dict[str, Path]) -> None:
    model = read_model_config(checkpoints["mixtral"])
    with pytest.raises(NodeError, match=r"the KV cache may take 500 bytes; one block of 16 tokens needs .* Free some"):
        choose_limits(EngineConfig(), model, itemsize=2, available_bytes=1000, device="cpu")


def test_limits_beyond_the_model_are_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"max_model_len: must be at most the model's context .*, 256, is 1,000"):
        Engine(str(checkpoints["mixtral"]), EngineConfig(max_model_len=1000))
    with pytest.raises(CheckpointError, match=r"kv_cache_memory: must hold a block of 16 tokens, .* bytes, is 100"):
        Engine(str(checkpoints["mixtral"]), EngineConfig(kv_cache_memory=100))


@pytest.mark.parametrize("k", [None, 0, 2])
@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(max_num_batched_tokens=7, max_num_seqs=2)])
def test_no_tokens_may_be_asked_for(
    start: Start, checkpoints: dict[str, Path], config: EngineConfig, k: int | None
) -> None:
    """A prompt alone has the logprobs of a request that continues, and leaves no batch slot or block in use."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=k)
    for folder in checkpoints.values():
        engine = start(folder, config)
        done = run(engine, [Request(str(n), tokens(n), params) for n in LENGTHS])
        longer = run(Engine(str(folder)), [Request(str(n), tokens(n), greedy(1, prompt_logprobs=k)) for n in LENGTHS])
        for n in LENGTHS:
            completion = done[str(n), 0]
            assert (completion.token_ids, completion.finish_reason, completion.error) == ((), "length", None)
            assert completion.prompt_logprobs == longer[str(n), 0].prompt_logprobs
        assert engine.metrics.generated_tokens == 0


def test_a_prompt_as_long_as_the_context_and_the_cache_can_be_run(checkpoints: dict[str, Path]) -> None:
    config = EngineConfig(max_model_len=128, kv_cache_memory=8 * BLOCK_BYTES["mixtral"])
    engine = Engine(str(checkpoints["mixtral"]), config)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with pytest.raises(RequestError, match="needs 129 tokens"):
        engine.add(Request("r", tokens(129), params))
    assert run(engine, [Request("r", tokens(128), params)])["r", 0].finish_reason == "length"


def test_prompt_logprobs_that_are_no_numbers_are_an_error(checkpoints: dict[str, Path]) -> None:
    engine = Engine(str(checkpoints["mixtral"]))
    with torch.no_grad():
        engine.runner.model.embed_tokens.weight[7] = torch.nan
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    done = run(engine, [Request("bad", [5, 6, 7, 8], params), Request("good", [5, 6, 8], params)])
    assert (done["bad", 0].finish_reason, done["bad", 0].error[0]) == ("error", "nan_logits")
    assert (done["good", 0].finish_reason, done["good", 0].error) == ("length", None)


def test_busy_time_includes_the_step_that_runs(checkpoints: dict[str, Path]) -> None:
    engine, may_end, began = Engine(str(checkpoints["phimoe"])), threading.Event(), threading.Event()
    run_model = engine.runner.run

    def held(*arguments: Any) -> Any:
        began.set()
        assert may_end.wait(PATIENCE_S)
        return run_model(*arguments)

    engine.runner.run = held  # type: ignore[method-assign]
    engine.add(Request("r", tokens(3), greedy(1)))
    thread = threading.Thread(target=engine.step)
    thread.start()
    assert began.wait(PATIENCE_S)
    first, second = engine.stats().totals, engine.stats().totals
    assert engine.metrics.busy_s == 0.0 < first.busy_s < second.busy_s and second.steps == 0
    may_end.set()
    thread.join()
    assert second.busy_s < engine.stats().totals.busy_s == engine.metrics.busy_s
