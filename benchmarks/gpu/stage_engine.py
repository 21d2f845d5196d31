"""Measure our engine on models of full size with random weights: tokens a second, percent of the bound, and for
quantized weights how many times as fast as the same load in bf16."""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from gpu.ideal import load_seconds
from gpu.loads import Answer, Load, requests
from gpu.measure import ceilings
from gpu.model_formats import BF16, model_formats, weights_in
from gpu.models import NAMES
from gpu.ours import Ours
from gpu.ours import run as ours_run
from gpu.roofline import DENSE, Ceilings, Step, Weights, seconds, step
from gpu.setup import Row, Setup
from moray.engine.config import ModelConfig

PROMPT, OUTPUT, STEPS = 512, 256, 32
DECODE = (1, 8, 32, 128, 256, 512)
QUANTIZED_DECODE = (1, 32, 256)
EAGER = (1, 32)  # also without CUDA graphs, for comparison
MIXED = (128, 512)
MIN_S = 20  # seconds that must be left to begin a load


def run(setup: Setup) -> Iterator[Row]:
    found, record = ceilings(setup.device)
    free(setup.device)
    yield {"engine": "ceilings", **record}
    in_bf16: dict[tuple[str, Load], float] = {}  # tokens a second
    for name, weights in models(is_dry=setup.is_dry):
        ours = Ours(name, is_dry=setup.is_dry, weights=weights)
        for label, settings, loads in plan(name, weights, is_dry=setup.is_dry):
            about: Row = {"engine": label, "model": name, "weights": weights}
            if setup.seconds_left < MIN_S and not setup.is_dry:
                yield about | {"error": "no time was left"}
                continue
            # one engine for all loads: it captures and reserves for the largest
            most = {"max_num_seqs": max(n.num_sequences for n in loads), "max_model_len": max(n.longest for n in loads)}
            started = time.perf_counter()
            try:
                engine = ours.engine(**most, **settings)
            except Exception as error:  # it does not fit, or a kernel does not compile: the other models may
                yield about | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
                break
            start_s = time.perf_counter() - started
            for load in loads:
                if setup.seconds_left < MIN_S and not setup.is_dry:
                    yield about | asdict(load) | {"error": "no time was left"}
                    continue
                try:
                    answer, facts = ours_run(engine, load)
                except Exception as error:
                    yield about | asdict(load) | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
                    break  # the state of the engine is not known
                hit = facts["experts_hit"]
                row = as_row(label, name, load, answer, ours.model_config, found, hit, weights_in(weights))
                if weights == BF16:
                    in_bf16.setdefault((name, load), answer.tokens_per_s)
                elif (name, load) in in_bf16:
                    row["times bf16"] = answer.tokens_per_s / in_bf16[name, load]
                yield about | row | facts | {"start_s": start_s}
            del engine
        del ours
        free(setup.device)


def models(*, is_dry: bool = False) -> list[tuple[str, str]]:
    """Return models with the format of their weights, the most important first: time may run out."""
    phi, *others = NAMES
    formats = [name for name in model_formats(is_dry=is_dry) if not is_dry or name != "fp8_fp8"]  # not on the CPU
    return [(phi, BF16), *((phi, name) for name in formats), *((name, BF16) for name in others)]


def plan(name: str, weights: str, *, is_dry: bool = False) -> list[tuple[str, dict[str, Any], list[Load]]]:
    """Return a model's engines, with their settings and loads; the most important first."""
    graphs = "moray", dict[str, Any]()
    if is_dry:
        return [(*graphs, [Load("decode", 3, 20, 3, 150), Load("mixed", 2, 20, 4, 150)])]
    if weights != BF16:
        return [(*graphs, [Load("decode", count, PROMPT, STEPS) for count in QUANTIZED_DECODE])]
    if name != NAMES[0]:
        return [(*graphs, [Load("decode", 32, PROMPT, STEPS)])]
    decode = [Load("decode", count, PROMPT, STEPS) for count in DECODE]
    mixed = [Load("mixed", count, PROMPT, OUTPUT) for count in MIXED]
    eager = [Load("decode", count, PROMPT, STEPS) for count in EAGER]
    return [(*graphs, decode + mixed), ("moray without CUDA graphs", {"cuda_graphs": False}, eager)]


def as_row(
    engine: str,
    model: str,
    load: Load,
    answer: Answer,
    config: ModelConfig,
    found: Ceilings,
    hit: float | None = None,
    weights: Weights = DENSE,
) -> Row:
    """Return the row of a load, with its bound.

    hit: experts that a layer used in a step; None = the expected number if all are equally likely
    """
    row: Row = {"engine": engine, "model": model, **asdict(load), "tokens_per_s": answer.tokens_per_s}
    row |= {"ms_per_step": answer.ms, "seconds": answer.seconds}
    if answer.error:
        return row | {"error": answer.error}
    if load.kind == "mixed":
        bound = answer.output_tokens / load_seconds(found, config, requests(load), load.num_sequences, hit, weights)
    else:
        of = Step(load.num_sequences, answer.context, hit=hit)
        bound = load.num_sequences / seconds(found, step(config, of, weights))
    return row | {"bound_tokens_per_s": bound, "percent_of_bound": 100 * answer.tokens_per_s / bound}


def free(device: torch.device) -> None:
    """Free the memory of engines, which are in reference cycles, before the next one measures what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
