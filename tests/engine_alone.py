"""An engine that a test steps itself: its completions and its logits."""

from typing import Any

import pytest
from torch import Tensor

from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
    """Return the completion of each prompt; no prompt shares a batch with another."""
    found = []
    for prompt in prompts:
        engine.add(Request("0", prompt, params))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        completion = outputs[-1].completion
        assert completion is not None
        found.append(completion)
    return found


def run(engine: Engine, requests: list[Request], aborted: str | None = None) -> dict[tuple[str, int], Completion]:
    """Return the completion of each sample of the requests, by request and sample.

    aborted: a request that is aborted after the first step
    """
    done: dict[tuple[str, int], Completion] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id, output.sample] = output.completion
        if aborted is not None:
            engine.abort(aborted)
    return done


def keep_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list in which the logits of all coming steps are kept."""
    kept: list[Tensor] = []
    launch = engine.sampler.launch

    def keep(logits: Tensor, samples: Any) -> Any:
        kept.append(logits.clone())
        return launch(logits, samples)

    monkeypatch.setattr(engine.sampler, "launch", keep)
    return kept
