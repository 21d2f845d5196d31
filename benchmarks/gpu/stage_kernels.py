"""Measure every kernel at every number of rows: microseconds, GB/s and TFLOP/s, percent of its bound, its peers."""

from collections.abc import Callable, Iterator

import torch

from gpu import cases_quantized
from gpu.cases import DRY_ROWS, ROWS, Case, Op
from gpu.cases_attention import Attention
from gpu.cases_dense import Dense
from gpu.cases_experts import Experts, shapes
from gpu.cases_sampling import Sampling
from gpu.measure import ceilings, measure
from gpu.roofline import Ceilings
from gpu.setup import NO_TIME, Row, Setup

MIN_S = 3  # seconds that must be left to begin a measurement


def run(setup: Setup) -> Iterator[Row]:
    found, record = ceilings(setup.device)
    if setup.find(op="ceilings") is None:
        yield {"op": "ceilings", **record}
    rows = DRY_ROWS if setup.is_dry else ROWS
    for i in range(len(groups(setup.device, setup.is_dry))):
        # each group is made again, so that only one group's tensors are on the device
        for op in groups(setup.device, setup.is_dry)[i]():
            for count in rows:
                if count > op.max_rows or setup.find(op=op.name, rows=count) is not None:
                    continue
                if setup.seconds_left > MIN_S:
                    yield measured(op, count, found, setup.device)
                else:
                    yield {"op": op.name, "rows": count, "error": NO_TIME}
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def groups(device: torch.device, is_dry: bool) -> list[Callable[[], list[Op]]]:
    """Return functions that make groups of operations, the most important group first, because time may run out."""

    def experts(index: int) -> Callable[[], list[Op]]:
        return lambda: Experts(shapes(is_dry)[index], device).ops()

    first, *others = (experts(index) for index in range(len(shapes(is_dry))))
    return [
        first,
        lambda: Attention(device, is_dry=is_dry).ops(),
        lambda: Dense(device, is_dry=is_dry).ops(),
        lambda: Sampling(device, is_dry=is_dry).ops(),
        *cases_quantized.of_cases(device, is_dry=is_dry),
        *others,
    ]


def measured(op: Op, rows: int, found: Ceilings, device: torch.device) -> Row:
    try:
        return as_row(op.build(rows), found, device)
    except Exception as error:
        return {"op": op.name, "rows": rows, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def as_row(case: Case, found: Ceilings, device: torch.device) -> Row:
    times = measure({"ours": case.ours, **case.peers}, device)
    ours = times.pop("ours")
    bound_us = found.seconds(case.work) * 1e6
    row: Row = {"op": case.op, "rows": case.rows, "us": ours.us, "spread": ours.spread, "bound_us": bound_us}
    row["percent_of_bound"] = 100 * bound_us / ours.us
    row["gb_per_s"] = case.work.num_bytes / ours.us / 1e3
    row["tflop_per_s"] = case.work.flops / ours.us / 1e6
    for name, theirs in times.items():
        row[f"{name}: us"] = theirs.us
        row[f"{name}: times ours"] = theirs.us / ours.us
        if theirs.error:
            row[f"{name}: error"] = theirs.error
    if ours.error:
        row["error"] = ours.error
    return row | case.facts
