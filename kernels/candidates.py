"""The pairs that the screen could not rule out: exact similarities, their rows' reductions, weights and gradients.

Candidates are a sorted list of keys, row << 32 | column, with LAST from its end on; those of row i stand in
[starts[i], starts[i + 1]).
Computes: similarities as sums of products of the embeddings' own entries, or of their squared differences, in float32
(or float64), so that both ends of a pair see the same bits; what `reduce_rows` and `backward_rows` do with a tile.
Stores: similarities and weights, a number for each candidate.
Deterministic: every row, and in the mirrored list every column, is one program's: no atomics, same inputs, same bits.
"""

import triton
import triton.language as tl

from .pair_grads import RowSums, grads_from_anchors, load_anchors, no_sums, per_row
from .similarity import product_grad
from .state import accumulate, init_state, load_row_vectors, store_state
from .tile import NOTHING, SIZES, load_scalar, load_vector

LAST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def low_half(key):
    """A key's column; of a mirrored list, the candidate's place among the keys."""
    return key & 0xFFFFFFFF


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
        row, col = tl.where(here, key >> 32, 0), tl.where(here, low_half(key), 0)
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
def load_ranges(starts, n, ROWS: tl.constexpr):
    """A program's rows, where each one's candidates begin and end, and the most that one has."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    begin, end = tl.load(starts + rows, mask=inside, other=0), tl.load(starts + rows + 1, mask=inside, other=0)
    return rows, inside, begin, end, tl.max(end - begin, 0)


@triton.jit(do_not_specialize=SIZES)
def reduce_candidates(
    keys, z, starts, perm, n, splits, scale_a: tl.float64, scale_b: tl.float64, reductions,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """States of two reductions (`ForwardOperands`) over each row's candidates, behind those of so many splits; the
    exact window decides. Grid: (blocks of ROWS)."""
    rows, inside, begin, end, longest = load_ranges(starts, n, ROWS)
    at = tl.full([], splits, tl.int64) * n + rows
    scales = load_scalar(scale_a, reductions[0].scale, ACC), load_scalar(scale_b, reductions[1].scale, ACC)
    vectors = load_row_vectors(reductions[0], reductions[1], rows, inside, ACC)
    state_a = init_state(reductions[0], at, inside, ROWS, False, ACC)
    state_b = init_state(reductions[1], at, inside, ROWS, False, ACC)
    for k in range(0, longest, PAIRS):
        place = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = place < end[:, None]
        col = low_half(tl.load(keys + place, mask=here, other=0))
        value = tl.load(z + place, mask=here, other=0.0)
        state_a = accumulate(value, here, reductions[0], scales[0], vectors[0], col, here, perm, 0, state_a, ACC)
        if reductions[1].OP != NOTHING:
            state_b = accumulate(value, here, reductions[1], scales[1], vectors[1], col, here, perm, 0, state_b, ACC)
    store_state(reductions[0], at, inside, state_a)
    store_state(reductions[1], at, inside, state_b)


@triton.jit
def candidate_grads(z, here, reduction, scale, anchors, col, ref_shares, place, sums, ACC: tl.constexpr):
    """dL/dz of candidates from their anchors, and the anchors' sums; to ref_shares what is the columns' offsets'."""
    ref_offset = load_vector(reduction.ref_offset, col, here, 0.0, ACC)
    grad, to_offset = grads_from_anchors(z, here, reduction, scale, per_row(anchors), ref_offset)
    d_scale, d_offset, d_ref_offset = sums
    if reduction.d_scale is not None:
        d_scale += tl.sum(grad * z, 1)
    if reduction.d_offset is not None:
        d_offset += tl.sum(to_offset, 1)
    if ref_shares is not None:
        tl.store(ref_shares + place, grad - to_offset, mask=here)
    return grad * scale, RowSums(d_scale, d_offset, d_ref_offset)


@triton.jit(do_not_specialize=SIZES)
def backward_candidates(
    keys, z, starts, weights, ref_shares, n, scale_a: tl.float64, scale_b: tl.float64, reductions,
    EUCLIDEAN: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """weights (L,): dL/d(x.y) of each candidate through its anchor's two reductions (`BackwardOperands`), whose sums it
    leaves; of each reduction in ref_shares (L,) what is its column's offset's. Grid: (blocks of ROWS)."""
    rows, inside, begin, end, longest = load_ranges(starts, n, ROWS)
    scales = load_scalar(scale_a, reductions[0].scale, ACC), load_scalar(scale_b, reductions[1].scale, ACC)
    anchors_a = load_anchors(reductions[0], rows, inside, ACC)
    anchors_b = load_anchors(reductions[1], rows, inside, ACC)
    sums_a, sums_b = no_sums(ROWS, ACC), no_sums(ROWS, ACC)
    for k in range(0, longest, PAIRS):
        place = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = place < end[:, None]
        col = low_half(tl.load(keys + place, mask=here, other=0))
        value = tl.load(z + place, mask=here, other=0.0)
        w, sums_a = candidate_grads(
            value, here, reductions[0], scales[0], anchors_a, col, ref_shares[0], place, sums_a, ACC
        )  # fmt: skip
        if reductions[1].OP != NOTHING:
            w_b, sums_b = candidate_grads(
                value, here, reductions[1], scales[1], anchors_b, col, ref_shares[1], place, sums_b, ACC
            )  # fmt: skip
            w += w_b
        if EUCLIDEAN:
            w = product_grad(w, value, SQUARED)
        tl.store(weights + place, w, mask=here)
    store_anchor_sums(reductions[0], rows, inside, sums_a)
    store_anchor_sums(reductions[1], rows, inside, sums_b)


@triton.jit
def store_anchor_sums(reduction, rows, inside, sums):
    if reduction.d_scale is not None:
        tl.store(reduction.d_scale + rows, sums.d_scale, mask=inside)
    if reduction.d_offset is not None:
        tl.store(reduction.d_offset + rows, sums.d_offset, mask=inside)


@triton.jit
def add_candidate_grads(
    x, y, d, lists, keys, starts, weights, dx,
    MIRROR: tl.constexpr, EUCLIDEAN: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_i (rows, D) += sum w_ij y_j over each row's candidates; of distances, sum w_ij (y_j - x_i).

    Grid: (rows, slabs of D). MIRROR: the rows are references, and `lists` holds row << 32 | place among `keys`.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    if end > begin:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        acc = tl.zeros((PAIRS, BLOCK_D), ACC)
        x_row = tl.load(x + row * d + column, mask=inside & EUCLIDEAN, other=0.0).to(ACC)
        for k in range(begin, end, PAIRS):
            at = k + tl.arange(0, PAIRS)
            here = at < end
            other = low_half(tl.load(lists + at, mask=here, other=0))
            if MIRROR:
                at = other
                other = tl.load(keys + at, mask=here, other=0) >> 32
            w = tl.load(weights + at, mask=here, other=0.0)
            mask = here[:, None] & inside[None, :]
            tile = tl.load(y + other[:, None] * d + column[None, :], mask=mask, other=0.0)
            acc += w[:, None] * (tile.to(ACC) - x_row[None, :])
        sums = tl.sum(acc, 0)
        sums += tl.load(dx + row * d + column, mask=inside, other=0.0)
        tl.store(dx + row * d + column, sums, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_columns(lists, starts, shares, col_sum, m, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """col_sum (M,): the sum of `shares` (L,) over each column's candidates, by the lists of a MIRROR."""
    rows, inside, begin, end, longest = load_ranges(starts, m, ROWS)
    sums = tl.zeros((ROWS,), ACC)
    for k in range(0, longest, PAIRS):
        at = begin[:, None] + k + tl.arange(0, PAIRS)[None, :]
        here = at < end[:, None]
        place = low_half(tl.load(lists + at, mask=here, other=0))
        sums += tl.sum(tl.load(shares + place, mask=here, other=0.0), 1)
    tl.store(col_sum + rows, sums, mask=inside)
