"""Measure our engine on models of full size with random weights: tokens a second, percent of the bound, and for
quantized weights and other settings how many times as fast as the same load without."""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from gpu.engine_plan import FEWEST, MIN_S, OWN_LIMITS, PLAIN, Measured, loads_of, models, plan
from gpu.ideal import load_seconds
from gpu.loads import Answer, Load, requests
from gpu.measure import ceilings
from gpu.model_formats import BF16, weights_in
from gpu.ours import Ours
from gpu.ours import run as ours_run
from gpu.roofline import DENSE, ITEM, Ceilings, Step, Weights, seconds, step
from gpu.setup import NO_TIME, Row, Setup
from moray.engine.config import ModelConfig
from moray.engine.engine import Engine


def run(setup: Setup) -> Iterator[Row]:
    found, record = ceilings(setup.device)
    free(setup.device)
    if setup.find(engine="ceilings") is None:
        yield {"engine": "ceilings", **record}
    speeds = {_key(row): row["tokens_per_s"] for row in setup.done if row.get("tokens_per_s")}
    for name, weights in models(is_dry=setup.is_dry):
        left = [one for one in plan(name, weights, is_dry=setup.is_dry) if _is_left(setup, name, weights, one)]
        if not left:
            continue
        ours = Ours(name, is_dry=setup.is_dry, weights=weights)
        for measured in left:
            for row in _measure(setup, ours, name, weights, measured, found):
                if "tokens_per_s" in row:
                    speeds.setdefault(_key(row), row["tokens_per_s"])
                    row |= _ratios(row, speeds)
                yield row
        del ours
        free(setup.device)


def _is_left(setup: Setup, name: str, weights: str, measured: Measured) -> bool:
    """Return whether a load of an engine is left for this call, which measures all of them that are."""
    about = {"engine": measured.label, "model": name, "weights": weights}
    if not measured.loads:
        rows = [row for row in setup.done if about.items() <= row.items()]
        return not any(row.get("num_sequences") == min(FEWEST, row.get("max_num_seqs", 0)) for row in rows)
    return any(setup.find(**about, **asdict(load)) is None for load in measured.loads)


def _measure(setup: Setup, ours: Ours, name: str, weights: str, measured: Measured, found: Ceilings) -> Iterator[Row]:
    about: Row = {"engine": measured.label, "model": name, "weights": weights}
    if setup.seconds_left < MIN_S and not setup.is_dry:
        yield about | {"error": NO_TIME}
        return
    started = time.perf_counter()
    try:
        engine = ours.engine(**measured.settings)
    except Exception as error:  # it does not fit, or a kernel does not compile: the other models may
        yield about | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        return
    about |= {"start_s": time.perf_counter() - started, **_limits(engine)}
    for load in loads_of(measured, engine.limits.max_num_seqs, is_dry=setup.is_dry):
        if setup.find(**{k: about[k] for k in ("engine", "model", "weights")}, **asdict(load)) is not None:
            continue
        if setup.seconds_left < MIN_S and not setup.is_dry:
            yield about | asdict(load) | {"error": NO_TIME}
            continue
        try:
            answer, facts = ours_run(engine, load)
        except Exception as error:
            yield about | asdict(load) | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            return  # the state of the engine is not known
        row = as_row(
            measured.label,
            name,
            load,
            answer,
            ours.model_config,
            found,
            facts["experts_hit"],
            weights_in(weights),
            1 if measured.settings.get("kv_cache_dtype") == "fp8" else ITEM,
        )
        yield about | row | facts


def _limits(engine: Engine) -> Row:
    limits = engine.limits
    return {"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_batched_tokens}


def _key(row: Row) -> tuple[object, ...]:
    names = "engine", "model", "weights", "kind", "num_sequences", "prompt_tokens", "output_tokens"
    return tuple(row.get(name) for name in names)


def _ratios(row: Row, speeds: dict[tuple[object, ...], float]) -> Row:
    """Return how many times as fast a load is as without the quantized weights, and without the engine's settings."""
    found: Row = {}
    if row["weights"] != BF16 and (of := speeds.get(_key(row | {"weights": BF16}))):
        found["times bf16"] = row["tokens_per_s"] / of
    if row["engine"] not in (PLAIN, OWN_LIMITS) and (of := speeds.get(_key(row | {"engine": PLAIN}))):
        found["times plain"] = row["tokens_per_s"] / of
    return found


def as_row(
    engine: str,
    model: str,
    load: Load,
    answer: Answer,
    config: ModelConfig,
    found: Ceilings,
    hit: float | None = None,
    weights: Weights = DENSE,
    cache_item: float = ITEM,
) -> Row:
    """Return the row of a load, with its bound.

    hit:         experts that a layer used in a step; None = the expected number if all are equally likely
    cache_item:  bytes of a number in the KV cache
    """
    row: Row = {"engine": engine, "model": model, **asdict(load)}
    if answer.error:
        return row | {"error": answer.error}
    row |= {"tokens_per_s": answer.tokens_per_s, "ms_per_step": answer.ms, "seconds": answer.seconds}
    if load.kind == "mixed":
        of_load = requests(load), load.num_sequences, hit, weights, cache_item
        bound = answer.output_tokens / load_seconds(found, config, *of_load)
    else:
        of = Step(load.num_sequences, answer.context, hit=hit)
        bound = load.num_sequences / seconds(found, step(config, of, weights, cache_item))
    return row | {"bound_tokens_per_s": bound, "percent_of_bound": 100 * answer.tokens_per_s / bound}


def free(device: torch.device) -> None:
    """Free the memory of engines, which are in reference cycles, before the next one measures what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
