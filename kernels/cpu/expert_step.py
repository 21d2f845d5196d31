"""Run all experts of a layer in one compiled call, on packed weights that compiled code can multiply.

The work is a list of pieces, which the cores take in order: the panels of all experts' gate and up projections, then
those of all down projections. A down piece waits until the up pieces of its expert are done; they come before it in the
list, so others have taken them. Nobody waits for all experts, and no core is woken twice. Bits are those of one
`linear` after the other: a product's kernel is the same, and which core computes which panels changes no sum.

Where the weights hold a part of the outputs alone, the work is two calls: the hidden rows are gathered between them.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor

from moray.kernels.activation import Activation
from moray.kernels.cpu import product
from moray.kernels.cpu.atomics import add, call_with_4, nap, pause, read, write
from moray.kernels.cpu.epilogue import encode_products
from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, keep, narrow, widen
from moray.kernels.cpu.product import OWN
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

READ_COST_ROWS = 10  # cost of reading an expert's weights, in rows that one core computes in the same time
PIECES_PER_CORE = 8  # pieces of work per core, so that cores that other processes use too can do less
PIECE_BYTES = 2**18  # bytes of weights in a piece, at least
MIN_SHARED_BYTES = 2**19  # rows of fewer bytes are copied or added up by one core
PAUSES_BEFORE_NAP = 1000  # of a piece that waits for others: a thread that computes one may have been stopped

GATE, UP, DOWN = 0, 1, 2  # columns of an expert's row in the table of weights
IS_DOWN, EXPERT, START, STOP = 0, 1, 2, 3  # columns of a piece
PIECE_WORDS = 4
UP_AND_DOWN, UP_ALONE, DOWN_ALONE = range(3)  # phases of a call
MINUS_ONE = 2**64 - 1
LINE_WORDS = 8  # a line of the cache: counters that different cores change are that far apart


def run_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    table: Any,
    activation: Activation,
    tokens_per_expert: Tensor | None,
) -> Tensor:
    """Compute `experts` of experts.py on whole weights.

    table: [num_experts, 3] uint64, the addresses of the descriptions (product.py) of each expert's gate, up and down;
           0 for no gate
    """
    x, weights, ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    out = torch.empty_like(x)
    _call(UP_AND_DOWN, x, ids, weights, table, activation, tokens_per_expert, x.new_empty(0), out)
    return out


def run_split_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    table: Any,
    activation: Activation,
    tokens_per_expert: Tensor | None,
    gather: Callable[[Tensor], Tensor],
    widths: tuple[int, int],
) -> Tensor:
    """Compute `experts` of experts.py on a part of the outputs.

    gather: see `experts`
    widths: the outputs of up and of down that are in this part
    The rest is as for run_experts.
    """
    x, weights, ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    hidden, out = x.new_empty(ids.numel(), widths[0]), x.new_empty(len(x), widths[1])
    _call(UP_ALONE, x, ids, weights, table, activation, tokens_per_expert, hidden, out)
    _call(DOWN_ALONE, x, ids, weights, table, activation, None, gather(hidden), out)
    return gather(out)


def _call(
    phases: int,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Any,
    activation: Activation,
    tokens_per_expert: Tensor | None,
    hidden: Tensor,
    out: Tensor,
) -> None:
    cores = num_cores()
    arguments = (
        pool_of(cores),
        cores,
        table.ctypes.data,
        len(table),
        *encode_products(activation),
        x.data_ptr(),
        x.shape[0],
        ids.shape[1],
        ids.data_ptr(),
        weights.data_ptr(),
        0 if tokens_per_expert is None else tokens_per_expert.data_ptr(),
        phases,
        hidden.data_ptr(),
        out.data_ptr(),
        PIECE_BYTES,
        MIN_SHARED_BYTES,
        _EXPERTS_PIECE.address,
        _GATHER_PIECE.address,
        _PREPARE_PIECE.address,
        _ADD_UP[x.dtype].address,
    )
    launch(_RUN_EXPERTS, arguments, reports=True)


# The arguments of _run_experts: addresses, sizes, and two activations, see epilogue.encode_products; then its report.
POOL, CORES, EXPERTS, NUM_EXPERTS, GATE_ACTIVATION, UP_ACTIVATION, ROWS, NUM_TOKENS, TOP_K, IDS, WEIGHTS = range(11)
COUNTS, PHASES, HIDDEN_ROWS, OUT, PIECE_SIZE, MIN_SHARED = range(11, 17)
EXPERTS_PIECE, GATHER_PIECE, PREPARE_PIECE, ADD_UP_PIECE, REPORT = range(17, 22)
WORDS = 22


def _run_experts(arguments: Any, piece: Any) -> None:
    """Run the experts.

    Of the arguments, PHASES is UP_AND_DOWN; UP_ALONE, which ends with the hidden rows; or DOWN_ALONE, which begins with
    them. HIDDEN_ROWS is the address of the hidden rows, grouped by expert, unless both phases are run.
    """
    words = array_at(arguments, (WORDS,), np.int64)
    pool, cores, phases = uint64(words[POOL]), words[CORES], words[PHASES]
    num_experts, num_tokens, top_k = words[NUM_EXPERTS], words[NUM_TOKENS], words[TOP_K]
    table = array_at(uint64(words[EXPERTS]), (num_experts, 3), np.uint64)
    piece_bytes, min_shared_bytes = words[PIECE_SIZE], words[MIN_SHARED]
    num_rows = num_tokens * top_k
    starts, tokens, places = _group(array_at(uint64(words[IDS]), (num_rows,), np.int64), num_experts, top_k)
    if words[COUNTS] != 0:
        counted = array_at(uint64(words[COUNTS]), (num_experts,), np.int64)
        for e in range(num_experts):
            counted[e] += starts[e + 1] - starts[e]

    up, down = array_at(table[0, UP], (OWN,), np.uint64), array_at(table[0, DOWN], (OWN,), np.uint64)
    row_bytes, item = np.int64(up[product.ROW_BYTES]), np.int64(up[product.ITEM_BYTES])
    inner, outer = np.int64(up[product.OUT_FEATURES]), np.int64(down[product.OUT_FEATURES])
    up_rows = 0 if phases == DOWN_ALONE else num_rows
    down_rows = 0 if phases == UP_ALONE else num_rows

    prepares, converts = up[product.PREPARE] != uint64(0), down[product.PREPARE] != uint64(0)
    grouped = np.empty(up_rows * np.int64(up[product.IN_FEATURES]) * item, np.uint8)
    prepared = np.empty(up_rows * row_bytes if prepares else 0, np.uint8)
    gathered = np.empty(GATHER_WORDS, np.uint64)
    gathered[0], gathered[1], gathered[2] = words[ROWS], address_of(grouped), address_of(prepared)
    gathered[3], gathered[4], gathered[5] = address_of(tokens), address_of(starts), address_of(table)
    gathered[6], gathered[7] = num_experts, _parts(cores, num_experts, num_rows * row_bytes, min_shared_bytes)
    if phases != DOWN_ALONE:
        run_job(pool, uint64(words[GATHER_PIECE]), address_of(gathered), gathered[7])

    gates = np.empty(up_rows * inner * item if table[0, GATE] != uint64(0) else 0, np.uint8)
    hidden = np.empty(num_rows * inner * item if phases == UP_AND_DOWN else 0, np.uint8)
    converted = np.empty(down_rows * np.int64(down[product.ROW_BYTES]) if converts else 0, np.uint8)
    results = np.empty(down_rows * outer * item, np.uint8)
    hidden_at = address_of(hidden) if phases == UP_AND_DOWN else uint64(words[HIDDEN_ROWS])
    if phases == DOWN_ALONE and converts:
        gathered[1], gathered[2] = hidden_at, address_of(converted)
        run_job(pool, uint64(words[PREPARE_PIECE]), address_of(gathered), gathered[7])
    pieces, left = _split_work(cores, table, starts, piece_bytes, phases)
    step = np.empty(STEP_WORDS, np.uint64)
    step[TABLE], step[PIECES], step[STARTS] = address_of(table), address_of(pieces), address_of(starts)
    step[GROUPED] = address_of(prepared) if prepares else address_of(grouped)
    step[GATES], step[HIDDEN] = address_of(gates), hidden_at
    step[CONVERTED] = address_of(converted) if converts else hidden_at
    step[RESULTS], step[LEFT] = address_of(results), address_of(left)
    step[OF_GATE], step[OF_UP] = words[GATE_ACTIVATION], words[UP_ACTIVATION]
    run_job(pool, uint64(words[EXPERTS_PIECE]), address_of(step), uint64(len(pieces)))

    added = np.empty(ADD_WORDS, np.uint64)
    added[0], added[1], added[2], added[3] = address_of(results), address_of(places), words[WEIGHTS], words[OUT]
    added[4], added[5], added[6] = num_tokens, top_k, outer
    added[7] = _parts(cores, num_tokens, num_rows * outer * item, min_shared_bytes)
    if phases != UP_ALONE:
        run_job(pool, uint64(words[ADD_UP_PIECE]), address_of(added), added[7])
    words[REPORT] = 1
    keep(tokens)
    keep(places)
    keep(starts)
    keep(prepared)
    keep(grouped)
    keep(gathered)
    keep(gates)
    keep(hidden)
    keep(converted)
    keep(results)
    keep(pieces)
    keep(left)
    keep(step)
    keep(added)


_RUN_EXPERTS = CFunction(_run_experts)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _group(ids: Any, num_experts: int, top_k: int) -> Any:
    """Group rows by expert, in order of their tokens within an expert.

    ids: [num_tokens * top_k]

    Returns the first row of each expert and the end, [num_experts + 1]; the token of each row; and the row of each
    (token, slot).
    """
    starts = np.zeros(num_experts + 1, np.int64)
    for e in ids:
        starts[e + 1] += 1
    for e in range(num_experts):
        starts[e + 1] += starts[e]
    following = starts[:-1].copy()
    tokens, places = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    for i, e in enumerate(ids):
        row = following[e]
        following[e] += 1
        tokens[row], places[i] = i // top_k, row
    return starts, tokens, places


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _parts(cores: int, most: int, num_bytes: int, min_shared_bytes: int) -> int:
    """Return into how many pieces a pass over rows of num_bytes is split, `most` or fewer."""
    return min(cores, most) if num_bytes >= min_shared_bytes else 1


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _split_work(cores: int, table: Any, starts: Any, piece_bytes: int, phases: int) -> Any:
    """Split the products of the phases into pieces of about equal cost.

    Returns the pieces, [num_pieces, PIECE_WORDS]; and counters of what is left of each expert's up pieces, LINE_WORDS
    apart.
    """
    num_experts = len(table)
    up, down = array_at(table[0, UP], (OWN,), np.uint64), array_at(table[0, DOWN], (OWN,), np.uint64)
    products = 1 + np.int64(table[0, GATE] != uint64(0))
    panels = np.int64(up[product.NUM_PANELS]), np.int64(down[product.NUM_PANELS])
    sizes = (
        np.int64(products * np.int64(up[product.PANEL_BYTES])),
        np.int64(down[product.PANEL_BYTES]),
    )  # bytes of weights of a panel
    total: Any = 0
    for e in range(num_experts):
        if starts[e + 1] > starts[e]:
            total += starts[e + 1] - starts[e] + READ_COST_ROWS
    total *= panels[0] * sizes[0] + panels[1] * sizes[1]
    # The cost of a piece is its bytes times the rows they are multiplied with, reading included.
    cost = max(piece_bytes * READ_COST_ROWS, total // (cores * PIECES_PER_CORE))
    pieces = np.empty((num_experts * (panels[0] + panels[1]), PIECE_WORDS), np.uint64)
    left = np.zeros(num_experts * LINE_WORDS, np.uint64)
    n = 0
    for is_down in range(1 if phases == DOWN_ALONE else 0, 1 if phases == UP_ALONE else 2):
        for e in range(num_experts):
            num_rows = starts[e + 1] - starts[e]
            if num_rows == 0:
                continue
            of_expert = panels[is_down] * sizes[is_down] * (num_rows + READ_COST_ROWS)
            parts = 1 if cores == 1 else min(panels[is_down], max(1, (of_expert + cost // 2) // cost))
            for part in range(parts):
                pieces[n, IS_DOWN], pieces[n, EXPERT] = is_down, e
                pieces[n, START] = panels[is_down] * part // parts
                pieces[n, STOP] = panels[is_down] * (part + 1) // parts
                n += 1
            if is_down == 0 and phases == UP_AND_DOWN:
                left[e * LINE_WORDS] = parts + 1  # 0 when the hidden rows are ready
    return pieces[:n], left


# The arguments of _experts_piece: addresses, and two activations.
TABLE, PIECES, STARTS, GROUPED, GATES, HIDDEN, CONVERTED, RESULTS, LEFT, OF_GATE, OF_UP = range(11)
STEP_WORDS = 11


def _experts_piece(arguments: Any, number: Any) -> None:
    step = array_at(arguments, (STEP_WORDS,), np.uint64)
    piece = array_at(step[PIECES] + number * uint64(8 * PIECE_WORDS), (PIECE_WORDS,), np.uint64)
    e = piece[EXPERT]
    weights = array_at(step[TABLE] + e * uint64(24), (3,), np.uint64)
    bounds = array_at(step[STARTS] + e * uint64(8), (2,), np.uint64)
    first, num_rows = bounds[0], bounds[1] - bounds[0]
    up, down = array_at(weights[UP], (OWN,), np.uint64), array_at(weights[DOWN], (OWN,), np.uint64)
    hidden_bytes = up[product.OUT_FEATURES] * up[product.ITEM_BYTES]
    left = step[LEFT] + e * uint64(8 * LINE_WORDS)
    call = np.empty(product.CALL_WORDS, np.uint64)
    call[product.NUM_ROWS] = num_rows
    if piece[IS_DOWN] == uint64(0):
        call[product.X] = step[GROUPED] + first * up[product.ROW_BYTES]
        call[product.TIMES] = 0
        if weights[GATE] != uint64(0):
            call[product.ACTIVATION] = step[OF_GATE]
            call[product.Y] = step[GATES] + first * hidden_bytes
            gate = array_at(weights[GATE], (OWN,), np.uint64)
            call_with_4(gate[product.RUN], weights[GATE], address_of(call), piece[START], piece[STOP])
            call[product.TIMES] = call[product.Y]
        call[product.ACTIVATION] = step[OF_UP]
        call[product.Y] = step[HIDDEN] + first * hidden_bytes
        call_with_4(up[product.RUN], weights[UP], address_of(call), piece[START], piece[STOP])
        # `left` is 0 where no down piece of this call waits for it.
        if add(left, uint64(MINUS_ONE)) == uint64(2):  # this was the expert's last up piece
            if down[product.PREPARE] != uint64(0):
                call[product.X] = call[product.Y]
                call[product.Y] = step[CONVERTED] + first * down[product.ROW_BYTES]
                call_with_4(down[product.PREPARE], weights[DOWN], address_of(call), uint64(0), num_rows)
            write(left, uint64(0))
    else:
        waited = 0
        while read(left) != uint64(0):
            pause()
            waited += 1
            if waited > PAUSES_BEFORE_NAP:
                nap()
        call[product.X] = step[CONVERTED] + first * down[product.ROW_BYTES]
        call[product.TIMES], call[product.ACTIVATION] = 0, 0
        call[product.Y] = step[RESULTS] + first * down[product.OUT_FEATURES] * down[product.ITEM_BYTES]
        call_with_4(down[product.RUN], weights[DOWN], address_of(call), piece[START], piece[STOP])
    keep(call)


_EXPERTS_PIECE = CFunction(_experts_piece)

# The arguments of _gather_piece: addresses of the rows, of the grouped rows, of the prepared rows, of the token of each
# grouped row, of the experts' first rows and of the table; the number of experts, and the number of pieces.
GATHER_WORDS = 8


def _gather_piece(arguments: Any, piece: Any) -> None:
    """Copy the rows of some experts to where they lie together, and prepare them."""
    words = array_at(arguments, (GATHER_WORDS,), np.uint64)
    num_experts, parts = words[6], words[7]
    starts = array_at(words[4], (num_experts + uint64(1),), np.uint64)
    tokens = array_at(words[3], (starts[num_experts],), np.uint64)
    table = array_at(words[5], (num_experts, 3), np.uint64)
    for e in range(num_experts * piece // parts, num_experts * (piece + uint64(1)) // parts):
        first, stop = starts[e], starts[e + uint64(1)]
        if first == stop:
            continue
        up = array_at(table[e, UP], (OWN,), np.uint64)
        row_bytes = up[product.IN_FEATURES] * up[product.ITEM_BYTES]
        for row in range(first, stop):
            source = array_at(words[0] + tokens[row] * row_bytes, (row_bytes,), np.uint8)
            target = array_at(words[1] + row * row_bytes, (row_bytes,), np.uint8)
            for i in range(row_bytes):
                target[i] = source[i]
        if up[product.PREPARE] != uint64(0):
            call = np.empty(product.CALL_WORDS, np.uint64)
            call[product.X], call[product.NUM_ROWS] = words[1] + first * row_bytes, stop - first
            call[product.Y] = words[2] + first * up[product.ROW_BYTES]
            call_with_4(up[product.PREPARE], table[e, UP], address_of(call), uint64(0), stop - first)
            keep(call)


_GATHER_PIECE = CFunction(_gather_piece)


def _prepare_piece(arguments: Any, piece: Any) -> None:
    """Prepare the hidden rows of some experts. Arguments: those of _gather_piece, with hidden rows as grouped."""
    words = array_at(arguments, (GATHER_WORDS,), np.uint64)
    num_experts, parts = words[6], words[7]
    starts = array_at(words[4], (num_experts + uint64(1),), np.uint64)
    table = array_at(words[5], (num_experts, 3), np.uint64)
    for e in range(num_experts * piece // parts, num_experts * (piece + uint64(1)) // parts):
        first, num_rows = starts[e], starts[e + uint64(1)] - starts[e]
        if num_rows == uint64(0):
            continue
        down = array_at(table[e, DOWN], (OWN,), np.uint64)
        call = np.empty(product.CALL_WORDS, np.uint64)
        call[product.X] = words[1] + first * down[product.IN_FEATURES] * down[product.ITEM_BYTES]
        call[product.Y], call[product.NUM_ROWS] = words[2] + first * down[product.ROW_BYTES], num_rows
        call_with_4(down[product.PREPARE], table[e, DOWN], address_of(call), uint64(0), num_rows)
        keep(call)


_PREPARE_PIECE = CFunction(_prepare_piece)

# The arguments of the functions that add up: addresses of the experts' rows, of the row of each (token, slot), of the
# weights and of the result; the number of tokens, top_k, the width of a row, and the number of pieces.
ADD_WORDS = 8


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _add_up_piece(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (ADD_WORDS,), np.uint64)
    num_tokens, top_k, width, parts = np.int64(words[4]), np.int64(words[5]), np.int64(words[6]), np.int64(words[7])
    rows = array_at(words[0], (num_tokens * top_k, width), stored)
    places = array_at(words[1], (num_tokens, top_k), np.int64)
    weights = array_at(words[2], (num_tokens, top_k), np.float32)
    out = array_at(words[3], (num_tokens, width), stored)
    add_up(
        rows, places, weights, out, num_tokens * np.int64(piece) // parts, num_tokens * (np.int64(piece) + 1) // parts
    )


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def add_up(rows: Any, places: Any, weights: Any, out: Any, start: int, stop: int) -> None:
    """Add up the rows of the tokens start .. stop - 1 times their weights, in slot order.

    rows:    [num_rows, width]
    places:  [num_tokens, top_k], the row of each (token, slot)
    weights: [num_tokens, top_k] fp32
    out:     [num_tokens, width]
    """
    width = out.shape[1]
    total = np.empty(width, np.float32)
    for t in range(start, stop):
        for slot in range(places.shape[1]):
            row, weight = rows[places[t, slot]], weights[t, slot]
            if slot == 0:
                for d in range(width):
                    total[d] = widen(row[d]) * weight
            else:
                for d in range(width):
                    total[d] += widen(row[d]) * weight
        for d in range(width):
            out[t, d] = narrow(total[d], out[t, d])


def _add_up_bf16(arguments: Any, piece: Any) -> None:
    _add_up_piece(arguments, piece, np.uint16)


def _add_up_f16(arguments: Any, piece: Any) -> None:
    _add_up_piece(arguments, piece, np.int16)


def _add_up_fp32(arguments: Any, piece: Any) -> None:
    _add_up_piece(arguments, piece, np.float32)


_ADD_UP = {
    torch.bfloat16: CFunction(_add_up_bf16),
    torch.float16: CFunction(_add_up_f16),
    torch.float32: CFunction(_add_up_fp32),
}
