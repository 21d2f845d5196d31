"""Call matrix products on packed weights from compiled code: one interface for all kernels of our own.

A kernel is a C function of 64-bit numbers, run(weight, call, start, stop). It computes the columns of y that belong to
the panels start .. stop - 1. `weight` is the address of a description of the packed weight, which stays the same, and
`call` the address of a description of the rows. Both are arrays of 64-bit numbers, whose places have names here.
"""

from typing import Any

import numba
import numpy as np
from numba import uint64
from torch import Tensor

from moray.kernels.cpu.atomics import call_with_4
from moray.kernels.cpu.epilogue import ACTIVATIONS
from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, compiled, keep
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

# Of a weight:
RUN = 0  # address of the kernel
PREPARE = 1  # address of prepare(weight, source, rows, target), which converts rows to what the kernel reads; or 0
ROW_BYTES = 2  # bytes of a row as the kernel reads it
NUM_PANELS = 3
PANEL_BYTES = 4
OUT_FEATURES = 5
IN_FEATURES = 6
ITEM_BYTES = 7  # bytes of a number of x and y
OWN = 8  # the kernel's own numbers begin here

# Of a call:
X = 0  # address of the rows, as the kernel reads them, one after the other
NUM_ROWS = 1
ACTIVATION = 2  # a value of epilogue.ACTIVATIONS
TIMES = 3  # address of the factors, [rows, out_features], or 0
Y = 4  # address of the results, [rows, out_features]
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
    x: Tensor, weight: int, out_features: int, activation: str = "none", times: Tensor | None = None
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once.

    weight: the address of its description
    """
    num_rows = x.shape[0]
    x = x.contiguous()
    y = x.new_empty(num_rows, out_features)
    factors = None if times is None else times.contiguous()
    cores = num_cores()
    _multiply(
        pool_of(cores),
        cores,
        weight,
        x.data_ptr(),
        num_rows,
        ACTIVATIONS[activation],
        0 if factors is None else factors.data_ptr(),
        y.data_ptr(),
        MIN_SHARED_PRODUCTS,
        _MULTIPLY_PIECE.address,
        _PREPARE_PIECE.address,
    )
    return y


@compiled
def _multiply(
    pool: int,
    cores: int,
    weight: int,
    x: int,
    num_rows: int,
    activation: int,
    times: int,
    y: int,
    min_shared_products: int,
    multiply_piece: int,
    prepare_piece: int,
) -> None:
    of_weight = array_at(uint64(weight), (OWN,), np.uint64)
    num_panels = np.int64(of_weight[NUM_PANELS])
    source = uint64(x)
    prepared = np.empty(0, np.uint8)
    if of_weight[PREPARE] != uint64(0):
        prepared = np.empty(num_rows * np.int64(of_weight[ROW_BYTES]), np.uint8)
        prepare_rows(uint64(pool), cores, uint64(weight), source, num_rows, address_of(prepared), uint64(prepare_piece))
        source = address_of(prepared)
    pieces = 1
    products = (num_rows + READ_COST_ROWS) * np.int64(of_weight[OUT_FEATURES]) * np.int64(of_weight[IN_FEATURES])
    if cores > 1 and products > min_shared_products:
        by_size = num_panels * np.int64(of_weight[PANEL_BYTES]) // PIECE_BYTES
        pieces = min(num_panels, max(cores, min(by_size, PIECES_PER_CORE * cores)))
    call = np.empty(CALL_WORDS + 2, np.uint64)
    call[X], call[NUM_ROWS], call[ACTIVATION], call[TIMES], call[Y] = source, num_rows, activation, times, y
    call[CALL_WORDS], call[CALL_WORDS + 1] = weight, pieces
    run_job(uint64(pool), uint64(multiply_piece), address_of(call), uint64(pieces))
    keep(call)
    keep(prepared)


def _multiply_piece(call: Any, piece: Any) -> None:
    words = array_at(call, (CALL_WORDS + 2,), np.uint64)
    weight, pieces = words[CALL_WORDS], words[CALL_WORDS + 1]
    of_weight = array_at(weight, (OWN,), np.uint64)
    start = of_weight[NUM_PANELS] * piece // pieces
    stop = of_weight[NUM_PANELS] * (piece + uint64(1)) // pieces
    call_with_4(of_weight[RUN], weight, call, start, stop)


_MULTIPLY_PIECE = CFunction(_multiply_piece)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def prepare_rows(
    pool: Any, cores: int, weight: Any, source: Any, num_rows: int, target: Any, prepare_piece: Any
) -> None:
    """Convert rows of x to what the kernel of a weight reads, which has a PREPARE; call it from compiled code.

    prepare_piece: prepare_piece_address()
    """
    pieces = cores if num_rows * np.int64(array_at(weight, (OWN,), np.uint64)[ROW_BYTES]) >= MIN_SHARED_BYTES else 1
    arguments = np.empty(5, np.uint64)
    arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = weight, source, num_rows, target, pieces
    run_job(pool, prepare_piece, address_of(arguments), uint64(min(pieces, num_rows)))
    keep(arguments)


def _prepare_piece(arguments: Any, piece: Any) -> None:
    words = array_at(arguments, (5,), np.uint64)
    weight, source, num_rows, target = words[0], words[1], words[2], words[3]
    pieces = min(words[4], num_rows)
    of_weight = array_at(weight, (OWN,), np.uint64)
    start, stop = num_rows * piece // pieces, num_rows * (piece + uint64(1)) // pieces
    source += start * of_weight[IN_FEATURES] * of_weight[ITEM_BYTES]
    target += start * of_weight[ROW_BYTES]
    call_with_4(of_weight[PREPARE], weight, source, stop - start, target)


_PREPARE_PIECE = CFunction(_prepare_piece)


def prepare_piece_address() -> int:
    """Return what prepare_rows() needs."""
    return _PREPARE_PIECE.address
