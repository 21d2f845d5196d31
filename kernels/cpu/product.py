"""Call matrix products on packed weights from compiled code: one interface for all kernels of our own.

A kernel is a C function of 64-bit numbers, run(weight, call, start, stop). It computes the columns of y that belong to
the panels start .. stop - 1. `weight` is the address of a description of the packed weight, which stays the same, and
`call` the address of a description of the rows. Both are arrays of 64-bit numbers, whose places have names here.

A kernel that does not read rows as they are has a second function, prepare(weight, call, start, stop). It converts the
rows start .. stop - 1 of X to what the kernel reads, and writes them to Y, where all rows of the call together have
NUM_ROWS * ROW_BYTES bytes, in any layout.
"""

from typing import Any

import numpy as np
from numba import uint64
from torch import Tensor

from moray.kernels.cpu.atomics import call_with_4
from moray.kernels.cpu.epilogue import encode
from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, keep
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

# Of a weight:
RUN = 0  # address of the kernel
PREPARE = 1  # address of the function that prepares rows, or 0
ROW_BYTES = 2  # bytes of a prepared row
NUM_PANELS = 3
PANEL_BYTES = 4
OUT_FEATURES = 5
IN_FEATURES = 6
ITEM_BYTES = 7  # bytes of a number of x and y
OWN = 8  # the kernel's own numbers begin here

# Of a call:
X = 0  # address of the rows, one after the other; for run(), prepared if the weight has a PREPARE
NUM_ROWS = 1
ACTIVATION = 2  # from epilogue.encode
TIMES = 3  # address of the factors, [rows, out_features], or 0
Y = 4  # address of the results, [rows, out_features]; for prepare(), of the prepared rows
CALL_WORDS = 5

MIN_SHARED_PRODUCTS = 2**22  # a product of fewer multiplications takes less time than sharing it among cores
MIN_SHARED_BYTES = 2**18  # rows of fewer bytes are converted or copied by one core
READ_COST_ROWS = 16  # cost of reading the weights of a product, in rows multiplied in the same time

# Cores that other processes use too finish at different times, so the work is split into more pieces than cores, but
# not into pieces below a useful size.
PIECES_PER_CORE = 4
PIECE_BYTES = 2**19  # bytes of weights in a piece


def describe(
    run: CFunction,
    prepare: CFunction | None,
    *,
    row_bytes: int,
    num_panels: int,
    panel_bytes: int,
    out_features: int,
    in_features: int,
    item_bytes: int,
    own: tuple[int, ...],
) -> Any:
    """Return the description of a packed weight. Keep what the addresses in `own` point to as long as it is used."""
    words = [0] * OWN
    words[RUN], words[PREPARE] = run.address, 0 if prepare is None else prepare.address
    words[ROW_BYTES], words[NUM_PANELS], words[PANEL_BYTES] = row_bytes, num_panels, panel_bytes
    words[OUT_FEATURES], words[IN_FEATURES], words[ITEM_BYTES] = out_features, in_features, item_bytes
    return np.array([*words, *own], np.uint64)


def multiply(
    x: Tensor,
    weight: int,
    out_features: int,
    activation: str = "none",
    times: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once.

    weight: the address of its description
    activation, times, limit: see linear.linear
    """
    num_rows = x.shape[0]
    x = x.contiguous()
    y = x.new_empty(num_rows, out_features)
    factors = None if times is None else times.contiguous()
    cores = num_cores()
    arguments = (
        x.data_ptr(),
        num_rows,
        encode(activation, limit),
        0 if factors is None else factors.data_ptr(),
        y.data_ptr(),
        weight,
        pool_of(cores),
        cores,
        MIN_SHARED_PRODUCTS,
        _MULTIPLY_PIECE.address,
        _PREPARE_PIECE.address,
    )
    launch(_MULTIPLY, arguments, reports=True)
    return y


# The arguments of a product: those of a call, the address of the weight, how the work is shared, and the functions that
# do a piece of it; then its report.
WEIGHT, POOL, CORES, MIN_SHARED, MULTIPLY_PIECE, PREPARE_PIECE, REPORT = range(CALL_WORDS, CALL_WORDS + 7)
WORDS = CALL_WORDS + 7
PIECES = WEIGHT + 1  # of the arguments of a piece, which are an array of their own and end with their number


def _multiply(arguments: Any, piece: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    of_weight = array_at(words[WEIGHT], (OWN,), np.uint64)
    cores, num_rows, num_panels = np.int64(words[CORES]), np.int64(words[NUM_ROWS]), np.int64(of_weight[NUM_PANELS])
    call = words[: PIECES + 1].copy()
    prepared = np.empty(0, np.uint8)
    if of_weight[PREPARE] != uint64(0):
        num_bytes = num_rows * np.int64(of_weight[ROW_BYTES])
        prepared = np.empty(num_bytes, np.uint8)
        call[Y] = address_of(prepared)
        call[PIECES] = min(cores, num_rows) if num_bytes >= MIN_SHARED_BYTES else 1
        run_job(words[POOL], words[PREPARE_PIECE], address_of(call), call[PIECES])
        call[X], call[Y] = call[Y], words[Y]
    pieces: Any = 1
    products = (num_rows + READ_COST_ROWS) * np.int64(of_weight[OUT_FEATURES]) * np.int64(of_weight[IN_FEATURES])
    if cores > 1 and products > np.int64(words[MIN_SHARED]):
        by_size = num_panels * np.int64(of_weight[PANEL_BYTES]) // PIECE_BYTES
        pieces = min(num_panels, max(cores, min(by_size, PIECES_PER_CORE * cores)))
    call[PIECES] = pieces
    run_job(words[POOL], words[MULTIPLY_PIECE], address_of(call), uint64(pieces))
    words[REPORT] = 1
    keep(call)
    keep(prepared)


_MULTIPLY = CFunction(_multiply)


def _multiply_piece(call: Any, piece: Any) -> None:
    words = array_at(call, (PIECES + 1,), np.uint64)
    weight, pieces = words[WEIGHT], words[PIECES]
    of_weight = array_at(weight, (OWN,), np.uint64)
    start = of_weight[NUM_PANELS] * piece // pieces
    stop = of_weight[NUM_PANELS] * (piece + uint64(1)) // pieces
    call_with_4(of_weight[RUN], weight, call, start, stop)


_MULTIPLY_PIECE = CFunction(_multiply_piece)


def _prepare_piece(call: Any, piece: Any) -> None:
    words = array_at(call, (PIECES + 1,), np.uint64)
    weight, pieces, num_rows = words[WEIGHT], words[PIECES], words[NUM_ROWS]
    of_weight = array_at(weight, (OWN,), np.uint64)
    call_with_4(of_weight[PREPARE], weight, call, num_rows * piece // pieces, num_rows * (piece + uint64(1)) // pieces)


_PREPARE_PIECE = CFunction(_prepare_piece)
