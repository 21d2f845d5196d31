"""Measure our engine on models of full size with random weights: tokens a second, and percent of the bound."""

import gc
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from gpu.ideal import load_seconds
from gpu.loads import Answer, Load, requests
from gpu.measure import ceilings
from gpu.models import NAMES
from gpu.ours import Ours
from gpu.ours import run as ours_run
from gpu.roofline import Ceilings, Step, seconds, step
from gpu.setup import Row, Setup
from moray.engine.config import ModelConfig

PROMPT, OUTPUT, STEPS = 512, 256, 32
DECODE = (1, 8, 32, 128, 256, 512)
EAGER = (1, 32)  # also without CUDA graphs, for comparison
MIXED = (128, 512)
MIN_S = 20  # seconds that must be left to begin a load


def run(setup: Setup) -> Iterator[Row]:
    found, record = ceilings(setup.device)
    free(setup.device)
    yield {"engine": "ceilings", **record}
    for name in NAMES:
        ours = Ours(name, is_dry=setup.is_dry)
        for label, settings, loads in plan(name, is_dry=setup.is_dry):
            if setup.seconds_left < MIN_S and not setup.is_dry:
                yield {"engine": label, "model": name, "error": "no time was left"}
                continue
            # one engine for all loads: it captures and reserves for the largest
            most = {"max_num_seqs": max(n.num_sequences for n in loads), "max_model_len": max(n.longest for n in loads)}
            engine = ours.engine(**most, **settings)
            for load in loads:
                about = {"engine": label, "model": name, **asdict(load)}
                if setup.seconds_left < MIN_S and not setup.is_dry:
                    yield {**about, "error": "no time was left"}
                    continue
                try:
                    answer, facts = ours_run(engine, load)
                except Exception as error:
                    yield {**about, "error": f"{type(error).__name__}: {str(error)[:500]}"}
                    break  # the state of the engine is not known
                yield as_row(label, name, load, answer, ours.model_config, found, facts["experts_hit"]) | facts
            del engine
        del ours
        free(setup.device)


def plan(name: str, *, is_dry: bool = False) -> list[tuple[str, dict[str, Any], list[Load]]]:
    """Return a model's engines, with their settings and loads, the most important first."""
    graphs = "moray", dict[str, Any]()
    if is_dry:
        return [(*graphs, [Load("decode", 3, 20, 3, 150), Load("mixed", 2, 20, 4, 150)])]
    if name != NAMES[0]:
        return [(*graphs, [Load("decode", 32, PROMPT, STEPS)])]
    decode = [Load("decode", count, PROMPT, STEPS) for count in DECODE]
    mixed = [Load("mixed", count, PROMPT, OUTPUT) for count in MIXED]
    eager = [Load("decode", count, PROMPT, STEPS) for count in EAGER]
    return [(*graphs, decode + mixed), ("moray without CUDA graphs", {"cuda_graphs": False}, eager)]


def as_row(
    engine: str, model: str, load: Load, answer: Answer, config: ModelConfig, found: Ceilings, hit: float | None = None
) -> Row:
    """Return the row of a load, with its bound.

    hit: experts that a layer used in a step; None = the expected number if all are equally likely
    """
    row: Row = {"engine": engine, "model": model, **asdict(load), "tokens_per_s": answer.tokens_per_s}
    row |= {"ms_per_step": answer.ms, "seconds": answer.seconds}
    if answer.error:
        return row | {"error": answer.error}
    if load.kind == "mixed":
        bound = answer.output_tokens / load_seconds(found, config, requests(load), load.num_sequences, hit)
    else:
        bound = load.num_sequences / seconds(found, step(config, Step(load.num_sequences, answer.context, hit=hit)))
    return row | {"bound_tokens_per_s": bound, "percent_of_bound": 100 * answer.tokens_per_s / bound}


def free(device: torch.device) -> None:
    """Free the memory of engines, which are in reference cycles, before the next one measures what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
