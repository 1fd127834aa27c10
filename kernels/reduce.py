"""Forward: the row reductions of a block of rows, from one pass over the pairs.

Never stored: similarities, masks, exponentials. logsumexp keeps (peak, total): the z of its largest term, times the
sign of the scale, and the sum relative to that term. Its exponents are (z - peak) * scale, so that the largest term is
e^0 at any magnitude, whether or not a compiler multiplies and adds at once. min and max keep the best of +-z and, where
wanted, the lowest caller's index among equals. Each split of the columns leaves its own state, and `finish` merges them
in order: same inputs, same bits, no atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import (
    COUNT,
    INF,
    LN2,
    LOG2E,
    LOGSUMEXP,
    MAPPED,
    MAX,
    MIN,
    NOTHING,
    POSITIVES,
    SIZES,
    SUM,
    clean_tile,
    direction,
    inside_window,
    intervals,
    largest,
    load_rows,
    members,
    number,
    row_vector,
    share_of,
    similarities,
    span,
)
from .transforms import log1p_unit

UNRANKED: tl.constexpr = tl.constexpr(2147483647)
LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # of the normal float32 numbers


class Reduced(NamedTuple):
    """One reduction's tensors, None where it has none: what it reads, then what it leaves."""

    scale: Any = None  # (1,) if learned
    offset: Any = None  # (N,)
    ref_offset: Any = None  # (M,)
    lower: Any = None  # (N,)
    upper: Any = None  # (N,)
    peak: Any = None  # (splits, N); None for sum and count
    total: Any = None  # (splits, N); of min and max the int32 rank, None where no index is wanted
    live: Any = None  # (row blocks, column tiles) int8: 1 where the window lets a pair of the tile through


@triton.jit
def reach(own, ref, HAS_REF: tl.constexpr):
    """What is added to scale * z: the anchor's offset, or logaddexp(own, ref), -inf where both are."""
    if HAS_REF:
        high, low = tl.maximum(own, ref), tl.minimum(own, ref)
        some = high > -INF
        return tl.where(some, high + log1p_unit(tl.exp(tl.where(some, low - high, 0.0))), high)
    else:
        return own


@triton.jit
def start(slot, at, inside, OP: tl.constexpr, ROWS: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr):
    """The state (peak, total) of a row block: empty, or what an earlier launch left at `at`."""
    peak, total = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    if (OP == LOGSUMEXP) | (OP == MAPPED) | (OP == MIN) | (OP == MAX):
        peak = tl.full((ROWS,), -INF, ACC)
        if CARRY:
            peak = tl.load(slot.peak + at, mask=inside, other=-INF)
    if (OP == MIN) | (OP == MAX):
        if slot.total is not None:
            total = tl.full((ROWS,), UNRANKED, tl.int32)
            if CARRY:
                total = tl.load(slot.total + at, mask=inside, other=UNRANKED)
    elif CARRY and (slot.total is not None):
        total = tl.load(slot.total + at, mask=inside, other=0.0)
    return peak, total


@triton.jit
def leave(slot, at, inside, peak, total, OP: tl.constexpr):
    if (OP == LOGSUMEXP) | (OP == MAPPED) | (OP == MIN) | (OP == MAX):
        tl.store(slot.peak + at, peak, mask=inside)
    if slot.total is not None:
        tl.store(slot.total + at, total, mask=inside)


@triton.jit
def fold(
    z, keep, slot, scale, lower, upper, own, cols, valid, order, live_at, peak, total,
    OP: tl.constexpr, PHI: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One reduction's state with a tile's pairs added. A window that lets nothing through costs no exponential.

    cols, valid: (1, C), or (R, C) where each row has columns of its own.
    """
    windowed: tl.constexpr = (slot.lower is not None) | (slot.upper is not None)
    keep = inside_window(
        z, keep, lower[:, None], upper[:, None], slot.lower is not None, slot.upper is not None
    )  # fmt: skip
    if OP == LOGSUMEXP:
        signed = z * direction(scale)
        if windowed:
            # Pairs that are left out are -inf: a number a pair to keep, where a mask is a predicate of every one.
            signed = tl.where(keep, signed, -INF)
            top = tl.max(signed, 1)
            some = largest(top) > -INF
            if slot.live is not None:
                tl.store(slot.live + live_at, some.to(tl.int8))
            if some:
                peak, total = fold_exponentials(signed, None, steepness(scale), top, peak, total)
        else:
            top = tl.max(tl.where(keep, signed, -INF), 1)
            peak, total = fold_exponentials(signed, keep, steepness(scale), top, peak, total)
    elif OP == SUM:
        ref = row_vector(slot.ref_offset, cols, valid, 0.0, ACC)
        phi = PHI(z * scale, reach(own[:, None], ref, slot.ref_offset is not None))
        total += tl.sum(tl.where(keep, phi, 0.0), 1)
        if slot.live is not None:
            tl.store(slot.live + live_at, largest(tl.max(keep.to(tl.int32), 1)).to(tl.int8))
    elif OP == MAPPED:
        t = PHI(z * scale, own[:, None])
        top = tl.max(tl.where(keep, t, -INF), 1)
        peak, total = fold_exponentials(t, keep, LOG2E, top, peak, total)
    elif OP == COUNT:
        total += tl.sum(tl.where(keep, 1.0, 0.0).to(ACC), 1)
    else:
        signed = tl.where(keep, z if OP == MAX else -z, -INF)
        top = tl.max(signed, 1)
        if slot.total is not None:
            if largest(((top >= peak) & (top > -INF)).to(tl.int32)) > 0:
                rank = tl.load(order + cols, mask=valid, other=UNRANKED).to(tl.int32)
                hit = keep & (signed == top[:, None])
                first = tl.min(tl.where(hit, rank, UNRANKED), 1)
                best = tl.where(top > peak, first, tl.minimum(first, total))
                total = tl.where(top >= peak, best, total)
        peak = tl.maximum(peak, top)
    return peak, total


@triton.jit
def shrunk(total, peak, base, steep2):
    """A sum relative to `peak`, relative to `base` instead; 0 where there is none (0 * -inf is not 0)."""
    return tl.where(peak > -INF, total * tl.exp2((peak - base) * steep2), 0.0)


@triton.jit
def steepness(scale):
    """|scale| in base 2, but never 0, which -inf must not be multiplied by: of a scale of 0 it is next to nothing."""
    steep2 = tl.abs(scale) * LOG2E
    return tl.where(steep2 == 0.0, LEAST, steep2)


@triton.jit
def fold_exponentials(signed, keep, steep2, top, peak, total):
    """signed (R, C): the terms that count, those of `keep`, or where that is None those above -inf; top (R,): each
    row's largest."""
    higher = tl.maximum(peak, top)
    base = tl.where(higher > -INF, higher, 0.0)
    terms = tl.exp2((signed - base[:, None]) * steep2)
    if keep is not None:
        terms = tl.where(keep, terms, 0.0)
    return higher, shrunk(total, peak, base, steep2) + tl.sum(terms, 1)


@triton.jit(do_not_specialize=SIZES)
def reduce_rows(
    x, y, d, given, given_row, given_col, row_squares, col_squares, lo, hi, end, listed, counts, order,
    row0, row1, col0, col1, n, live_stride, list_stride, scale_a: tl.float64, scale_b: tl.float64, a, b,
    OP_A: tl.constexpr, SIDE_A: tl.constexpr, PHI_A: tl.constexpr,
    OP_B: tl.constexpr, SIDE_B: tl.constexpr, PHI_B: tl.constexpr,
    SQUARE: tl.constexpr, BAND_ONLY: tl.constexpr, CARRY: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
    ONE_CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """States of reductions a and b of rows [row0, row1) against columns [col0, min(col1, end)).

    Grid: (row blocks, splits of the columns). x (N, D), y (M, D), or `given`: their products from (row0, col0) on,
    with two strides. lo, hi (N,), order (M,) int64; end () int64 or None. listed, counts: the clean tiles to visit, as
    `list_live` leaves them; without, all. a, b: `Reduced`, sides and ops as in tile.py.
    """
    split = tl.program_id(1)
    rows = row0 + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < row1
    low, high, lowest, highest = intervals(lo, hi, rows, inside, col0)
    limit = col1 - col0
    if end is not None:
        limit = tl.maximum(tl.minimum(tl.load(end).to(tl.int32), col1) - col0, 0)
    band, in_band, ragged, whole, first, clean = span(
        lowest, highest, limit, split, tl.num_programs(1), BLOCK_COLS, BAND_ONLY
    )  # fmt: skip
    if listed is not None:
        first, clean = share_of(counts, tl.program_id(0), split, tl.num_programs(1))
    x_tile = 0
    if (given is None) & ONE_CHUNK:
        x_tile = load_rows(x, rows, inside, d, 0, BLOCK_K, EVEN_D, False)
    squares = row_vector(row_squares, rows, inside, 0.0, ACC)
    at = split.to(tl.int64) * n + rows
    live_row = ((row0 // BLOCK_ROWS + tl.program_id(0)).to(tl.int64)) * live_stride + col0 // BLOCK_COLS

    number_a, number_b = number(scale_a, a.scale, ACC), number(scale_b, b.scale, ACC)
    lower_a, upper_a = row_vector(a.lower, rows, inside, 0.0, ACC), row_vector(a.upper, rows, inside, 0.0, ACC)
    lower_b, upper_b = row_vector(b.lower, rows, inside, 0.0, ACC), row_vector(b.upper, rows, inside, 0.0, ACC)
    own_a, own_b = row_vector(a.offset, rows, inside, 0.0, ACC), row_vector(b.offset, rows, inside, 0.0, ACC)
    peak_a, total_a = start(a, at, inside, OP_A, BLOCK_ROWS, CARRY, ACC)
    peak_b, total_b = start(b, at, inside, OP_B, BLOCK_ROWS, CARRY, ACC)

    for k in tl.range(0, in_band + ragged, num_stages=1):
        tile = tl.where(k < in_band, band + k, whole)
        cols = col0 + tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        valid = cols < col0 + limit
        z, _ = similarities(
            x, x_tile, squares, y, col_squares, given, given_row, given_col, rows, inside, cols, valid, row0, col0, d,
            SQUARE, SQUARED, ONE_CHUNK, False, PRECISION, EVEN_D, BLOCK_K, ACC,
        )  # fmt: skip
        keep = members(rows, cols, valid, low, high, col0, SIDE_A, SQUARE, True)
        peak_a, total_a = fold(
            z, keep, a, number_a, lower_a, upper_a, own_a, cols[None, :], valid[None, :], order, live_row + tile,
            peak_a, total_a, OP_A, PHI_A, ACC,
        )  # fmt: skip
        if OP_B != NOTHING:
            keep = members(rows, cols, valid, low, high, col0, SIDE_B, SQUARE, True)
            peak_b, total_b = fold(
                z, keep, b, number_b, lower_b, upper_b, own_b, cols[None, :], valid[None, :], order, live_row + tile,
                peak_b, total_b, OP_B, PHI_B, ACC,
            )  # fmt: skip
    if not BAND_ONLY:
        for k in range(0, clean):
            tile = clean_tile(first + k, band, in_band, listed, tl.program_id(0), list_stride)
            cols = col0 + tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            valid = tl.full((BLOCK_COLS,), 1, tl.int1)
            z, _ = similarities(
                x, x_tile, squares, y, col_squares, given, given_row, given_col, rows, inside, cols, valid, row0, col0,
                d, SQUARE, SQUARED, ONE_CHUNK, True, PRECISION, EVEN_D, BLOCK_K, ACC,
            )  # fmt: skip
            keep = members(rows, cols, valid, low, high, col0, SIDE_A, SQUARE, False)
            if SIDE_A != POSITIVES:
                peak_a, total_a = fold(
                    z, keep, a, number_a, lower_a, upper_a, own_a, cols[None, :], valid[None, :], order,
                    live_row + tile, peak_a, total_a, OP_A, PHI_A, ACC,
                )  # fmt: skip
            if (OP_B != NOTHING) & (SIDE_B != POSITIVES):
                peak_b, total_b = fold(
                    z, keep, b, number_b, lower_b, upper_b, own_b, cols[None, :], valid[None, :], order,
                    live_row + tile, peak_b, total_b, OP_B, PHI_B, ACC,
                )  # fmt: skip
    leave(a, at, inside, peak_a, total_a, OP_A)
    if OP_B != NOTHING:
        leave(b, at, inside, peak_b, total_b, OP_B)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("value", "top", "rest", "index"))
def finish(
    peak, total, poison, value, top, rest, index, n, splits, scale: tl.float64, learned,
    OP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """value (N,) from the states of all splits, plus `poison` (); index (N,) int64 of min and max: rank, -1 without.

    Of logsumexp, value = top * factor + rest, its largest term's z (of a transform: phi, and a factor of 1) and the log
    of its sum relative to that one; 0 and inf of an empty set.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    best, whole, first = tl.full((BLOCK,), -INF, ACC), tl.zeros((BLOCK,), ACC), tl.full((BLOCK,), UNRANKED, tl.int32)
    at = rows.to(tl.int64)
    factor = number(1.0, None, ACC) if OP == MAPPED else number(scale, learned, ACC)
    steep2 = tl.abs(factor) * LOG2E
    for _ in range(0, splits):
        if (OP == LOGSUMEXP) | (OP == MAPPED):
            own, sums = tl.load(peak + at, mask=inside, other=0.0), tl.load(total + at, mask=inside, other=0.0)
            higher = tl.maximum(best, own)
            base = tl.where(higher > -INF, higher, 0.0)
            whole = shrunk(whole, best, base, steep2) + shrunk(sums, own, base, steep2)
            best = higher
        elif (OP == SUM) | (OP == COUNT):
            whole += tl.load(total + at, mask=inside, other=0.0)
        else:
            own = tl.load(peak + at, mask=inside, other=0.0)
            if total is not None:
                rank = tl.load(total + at, mask=inside, other=UNRANKED)
                first = tl.where(own > best, rank, tl.where(own == best, tl.minimum(first, rank), first))
            best = tl.maximum(best, own)
        at += n
    if (OP == LOGSUMEXP) | (OP == MAPPED):
        # Not `whole > 0`: a sum that is NaN is no empty set.
        some = best > -INF
        highest = tl.where(some, best, 0.0) * direction(factor)
        logarithm = tl.log2(tl.where(some, whole, 1.0)) * LN2
        tl.store(top + rows, highest, mask=inside)
        tl.store(rest + rows, tl.where(some, logarithm, INF), mask=inside)
        result = tl.where(some, highest * factor + logarithm, -INF)
    elif (OP == SUM) | (OP == COUNT):
        result = whole
    else:
        result = best if OP == MAX else -best
    tl.store(value + rows, result + tl.load(poison), mask=inside)
    if index is not None:
        tl.store(index + rows, tl.where(first == UNRANKED, -1, first).to(tl.int64), mask=inside)
