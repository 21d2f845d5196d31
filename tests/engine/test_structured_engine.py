"""Tests of an engine whose samples obey a grammar: the same tokens in all kinds of batches, and how samples end."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from made_tokenizers import write_byte_level, write_sentencepiece
from tiny_checkpoints import MIXTRAL, PHIMOE, write

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, Request
from moray.engine.runner.step_interrupt import StepInterrupted
from moray.engine.structured.constraint import Structured

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad"]},
        "note": {"type": "string", "maxLength": 5},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["label", "note", "tags"],
}
LARK = 'start: "<<" WORD ">>"\nWORD: /[a-z]{1,12}/'
WHAT = {
    "schema": Structured.from_value("json_schema", SCHEMA),
    "free": None,
    "choice": Structured.from_value("choice", ["yes", "yesterday", "no"]),
    "regex": Structured.from_value("regex", r"\d{3}-\d{3}"),
    "one text": Structured.from_value("choice", ["nothing else"]),
    "grammar": Structured.from_value("grammar", LARK),
}
BLOCK_BYTES = 8192
CONFIGS = {
    "all at once": EngineConfig(),
    "few seats": EngineConfig(max_num_seqs=3, max_num_batched_tokens=9),
    "tiny cache": EngineConfig(max_num_seqs=6, max_num_batched_tokens=32, kv_cache_memory=10 * BLOCK_BYTES),
}


def params(what: str, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 70, "temperature": 0.9, "structured": WHAT[what]} | more)


def mixed(only: Callable[[str], bool] = lambda what: True) -> list[Request]:
    """Return requests of each kind, with prompts around a block and the LongRoPE boundary; some have three samples."""
    return [
        Request(
            f"{what} {i}",
            list(range(5, 5 + length)),
            params(what, n=3 if i == 1 else 1, max_tokens=70 if WHAT[what] else 25),
            stream_key=i * 100 + len(what),
        )
        for i, length in enumerate((1, 16, 29))
        for what in WHAT
        if only(what)
    ]


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
    for request in requests:
        engine.add(request)
    done: dict[tuple[str, int], Completion] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            key = output.request_id, output.sample
            assert key not in done
            tokens.setdefault(key, []).extend(output.new_token_ids)
            if output.completion is not None:
                done[key] = output.completion
    assert {key: tuple(tokens[key]) for key in done} == {key: one.token_ids for key, one in done.items()}
    assert engine.stats().free_blocks == engine.limits.num_blocks
    engine._scheduler.block_manager.check([])
    return done


def make(folder: Path, config: EngineConfig | None = None, *, jumps: bool = True, **changes: Any) -> Engine:
    engine = Engine(str(folder), replace(config or EngineConfig(), **changes))
    engine._jumps = jumps
    return engine


def text_of(engine: Engine, completion: Completion) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(completion.token_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_byte_level(tmp_path_factory.mktemp("structured"))
    return write(folder, MIXTRAL | {"vocab_size": 352, "eos_token_id": 0}, seed=3)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(write_sentencepiece(tmp_path_factory.mktemp("longrope")), PHIMOE | {"vocab_size": 410}, seed=3)


@pytest.fixture(scope="module")
def sampled_one_by_one(folder: Path, longrope: Path) -> dict[Path, dict[tuple[str, int], Completion]]:
    """Return the completions of engines that read each step's tokens at once and sample each token."""
    return {one: run(make(one, async_scheduling=False, jumps=False), mixed()) for one in (folder, longrope)}


def test_completions_obey(folder: Path, sampled_one_by_one: dict[Path, dict[tuple[str, int], Completion]]) -> None:
    engine = make(folder)
    patterns = {
        "choice": "yes|yesterday|no",
        "regex": r"\d{3}-\d{3}",
        "one text": "nothing else",
        "grammar": "<<[a-z]+>>",
    }
    samples: dict[str, set[str]] = {}
    for (request_id, _), completion in sampled_one_by_one[folder].items():
        what, text = request_id[:-2], text_of(engine, completion)
        if what == "free":
            continue
        assert completion.finish_reason == "stop", (what, text)
        samples.setdefault(what, set()).add(text)
        if what == "schema":
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(text))
            assert re.fullmatch(r'\{"label":"(good|bad)","note":".*","tags":\[[0-9,]*\]\}', text)
        else:
            assert re.fullmatch(patterns[what], text)
    assert len(samples["schema"]) == 5, "samples of a request differ"


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
@pytest.mark.parametrize("how", CONFIGS)
def test_the_same_tokens_in_every_batch(
    folder: Path, sampled_one_by_one: dict[Path, dict[tuple[str, int], Completion]], how: str, is_async: bool
) -> None:
    engine = make(folder, CONFIGS[how], async_scheduling=is_async)
    assert run(engine, mixed()) == sampled_one_by_one[folder]
    assert (engine.metrics.preemptions > 0) == (how == "tiny cache")
    if how == "all at once":
        before = engine.metrics.cached_tokens
        assert run(engine, mixed()) == sampled_one_by_one[folder], "with prompts from the prefix cache"
        assert engine.metrics.cached_tokens > before


@pytest.mark.parametrize("jumps", [False, True], ids=["token by token", "jumping"])
def test_the_same_tokens_where_steps_are_launched_ahead_and_long_factors_begin(
    longrope: Path, sampled_one_by_one: dict[Path, dict[tuple[str, int], Completion]], jumps: bool
) -> None:
    engine = make(longrope, CONFIGS["tiny cache"], async_scheduling=True, jumps=jumps)
    assert run(engine, mixed()) == sampled_one_by_one[longrope]


def test_free_samples_are_as_if_they_were_alone(
    folder: Path, sampled_one_by_one: dict[Path, dict[tuple[str, int], Completion]]
) -> None:
    alone = run(make(folder, async_scheduling=True), mixed(lambda what: what == "free"))
    assert alone == {key: one for key, one in sampled_one_by_one[folder].items() if key[0].startswith("free")}


def test_interrupted_steps_change_nothing(
    folder: Path,
    sampled_one_by_one: dict[Path, dict[tuple[str, int], Completion]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make(folder, CONFIGS["few seats"], async_scheduling=True)
    run_model, calls = engine.runner.run, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise StepInterrupted
        return run_model(*arguments)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    assert run(engine, mixed()) == sampled_one_by_one[folder]
    assert len(calls) > engine.metrics.steps


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
def test_forced_tokens_take_no_steps(folder: Path, is_async: bool) -> None:
    steps = {}
    for jumps in (False, True):
        engine = make(folder, async_scheduling=is_async, jumps=jumps)
        (done,) = run(engine, [Request("r", [5, 6], params("one text"))]).values()
        assert text_of(engine, done) == "nothing else"
        assert engine.metrics.generated_tokens == len(done.token_ids) > 5
        steps[jumps] = engine.metrics.steps
    assert steps[True] == 1 + is_async, "the prompt and all tokens but the last run together"
    assert steps[False] == len(done.token_ids) + is_async


@pytest.mark.parametrize(
    ("more", "finish_reason", "text"),
    [
        ({"max_tokens": 4}, "length", None),
        ({"max_tokens": 1}, "length", None),
        ({"stop": ("ing",)}, "stop", "noth"),
        ({"stop": ("ing",), "min_tokens": 7}, "stop", "nothing else"),
        ({"stop": ("else",)}, "stop", "nothing "),
        ({"min_tokens": 50}, "stop", "nothing else"),
        ({"logprobs": 1}, "stop", "nothing else"),
        ({"frequency_penalty": 2.0, "presence_penalty": 2.0}, "stop", "nothing else"),
        ({"logit_bias": {8: 100.0}, "temperature": 0.0}, "stop", "nothing else"),
    ],
)
def test_how_a_forced_text_ends(folder: Path, more: dict[str, Any], finish_reason: str, text: str | None) -> None:
    found = []
    for jumps in (True, False):
        engine = make(folder, jumps=jumps)
        (done,) = run(engine, [Request("r", [5, 6], params("one text", **more))]).values()
        assert (done.finish_reason, done.error) == (finish_reason, None)
        shown = text_of(engine, done)[: done.text_length]
        assert (
            shown == text
            if text is not None
            else "nothing else".startswith(shown) and len(done.token_ids) == more["max_tokens"]
        )
        found.append(done)
    assert found[0] == found[1]
    if "logprobs" in more:
        assert found[0].logprobs is not None
        assert len(found[0].logprobs) == len(found[0].token_ids)
        assert any(entry.token_id != entry.top[0][0] for entry in found[0].logprobs), "they are the model's"


def test_a_text_goes_on_until_min_tokens(folder: Path) -> None:
    engine = make(folder)
    done = run(engine, [Request("r", [5], params("choice", n=8, min_tokens=5), stream_key=1)])
    assert {text_of(engine, one) for one in done.values()} <= {"yesterday", "no"}
    assert "yesterday" in {text_of(engine, one) for one in done.values()}


def test_it_ends_with_an_error_where_nothing_is_left(folder: Path) -> None:
    engine = make(folder)
    assert engine.tokenizer is not None
    (e,) = engine.tokenizer.encode_texts(["e"], add_special_tokens=False)[0]
    stopped = params("one text", stop_token_ids=(e,))
    (done,) = run(engine, [Request("r", [5], stopped)]).values()
    assert (done.finish_reason, text_of(engine, done)) == ("stop", "nothing ")
    failing = [Request("r", [5], replace(stopped, min_tokens=30)), Request("other", [5], params("choice"))]
    done = run(engine, failing)
    assert done["r", 0].finish_reason == "error" and done["other", 0].error is None
    assert done["r", 0].error is not None and done["r", 0].error[0] == "grammar_failed"
    assert "nothing but stop tokens, which min_tokens (30) forbids" in done["r", 0].error[1]


def test_a_grammar_that_becomes_too_complex_is_an_error(folder: Path) -> None:
    names = range(2500)
    lark = (
        'start: /[xy]/ ("q" | tail)\n'
        + "tail: " + " | ".join(f"a{i}" for i in names) + "\n"
        + "\n".join(f'a{i}: "{i}x" B\n' for i in names) + "B: /b/"
    )  # fmt: skip
    engine = make(folder)
    structured = Structured.from_value("grammar", lark)
    engine.compile(structured)
    (done,) = run(engine, [Request("r", [5], params("free", structured=structured))]).values()
    assert done.finish_reason == "error" and done.error is not None
    assert done.error[0] == "grammar_failed" and "items" in done.error[1]


def test_what_cannot_be_followed_is_refused(folder: Path, checkpoints: dict[str, Path]) -> None:
    engine = make(folder)
    bad = Structured.from_value("json_schema", {"not": {}})
    for refuse in (lambda: engine.compile(bad), lambda: engine.add(Request("r", [5], params("free", structured=bad)))):
        with pytest.raises(RequestError, match="Unimplemented keys") as caught:
            refuse()
        assert caught.value.code == "bad_grammar"
    assert not engine.has_work
    with pytest.raises(RequestError, match="the model folder has none") as caught:
        make(checkpoints["mixtral"]).compile(WHAT["choice"])
    assert caught.value.code == "no_tokenizer"


def test_an_aborted_sample_leaves_nothing(folder: Path) -> None:
    engine = make(folder, async_scheduling=True)
    engine.add(Request("gone", [5], params("schema", n=2)))
    engine.add(Request("stays", [5], params("choice")))
    outputs: list[Output] = []
    for _ in range(2):
        outputs += engine.step()
    engine.abort("gone")
    while engine.has_work:
        outputs += engine.step()
    assert [o.request_id for o in outputs if o.completion is not None] == ["stays"]
    assert engine.stats().free_blocks == engine.limits.num_blocks
