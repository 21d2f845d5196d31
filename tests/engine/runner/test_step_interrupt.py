"""Tests of steps that are interrupted for an urgent request: nothing of them is recorded, and answers do not change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.engine.backends.cpu.backend import CPU
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.engine.runner.step_interrupt import LOST_SHARE, MAX_CREDIT_S, StepInterrupted, StepInterrupter

BULK = 1


def run(engine: Engine, priority: int) -> tuple[list[Completion], list[bool]]:
    """Return three requests' completions, and for each step whether it was interrupted."""
    for name, prompt in {"a": [5, 6, 7], "b": [5] * 20, "c": [9, 8]}.items():
        params = SamplingParams(max_tokens=7, ignore_eos=True, temperature=1.0)
        engine.add(Request(name, prompt, params, stream_key=3, priority=priority))
    done, given_up = {}, []
    while engine.has_work:
        steps = engine.metrics.steps
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id] = output.completion
        given_up.append(engine.metrics.steps == steps)
    assert engine.stats().free_blocks == engine.limits.num_blocks
    return [done[name] for name in "abc"], given_up


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
def test_a_step_given_up_changes_no_answer(is_async: bool, checkpoints: dict[str, Path]) -> None:
    config = EngineConfig(max_num_batched_tokens=16, async_scheduling=is_async)
    plain = Engine(str(checkpoints["phimoe"]), config)
    want, given_up = run(plain, BULK)
    assert not any(given_up)
    engine = Engine(str(checkpoints["phimoe"]), replace(config))
    calls = 0

    def somebody_comes(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3, 4):
            engine.interrupt_step(0)

    last = attention_layers(engine.runner.model)[-1]
    last.register_forward_pre_hook(somebody_comes, prepend=True)
    got, given_up = run(engine, BULK)
    assert got == want
    assert torch.equal(engine.expert_tokens(), plain.expert_tokens()), "an interrupted step does not count"
    assert given_up.count(True) == 3 and given_up[:4] == [True, False, True, True]
    calls = 0
    assert run(engine, 0)[1].count(True) == 0, "requests of equal priority interrupt nothing"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


def test_only_a_share_of_the_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("moray.engine.runner.step_interrupt.time", clock)
    layer = torch.nn.Identity()
    interrupt_step = StepInterrupter([layer], CPU.call_in_step)
    lost_s = 0.0
    for _ in range(1000):
        try:
            with interrupt_step.step(BULK):
                clock.now_s += 0.1
                interrupt_step.request(0)
                layer(torch.ones(1))
                clock.now_s += 0.1
        except StepInterrupted:
            lost_s += 0.1
    share = (lost_s - MAX_CREDIT_S / (1 - LOST_SHARE)) / clock.now_s
    assert share == pytest.approx(LOST_SHARE, abs=0.01)


def test_a_step_looks_only_at_those_who_come_while_it_runs() -> None:
    layer = torch.nn.Identity()
    interrupt_step = StepInterrupter([layer], CPU.call_in_step)
    interrupt_step.request(0)
    with interrupt_step.step(BULK):
        layer(torch.ones(1))
