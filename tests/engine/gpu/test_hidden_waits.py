"""Tests that a step of the GPU's engine waits for the GPU only when it reads the tokens of the previous step."""

from pathlib import Path

import pytest
import torch
from hidden_waits import HiddenWaits
from made_samples import AllowedTokens
from triton_backend import TRITON
from triton_device import DEVICE

import moray.engine.runner.open_model
from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.backends.inputs import PENDING_ROWS
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.inputs import one_prompt
from moray.engine.sampling.scoring import scoring_params
from moray.engine.structured.constraint import Structured

ALLOWED = {
    "sampler.py:read": "the tokens and logprobs of the step before, once their copies are complete",
    "step_buffer.py:pack": "memory of the host's, which is filled before it is copied",
    "routing.py:sparsemixer_threshold": "a number of the host's, rounded to the model's dtype once",
}
PARAMS = [
    SamplingParams(max_tokens=3, temperature=1.0, top_p=0.9, min_tokens=3, stop_token_ids=[7, 8], logprobs=2),
    SamplingParams(max_tokens=3, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5),
    SamplingParams(max_tokens=2, logit_bias={5: 3.0, 9: -100.0}, logprobs=0),
    SamplingParams(max_tokens=2, temperature=0.7, top_k=5, min_p=0.05, ignore_eos=True),
]


@pytest.fixture
def engine(one_layer: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    config = EngineConfig(
        dtype="float32", max_num_seqs=3, max_num_batched_tokens=16, kv_cache_memory=200_000, async_scheduling=True
    )
    return Engine(str(one_layer["phimoe"]), config)


def test_steps_wait_for_nothing(engine: Engine) -> None:
    """The steps have chunks, prompts next to decodes, waiting requests, and every option of the sampler."""
    for i, params in enumerate(PARAMS):
        engine.add(Request(str(i), [5 + i, 6, 7, *range(10, 10 + 4 * i)], params, stream_key=i))
    with HiddenWaits(ALLOWED) as waits:
        while engine.has_work:
            engine.step()
    assert not waits.found, sorted(set(waits.found))


def test_masks_of_grammars_wait_for_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks need the tokens of the step before, which are read after the model was launched."""
    monkeypatch.setattr(engine._grammars, "matcher", lambda structured: AllowedTokens(range(20, 30)))
    obeys = SamplingParams(max_tokens=2, temperature=1.0, structured=Structured("choice", '["a"]'))
    for i, params in enumerate((obeys, PARAMS[2], obeys)):
        engine.add(Request(str(i), [5 + i, 6, 7], params, stream_key=i))
    completions = {}
    with HiddenWaits(ALLOWED) as waits:
        while engine.has_work:
            completions |= {output.request_id: output.completion for output in engine.step()}
    assert not waits.found, sorted(set(waits.found))
    for request_id in ("0", "2"):
        assert len(completions[request_id].token_ids) == 2
        assert set(completions[request_id].token_ids) <= set(range(20, 30))


def test_prompts_that_are_scored_wait_for_nothing(engine: Engine) -> None:
    """Their logprobs are read with the tokens of the step before."""
    engine.add(Request("r", [5, 6, 7, 8], scoring_params(2), continuations=[[7], [8, 9]]))
    engine.add(Request("busy", [5, 6, 7, 9], SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=1)))
    with HiddenWaits(ALLOWED) as waits:
        while engine.has_work:
            engine.step()
    assert not waits.found, sorted(set(waits.found))


def test_filling_the_inputs_of_a_graph_waits_for_nothing() -> None:
    shape = StepShape(8, 4, 4)
    buffer = StepBuffer(shape, torch.empty(shape.num_bytes, dtype=torch.uint8, device=DEVICE))
    plan = one_prompt(3, 16)
    plan.seqs[0, PENDING_ROWS] = 1
    last_token_ids = torch.tensor([5, 6], device=DEVICE)
    with HiddenWaits(ALLOWED) as waits:
        buffer.load(plan, 16, last_token_ids)
    assert waits.found == [] and buffer.inputs.input_ids.tolist() == [0, 0, 6, *[0] * 5]


def test_what_waits_is_found() -> None:
    """Each case is a line of code that could be written in engine/."""
    lines = {
        "x[i] = -1.0": "a number is assigned by index",
        "x[[0, 1]]": "a list is an index",
        "x.tolist()": "the host reads a tensor (tolist)",
        "x[0].item()": "the host reads a tensor (item)",
        "int(x[0])": "the host reads a tensor (__int__)",
        "bool((x > 0).any())": "the host reads a tensor (__bool__)",
        "x[x > 0]": "a mask is an index",
        "torch.where(x > 0)": "aten.nonzero",
        "x.repeat_interleave(i)": "aten.repeat_interleave",
        "torch.tensor([1], device=x.device)": "a tensor is made on the device of what is in memory that is not pinned",
        "x.to(x.device)": "a tensor is copied between host and device, and waited for",
        "x.cpu()": "the host reads a tensor (cpu)",
    }
    names = {"torch": torch, "x": torch.ones(2), "i": torch.tensor([0, 1])}
    for line, what in lines.items():
        with HiddenWaits(()) as waits:
            exec(compile(line, "/somewhere/engine/step.py", "exec"), names)
        assert any(found.endswith(what) for found in waits.found), (line, waits.found)
    with HiddenWaits(()) as waits:
        exec(
            compile("x[1:] = 0; x[0] = 1; x[i] = x + 1; x.to(torch.float64)", "/somewhere/engine/step.py", "exec"),
            names,
        )
    assert waits.found == []
