"""Backward: General Pair Weighting. The tile again, the weight of each of its pairs, and the product with the columns.

    dX_i = sum_j w_ij y_j,   w_ij = sum over reductions of dL/dr phi'(t) [softmax factor] * scale

A row block is the anchor of its pairs, the reference of its pairs, or (square problems) both, and then w_ij holds what
both ends give to S_ij, so that one product serves both. Each program owns its rows: no atomics, same bits every time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .reduce import reach
from .tile import (
    INF,
    LOG2E,
    LOGSUMEXP,
    MAPPED,
    NEAR_GRADIENT,
    NOTHING,
    POSITIVES,
    SIZES,
    clean_tile,
    inside_window,
    intervals,
    largest,
    leading_bits,
    load_rows,
    members,
    number,
    row_vector,
    share_of,
    similarities,
    span,
    through_distance,
)
from .transforms import logistic

CLOSE_STEP: tl.constexpr = tl.constexpr(4)  # columns of embeddings at a time


class Weighed(NamedTuple):
    """One reduction's tensors, None where it has none: what it reads, then what it leaves."""

    scale: Any = None  # (1,) if learned
    offset: Any = None  # (N,)
    ref_offset: Any = None  # (M,)
    lower: Any = None  # (N,)
    upper: Any = None  # (N,)
    top: Any = None  # (N,), logsumexp only: the z (of a transform: phi) that its sum is relative to
    rest: Any = None  # (N,), logsumexp only: the log of that sum, inf of an empty set
    grad: Any = None  # (N,) dL/dr; with `around`, dL/dr e^((around - top) scale - rest)
    around: Any = (
        None  # () the z of the largest term of all: one exponential, relative to it, serves both ends of a pair
    )
    d_scale: Any = None  # (splits, N): each row's part
    d_offset: Any = None  # (splits, N)
    d_ref_offset: Any = None  # (splits, M)


@triton.jit
def anchor(slot, index, inside, ACC: tl.constexpr):
    """Anchors' lower, upper, own offset, top, rest in base 2 and dL/dr; 0, inf and 0 where the set was empty."""
    lower, upper = row_vector(slot.lower, index, inside, 0.0, ACC), row_vector(slot.upper, index, inside, 0.0, ACC)
    own, grad = row_vector(slot.offset, index, inside, 0.0, ACC), row_vector(slot.grad, index, inside, 0.0, ACC)
    top, rest2 = row_vector(slot.top, index, inside, 0.0, ACC), tl.zeros(index.shape, ACC)
    if slot.rest is not None:
        rest2 = tl.load(slot.rest + index, mask=inside, other=INF) * LOG2E
        grad = tl.where(rest2 == INF, 0.0, grad)
    return lower, upper, own, top, rest2, grad


@triton.jit
def slopes(
    z, keep, slot, scale, lower, upper, own, top, rest2, grad, ref, OP: tl.constexpr, SLOPE: tl.constexpr
):  # fmt: skip
    """dL/ds of each pair from one of its ends, s = scale * z, and what of it goes to the anchor's own offset."""
    keep = inside_window(z, keep, lower, upper, slot.lower is not None, slot.upper is not None)
    if OP == LOGSUMEXP:
        # The difference first: it is 0 for the largest term, whatever is multiplied and added at once.
        g = tl.where(keep, tl.exp2((z - top) * (scale * LOG2E) - rest2) * grad, 0.0)
        to_own = g
    elif OP == MAPPED:
        phi, by_s, by_own = SLOPE(z * scale, own)
        weight = tl.where(keep, tl.exp2((phi - top) * LOG2E - rest2) * grad, 0.0)
        g, to_own = weight * by_s, weight * by_own
    else:
        _, by_s, by_own = SLOPE(z * scale, reach(own, ref, slot.ref_offset is not None))
        g, to_own = tl.where(keep, by_s * grad, 0.0), tl.where(keep, by_own * grad, 0.0)
        if slot.ref_offset is not None:
            to_own *= tl.where((own > -INF) | (ref > -INF), logistic(own - ref), 0.0)
    return g, to_own


@triton.jit
def weigh(
    z, keep, slot, scale, around, rows_lower, rows_upper, rows_own, rows_top, rows_rest, rows_grad, rows_ref, cols,
    valid, d_scale, d_offset, d_ref,
    OP: tl.constexpr, SLOPE: tl.constexpr, ANCHOR: tl.constexpr, REFERENCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dz of a tile's pairs through one reduction, and the rows' sums with the tile added."""
    alike: tl.constexpr = (slot.around is not None) if OP == LOGSUMEXP else ((OP != MAPPED) and (slot.offset is None))
    if ANCHOR and REFERENCE and alike:  # what depends on the pair alone serves both of its ends
        lower, upper, _, _, _, grad = anchor(slot, cols, valid, ACC)
        one = inside_window(
            z, keep, rows_lower[:, None], rows_upper[:, None], slot.lower is not None, slot.upper is not None
        )  # fmt: skip
        other = inside_window(z, keep, lower[None, :], upper[None, :], slot.lower is not None, slot.upper is not None)
        if OP == LOGSUMEXP:
            # 0 at most, of a pair of either end; of others it may be anything, and must not become inf * 0.
            core = tl.exp2(tl.minimum((z - around) * (scale * LOG2E), 1.0))
        else:
            _, by_s, _ = SLOPE(z * scale, tl.zeros((z.shape[0], z.shape[1]), ACC))
            core = tl.where(one | other, by_s, 0.0)
        mine = tl.where(one, rows_grad[:, None], 0.0)
        g = core * (mine + tl.where(other, grad[None, :], 0.0))
        if slot.d_scale is not None:
            d_scale += tl.sum(core * mine * z, 1)
    else:
        g = tl.zeros((z.shape[0], z.shape[1]), ACC)
        if ANCHOR:
            ref = row_vector(slot.ref_offset, cols, valid, 0.0, ACC)
            g, to_own = slopes(
                z, keep, slot, scale, rows_lower[:, None], rows_upper[:, None], rows_own[:, None],
                rows_top[:, None], rows_rest[:, None], rows_grad[:, None], ref[None, :], OP, SLOPE,
            )  # fmt: skip
            if slot.d_scale is not None:
                d_scale += tl.sum(g * z, 1)
            if slot.d_offset is not None:
                d_offset += tl.sum(to_own, 1)
        if REFERENCE:
            lower, upper, own, top, rest2, grad = anchor(slot, cols, valid, ACC)
            other, to_own = slopes(
                z, keep, slot, scale, lower[None, :], upper[None, :], own[None, :], top[None, :], rest2[None, :],
                grad[None, :], rows_ref[:, None], OP, SLOPE,
            )  # fmt: skip
            if slot.d_ref_offset is not None:
                d_ref += tl.sum(other - to_own, 1)
            g += other
    return g * scale, d_scale, d_offset, d_ref


@triton.jit
def spread(w, y_tile, acc, PRECISION: tl.constexpr):
    """acc + w y. float16 cannot hold small weights, so its products are tf32's, which holds float16 exactly."""
    if PRECISION == "split":
        w1, y1 = leading_bits(w), leading_bits(y_tile)
        part = tl.dot(w1, y_tile - y1, input_precision="tf32")
        part = tl.dot(w - w1, y1, part, input_precision="tf32")
        return acc + tl.dot(w1, y1, part, input_precision="tf32", max_num_imprecise_acc=1)
    elif y_tile.dtype == tl.float16:
        return tl.dot(w, y_tile.to(tl.float32), acc, input_precision="tf32")
    else:
        return tl.dot(w.to(y_tile.dtype), y_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit(do_not_specialize=SIZES)
def weigh_rows(
    x, y, d, given, given_row, given_col, weights, weights_row, weights_col, row_squares, col_squares,
    lo, hi, row_end, col_end, listed, counts, near, poison, dx, close_dx, d_pull,
    row0, row1, col0, col1, n, m, list_stride, scale_a: tl.float64, scale_b: tl.float64, a, b,
    OP_A: tl.constexpr, SIDE_A: tl.constexpr, SLOPE_A: tl.constexpr,
    OP_B: tl.constexpr, SIDE_B: tl.constexpr, SLOPE_B: tl.constexpr,
    ANCHOR: tl.constexpr, REFERENCE: tl.constexpr, SQUARE: tl.constexpr, BAND_ONLY: tl.constexpr, CARRY: tl.constexpr,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, ONE_CHUNK: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_SLAB: tl.constexpr, WANTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [row0, row1) through reductions a and b and their pairs with columns [col0, col1).

    Grid: (row blocks, splits of the columns, slabs of D). x: the rows' embeddings, y: the columns'; rows are anchors
    (N of them, against M references), references, or both. listed (row blocks, tiles) int32, counts (row blocks,):
    the clean tiles with a pair alive, from `list_live`; without, all are visited. near () int8: nothing is done unless
    it is WANTED. Leaves dx (splits, rows, D); or, of `given` products, their weights, in d_pull (rows,) what Euclidean
    distances pull along the rows themselves. What pairs that are close give is added up in close_dx (rows, D), or dx
    itself, which then begins as 0.
    """
    if near is not None:
        if tl.load(near) != WANTED:
            return
    split, slab = tl.program_id(1), tl.program_id(2)
    block = tl.program_id(0)
    rows = row0 + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < row1
    low, high, lowest, highest = intervals(lo, hi, rows, inside, col0)
    limit = col1 - col0
    if col_end is not None:
        limit = tl.maximum(tl.minimum(tl.load(col_end).to(tl.int32), col1) - col0, 0)
    band, in_band, ragged, whole, first, clean = span(
        lowest, highest, limit, split, tl.num_programs(1), BLOCK_COLS, BAND_ONLY
    )  # fmt: skip
    if listed is not None:
        first, clean = share_of(counts, block, split, tl.num_programs(1))
    x_tile = 0
    if (given is None) & ONE_CHUNK:
        x_tile = load_rows(x, rows, inside, d, 0, BLOCK_K, EVEN_D, False)
    squares = row_vector(row_squares, rows, inside, 0.0, ACC)
    here = inside
    if row_end is not None:
        here = inside & (rows < tl.load(row_end))

    if (close_dx is not None) & (dx is not None):
        close_dx += split.to(tl.int64) * row1 * d

    number_a, number_b = number(scale_a, a.scale, ACC), number(scale_b, b.scale, ACC)
    around_a, around_b = number(0.0, a.around, ACC), number(0.0, b.around, ACC)
    if ANCHOR:
        lower_a, upper_a, own_a, top_a, rest_a, grad_a = anchor(a, rows, inside, ACC)
        lower_b, upper_b, own_b, top_b, rest_b, grad_b = anchor(b, rows, inside, ACC)
    else:
        none = tl.zeros((BLOCK_ROWS,), ACC)
        lower_a, upper_a, own_a, top_a, rest_a, grad_a = none, none, none, none, none, none
        lower_b, upper_b, own_b, top_b, rest_b, grad_b = none, none, none, none, none, none
    ref_a, ref_b = tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC)
    if REFERENCE:
        ref_a = row_vector(a.ref_offset, rows, inside, 0.0, ACC)
        ref_b = row_vector(b.ref_offset, rows, inside, 0.0, ACC)
    d_scale_a, d_offset_a = tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC)
    d_scale_b, d_offset_b = tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC)
    d_ref_a, d_ref_b, pull = (
        tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC),
    )  # fmt: skip
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), ACC)

    for k in tl.range(0, in_band + ragged, num_stages=1):
        tile = tl.where(k < in_band, band + k, whole)
        cols = col0 + tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        valid = cols < col0 + limit
        z, y_tile = similarities(
            x, x_tile, squares, y, col_squares, given, given_row, given_col, rows, inside, cols, valid, row0, col0, d,
            SQUARE, SQUARED, ONE_CHUNK, False, PRECISION, EVEN_D, BLOCK_K, ACC,
        )  # fmt: skip
        keep = members(rows, cols, valid, low, high, col0, SIDE_A, SQUARE, True)
        w, d_scale_a, d_offset_a, d_ref_a = weigh(
            z, keep, a, number_a, around_a, lower_a, upper_a, own_a, top_a, rest_a, grad_a, ref_a, cols,
            valid, d_scale_a, d_offset_a, d_ref_a, OP_A, SLOPE_A, ANCHOR, REFERENCE, ACC,
        )  # fmt: skip
        if OP_B != NOTHING:
            keep = members(rows, cols, valid, low, high, col0, SIDE_B, SQUARE, True)
            w_b, d_scale_b, d_offset_b, d_ref_b = weigh(
                z, keep, b, number_b, around_b, lower_b, upper_b, own_b, top_b, rest_b, grad_b, ref_b, cols,
                valid, d_scale_b, d_offset_b, d_ref_b, OP_B, SLOPE_B, ANCHOR, REFERENCE, ACC,
            )  # fmt: skip
            w += w_b
        acc, pull = put(
            w, z, acc, pull, dx, close_dx, x, squares, y, y_tile, weights, weights_row, weights_col, col_squares,
            rows, inside, here, cols, valid, row0, col0, d, slab, SQUARED, ONE_CHUNK, False, PRECISION, EVEN_SLAB,
            BLOCK_D,
        )  # fmt: skip
    if not BAND_ONLY:
        for k in range(0, clean):
            tile = clean_tile(first + k, band, in_band, listed, block, list_stride)
            cols = col0 + tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            valid = tl.full((BLOCK_COLS,), 1, tl.int1)
            z, y_tile = similarities(
                x, x_tile, squares, y, col_squares, given, given_row, given_col, rows, inside, cols, valid, row0, col0,
                d, SQUARE, SQUARED, ONE_CHUNK, True, PRECISION, EVEN_D, BLOCK_K, ACC,
            )  # fmt: skip
            keep = members(rows, cols, valid, low, high, col0, SIDE_A, SQUARE, False)
            w = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC)
            if SIDE_A != POSITIVES:
                w, d_scale_a, d_offset_a, d_ref_a = weigh(
                    z, keep, a, number_a, around_a, lower_a, upper_a, own_a, top_a, rest_a, grad_a, ref_a, cols,
                    valid, d_scale_a, d_offset_a, d_ref_a, OP_A, SLOPE_A, ANCHOR, REFERENCE, ACC,
                )  # fmt: skip
            if (OP_B != NOTHING) & (SIDE_B != POSITIVES):
                w_b, d_scale_b, d_offset_b, d_ref_b = weigh(
                    z, keep, b, number_b, around_b, lower_b, upper_b, own_b, top_b, rest_b, grad_b, ref_b, cols,
                    valid, d_scale_b, d_offset_b, d_ref_b, OP_B, SLOPE_B, ANCHOR, REFERENCE, ACC,
                )  # fmt: skip
                w += w_b
            acc, pull = put(
                w, z, acc, pull, dx, close_dx, x, squares, y, y_tile, weights, weights_row, weights_col, col_squares,
                rows, inside, here, cols, valid, row0, col0, d, slab, SQUARED, ONE_CHUNK, True, PRECISION, EVEN_SLAB,
                BLOCK_D,
            )  # fmt: skip

    spoiled = tl.load(poison)
    if slab == 0:
        at = split.to(tl.int64) * n + rows
        leave_sums(a, at, split.to(tl.int64) * m + rows, inside, here, spoiled, d_scale_a, d_offset_a, d_ref_a, CARRY)
        if OP_B != NOTHING:
            leave_sums(
                b, at, split.to(tl.int64) * m + rows, inside, here, spoiled, d_scale_b, d_offset_b, d_ref_b, CARRY
            )  # fmt: skip
    if d_pull is not None:
        if CARRY:
            pull += tl.load(d_pull + rows, mask=inside, other=0.0)
        pull = tl.where(here, pull, 0.0)
        tl.store(d_pull + rows, pull, mask=inside)
    if dx is not None:
        column = slab * BLOCK_D + tl.arange(0, BLOCK_D)
        if col_squares is not None:
            # Anew, by way of a 0 that the compiler cannot see: kept over the loops, rows took registers that spilled.
            rows = row0 + (block + tl.minimum(clean, 0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            inside = rows < row1
            own = load_rows(x, rows, inside, d, slab * BLOCK_D, BLOCK_D, EVEN_SLAB, False)
            acc += pull[:, None] * own.to(acc.dtype)
            tl.debug_barrier()  # what other threads have left of close pairs
            acc += load_rows(close_dx, rows, inside, d, slab * BLOCK_D, BLOCK_D, EVEN_SLAB, False)
        at = (split.to(tl.int64) * row1 + rows)[:, None] * d + column[None, :]
        acc = tl.where(here[:, None], acc, 0.0) + spoiled
        tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside[:, None] & (column[None, :] < d))


@triton.jit
def leave_near(w, close_dx, x, y, rows, here, cols, d, first, last, STEP: tl.constexpr):
    """close_dx (rows, d) += sum_j w_ij (y_j - x_i) in columns [first, last) of the embeddings: the difference first,
    where w_ij y_j and w_ij x_i would cancel. A few columns at a time, which takes few registers, and in memory, where
    these rows are this program's alone; the barrier, because another thread of it may have written before."""
    tl.debug_barrier()
    place, some = tl.arange(0, w.shape[1]), tl.max((w != 0.0).to(tl.int32), 0)
    for start in tl.range(first, last, STEP, num_stages=1):
        column = start + tl.arange(0, STEP)
        within = column < last
        offset = rows.to(tl.int64)[:, None] * d + column[None, :]
        mask = here[:, None] & within[None, :]
        acc = tl.load(close_dx + offset, mask=mask, other=0.0)
        own = tl.load(x + offset, mask=mask, other=0.0).to(acc.dtype)
        for j in tl.range(0, w.shape[1], num_stages=1):
            if tl.sum(tl.where(place == j, some, 0), 0) > 0:
                one = tl.sum(tl.where(place[None, :] == j, w, 0.0), 1)
                at = tl.sum(tl.where(place == j, cols, 0), 0).to(tl.int64)
                other = tl.load(y + at * d + column, mask=within, other=0.0).to(acc.dtype)
                acc += one[:, None] * (other[None, :] - own)
        tl.store(close_dx + offset, acc, mask=mask)


@triton.jit
def put(
    w, z, acc, pull, dx, close_dx, x, squares, y, y_tile, weights, weights_row, weights_col, col_squares,
    rows, inside, here, cols, valid, row0, col0, d, slab, SQUARED: tl.constexpr, ONE_CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, EVEN_SLAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile's weights where they go: through the product into acc, or into `weights`."""
    if col_squares is not None:
        w = through_distance(w, z, SQUARED)
        own = squares[:, None] + row_vector(col_squares, cols, valid, 0.0, w.dtype)[None, :]
        near = ((z if SQUARED else z * z) <= NEAR_GRADIENT * own) & (w != 0.0)
        if largest(tl.max(near.to(tl.int32), 1)) > 0:
            if close_dx is not None:
                first = slab * BLOCK_D
                last = d if dx is None else tl.minimum(first + BLOCK_D, d)
                leave_near(tl.where(near, w, 0.0), close_dx, x, y, rows, here, cols, d, first, last, CLOSE_STEP)
        w = tl.where(near, 0.0, w)
        pull -= tl.sum(w, 1)
    if weights is not None:
        at = (rows - row0).to(tl.int64)[:, None] * weights_row + (cols - col0).to(tl.int64)[None, :] * weights_col
        tl.store(weights + at, w.to(weights.dtype.element_ty), mask=inside[:, None] & valid[None, :])
    elif dx is not None:
        if not ONE_CHUNK:
            y_tile = load_rows(y, cols, valid, d, slab * BLOCK_D, BLOCK_D, EVEN_SLAB, WHOLE)
        acc = spread(w, y_tile, acc, PRECISION)
    return acc, pull


@triton.jit
def leave_sums(slot, at, ref_at, inside, here, spoiled, d_scale, d_offset, d_ref, CARRY: tl.constexpr):
    if slot.d_scale is not None:
        if CARRY:
            d_scale += tl.load(slot.d_scale + at, mask=inside, other=0.0)
        tl.store(slot.d_scale + at, d_scale + spoiled, mask=inside)
    if slot.d_offset is not None:
        if CARRY:
            d_offset += tl.load(slot.d_offset + at, mask=inside, other=0.0)
        tl.store(slot.d_offset + at, d_offset + spoiled, mask=inside)
    if slot.d_ref_offset is not None:
        d_ref = tl.where(here, d_ref, 0.0)
        if CARRY:
            d_ref += tl.load(slot.d_ref_offset + ref_at, mask=inside, other=0.0)
        tl.store(slot.d_ref_offset + ref_at, d_ref + spoiled, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def list_live(
    live, lo, hi, col_end, listed, counts, rows, cols, live_rows, live_stride, planes, list_stride,
    DIRECT: tl.constexpr, MIRROR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For each row block the clean tiles with a pair alive, in order, from the forward pass' bitmap.

    live (planes, anchors' row blocks, references' tiles) int8. DIRECT: the rows are anchors; MIRROR: references.
    """
    block = tl.program_id(0)
    index = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _, _, lowest, highest = intervals(lo, hi, index, index < rows, 0)
    limit = cols
    if col_end is not None:
        limit = tl.minimum(tl.load(col_end).to(tl.int32), cols)
    band, in_band, _, whole, _, _ = span(lowest, highest, limit, 0, 1, BLOCK_COLS, False)
    count = limit * 0
    for step in range(0, whole, STEP):
        tile = step + tl.arange(0, STEP)
        inside = (tile < whole) & ((tile < band) | (tile >= band + in_band))
        alive = tl.zeros((STEP,), tl.int32)
        base = live
        for _ in range(0, planes):
            if DIRECT:
                alive |= tl.load(base + block.to(tl.int64) * live_stride + tile, mask=inside, other=0).to(tl.int32)
            if MIRROR:
                row = (tile.to(tl.int64) * BLOCK_COLS) // BLOCK_ROWS
                for part in tl.static_range(BLOCK_ROWS // BLOCK_COLS):
                    column = tl.full((STEP,), block * (BLOCK_ROWS // BLOCK_COLS) + part, tl.int64)
                    seen = inside & (column < live_stride)
                    alive |= tl.load(base + row * live_stride + column, mask=seen, other=0).to(tl.int32)
            base += tl.full([], live_rows, tl.int64) * live_stride
        at = count + tl.cumsum(alive, 0) - 1
        tl.store(listed + block.to(tl.int64) * list_stride + at, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.store(counts + block, count)
