"""The pairs that the screen could not prove dead: exact similarities, their rows' reductions, weights and gradients.

Survivors stand in a sorted list of keys, row << 32 | column, LAST from its end on; those of row i from starts[i] to
starts[i + 1]. Similarities are sums of products of the embeddings' own entries, or of their squared differences, in
float32 (or float64), so that both ends of a pair see the same bits; they are kept beside the keys, and so are the
weights.
Every row is one program's: no atomics, same bits every time.
"""

import triton
import triton.language as tl

from .gradient import anchor, slopes
from .reduce import fold, leave, start
from .tile import NOTHING, SIZES, number, row_vector, through_distance

LAST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit(do_not_specialize=SIZES)
def pair_similarities(
    x, y, d, keys, z, count,
    EUCLIDEAN: tl.constexpr, SQUARED: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z (L,) of each key. Grid: (blocks of PAIRS)."""
    at = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    key = tl.load(keys + at, mask=at < count, other=LAST)
    here = key != LAST
    if tl.max(here.to(tl.int32), 0) > 0:
        row, col = tl.where(here, key >> 32, 0), tl.where(here, key & 0xFFFFFFFF, 0)
        sums = tl.zeros((PAIRS, BLOCK_D), ACC)
        for k in range(0, d, BLOCK_D):
            column = k + tl.arange(0, BLOCK_D)[None, :]
            mask = here[:, None] & (column < d)
            left = tl.load(x + row[:, None] * d + column, mask=mask, other=0.0).to(ACC)
            right = tl.load(y + col[:, None] * d + column, mask=mask, other=0.0).to(ACC)
            if EUCLIDEAN:
                left -= right
                right = left
            sums += left * right
        s = tl.sum(sums, 1)
        if EUCLIDEAN and not SQUARED:
            s = tl.sqrt(s)
        tl.store(z + at, s, mask=here)


@triton.jit
def entries(starts, n, ROWS: tl.constexpr):
    """A program's rows, where each one's survivors begin and end, and the most that one has."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    begin, stop = tl.load(starts + rows, mask=inside, other=0), tl.load(starts + rows + 1, mask=inside, other=0)
    return rows, inside, begin, stop, tl.max(stop - begin, 0)


@triton.jit(do_not_specialize=SIZES)
def fold_survivors(
    keys, z, starts, order, n, splits, scale_a: tl.float64, scale_b: tl.float64, a, b,
    OP_A: tl.constexpr, PHI_A: tl.constexpr, OP_B: tl.constexpr, PHI_B: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """States of reductions a and b (`Reduced`) over each row's survivors, behind those of so many splits; the exact
    window decides."""
    rows, inside, begin, stop, longest = entries(starts, n, ROWS)
    state = tl.full([], splits, tl.int64) * n + rows
    number_a, number_b = number(scale_a, a.scale, ACC), number(scale_b, b.scale, ACC)
    lower_a, upper_a = row_vector(a.lower, rows, inside, 0.0, ACC), row_vector(a.upper, rows, inside, 0.0, ACC)
    lower_b, upper_b = row_vector(b.lower, rows, inside, 0.0, ACC), row_vector(b.upper, rows, inside, 0.0, ACC)
    own_a, own_b = row_vector(a.offset, rows, inside, 0.0, ACC), row_vector(b.offset, rows, inside, 0.0, ACC)
    peak_a, total_a = start(a, state, inside, OP_A, ROWS, False, ACC)
    peak_b, total_b = start(b, state, inside, OP_B, ROWS, False, ACC)
    for k in range(0, longest, PAIRS):
        at = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = at < stop[:, None]
        col = tl.load(keys + at, mask=here, other=0) & 0xFFFFFFFF
        value = tl.load(z + at, mask=here, other=0.0)
        peak_a, total_a = fold(
            value, here, a, number_a, lower_a, upper_a, own_a, col, here, order, 0, peak_a, total_a, OP_A, PHI_A, ACC
        )  # fmt: skip
        if OP_B != NOTHING:
            peak_b, total_b = fold(
                value, here, b, number_b, lower_b, upper_b, own_b, col, here, order, 0, peak_b, total_b, OP_B, PHI_B,
                ACC,
            )  # fmt: skip
    leave(a, state, inside, peak_a, total_a, OP_A)
    if OP_B != NOTHING:
        leave(b, state, inside, peak_b, total_b, OP_B)


@triton.jit
def weigh_term(
    z, here, slot, scale, lower, upper, own, top, rest2, grad, col, shares, at, d_scale, d_offset,
    OP: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dz of survivors through one reduction, and their rows' sums; to `shares` what is the columns' offsets'."""
    ref = row_vector(slot.ref_offset, col, here, 0.0, ACC)
    g, to_own = slopes(
        z, here, slot, scale, lower[:, None], upper[:, None], own[:, None], top[:, None], rest2[:, None], grad[:, None],
        ref, OP, SLOPE,
    )  # fmt: skip
    if slot.d_scale is not None:
        d_scale += tl.sum(g * z, 1)
    if slot.d_offset is not None:
        d_offset += tl.sum(to_own, 1)
    if shares is not None:
        tl.store(shares + at, g - to_own, mask=here)
    return g * scale, d_scale, d_offset


@triton.jit(do_not_specialize=SIZES)
def weigh_survivors(
    keys, z, starts, weights, shares_a, shares_b, n, scale_a: tl.float64, scale_b: tl.float64, a, b,
    OP_A: tl.constexpr, SLOPE_A: tl.constexpr, OP_B: tl.constexpr, SLOPE_B: tl.constexpr,
    EUCLIDEAN: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """weights (L,): dL/dS of each survivor through its anchor's reductions a, b (`Weighed`), whose sums it leaves."""
    rows, inside, begin, stop, longest = entries(starts, n, ROWS)
    number_a, number_b = number(scale_a, a.scale, ACC), number(scale_b, b.scale, ACC)
    lower_a, upper_a, own_a, top_a, rest_a, grad_a = anchor(a, rows, inside, ACC)
    lower_b, upper_b, own_b, top_b, rest_b, grad_b = anchor(b, rows, inside, ACC)
    d_scale_a, d_offset_a = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    d_scale_b, d_offset_b = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    for k in range(0, longest, PAIRS):
        at = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = at < stop[:, None]
        col = tl.load(keys + at, mask=here, other=0) & 0xFFFFFFFF
        pair = tl.load(z + at, mask=here, other=0.0)
        w, d_scale_a, d_offset_a = weigh_term(
            pair, here, a, number_a, lower_a, upper_a, own_a, top_a, rest_a, grad_a, col, shares_a, at,
            d_scale_a, d_offset_a, OP_A, SLOPE_A, ACC,
        )  # fmt: skip
        if OP_B != NOTHING:
            w_b, d_scale_b, d_offset_b = weigh_term(
                pair, here, b, number_b, lower_b, upper_b, own_b, top_b, rest_b, grad_b, col, shares_b, at,
                d_scale_b, d_offset_b, OP_B, SLOPE_B, ACC,
            )  # fmt: skip
            w += w_b
        if EUCLIDEAN:
            w = through_distance(w, pair, SQUARED)
        tl.store(weights + at, w, mask=here)
    if a.d_scale is not None:
        tl.store(a.d_scale + rows, d_scale_a, mask=inside)
    if a.d_offset is not None:
        tl.store(a.d_offset + rows, d_offset_a, mask=inside)
    if b.d_scale is not None:
        tl.store(b.d_scale + rows, d_scale_b, mask=inside)
    if b.d_offset is not None:
        tl.store(b.d_offset + rows, d_offset_b, mask=inside)


@triton.jit
def spread_survivors(
    x, y, d, lists, keys, starts, weights, dx,
    MIRROR: tl.constexpr, EUCLIDEAN: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_i (rows, D) += sum w_ij y_j over each row's survivors; of distances, sum w_ij (y_j - x_i).

    Grid: (rows, slabs of D). MIRROR: the rows are references, and `lists` holds row << 32 | place among `keys`.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, stop = tl.load(starts + row), tl.load(starts + row + 1)
    if stop > begin:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        acc = tl.zeros((PAIRS, BLOCK_D), ACC)
        own = tl.load(x + row * d + column, mask=inside & EUCLIDEAN, other=0.0).to(ACC)
        for k in range(begin, stop, PAIRS):
            at = k + tl.arange(0, PAIRS)
            here = at < stop
            other = tl.load(lists + at, mask=here, other=0) & 0xFFFFFFFF
            if MIRROR:
                at = other
                other = tl.load(keys + at, mask=here, other=0) >> 32
            w = tl.load(weights + at, mask=here, other=0.0)
            mask = here[:, None] & inside[None, :]
            tile = tl.load(y + other[:, None] * d + column[None, :], mask=mask, other=0.0)
            acc += w[:, None] * (tile.to(ACC) - own[None, :])
        sums = tl.sum(acc, 0)
        sums += tl.load(dx + row * d + column, mask=inside, other=0.0)
        tl.store(dx + row * d + column, sums, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_columns(lists, starts, shares, total, m, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """total (M,): the sum of `shares` (L,) over each column's survivors, by the lists of a MIRROR."""
    rows, inside, begin, stop, longest = entries(starts, m, ROWS)
    sums = tl.zeros((ROWS,), ACC)
    for k in range(0, longest, PAIRS):
        at = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = at < stop[:, None]
        place = tl.load(lists + at, mask=here, other=0) & 0xFFFFFFFF
        sums += tl.sum(tl.load(shares + place, mask=here, other=0.0), 1)
    tl.store(total + rows, sums, mask=inside)
