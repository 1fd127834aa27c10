"""The state of a row reduction: how it begins, how a tile's pairs are added, and how it is kept.

A state is, for each row,
    logsumexp   row_max, its largest term's z times the sign of the scale, and row_sum, the sum relative to that term
    sum, count  row_sum
    min, max    row_max, the best of -z or z, and, where its index is wanted, rank: the caller's, the lowest of equals

A logsumexp's exponents are (z - row_max) * scale: the largest term is e^0 at any magnitude, whether or not a compiler
multiplies and adds at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import (
    COUNT,
    INF,
    LOG2E,
    LOGSUMEXP,
    MAX,
    SUM,
    TRANSFORMED,
    inside_window,
    load_vector,
    vector_max,
)
from .transforms import log1p_unit

NO_RANK: tl.constexpr = tl.constexpr(2147483647)
LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # of the normal float32 numbers


class State(NamedTuple):
    """What is known of a reduction so far, (R,) each. The compiler drops what an op does not need."""

    row_max: Any
    row_sum: Any
    rank: Any


class RowVectors(NamedTuple):
    """A reduction's vectors for a block of rows, (R,) each."""

    lower: Any
    upper: Any
    offset: Any


@triton.jit
def scale_sign(scale):
    """1, or -1 where a negative scale makes the lowest z the largest term."""
    return tl.where(scale < 0.0, -1.0, 1.0).to(scale.dtype)


@triton.jit
def scale_in_base_2(scale):
    """|scale| log2(e), but never 0, which -inf must not be multiplied by: of a scale of 0 it is next to nothing."""
    steep2 = tl.abs(scale) * LOG2E
    return tl.where(steep2 == 0.0, LEAST, steep2)


@triton.jit
def total_offset(offset, ref_offset, HAS_REF: tl.constexpr):
    """What is added to scale * z: the anchor's offset, or logaddexp(offset, ref_offset), -inf where both are."""
    if HAS_REF:
        high, low = tl.maximum(offset, ref_offset), tl.minimum(offset, ref_offset)
        some = high > -INF
        return tl.where(some, high + log1p_unit(tl.exp(tl.where(some, low - high, 0.0))), high)
    else:
        return offset


@triton.jit
def load_row_vectors(a, b, index, inside, ACC: tl.constexpr):
    """`RowVectors` of both reductions."""
    lower_a, upper_a = load_vector(a.lower, index, inside, 0.0, ACC), load_vector(a.upper, index, inside, 0.0, ACC)
    lower_b, upper_b = load_vector(b.lower, index, inside, 0.0, ACC), load_vector(b.upper, index, inside, 0.0, ACC)
    offset_a, offset_b = load_vector(a.offset, index, inside, 0.0, ACC), load_vector(b.offset, index, inside, 0.0, ACC)
    return RowVectors(lower_a, upper_a, offset_a), RowVectors(lower_b, upper_b, offset_b)


@triton.jit
def init_state(reduction, at, inside, ROWS: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr):
    """The state of a row block: empty, or (CARRY) what an earlier launch left at `at`."""
    row_max, row_sum = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    rank = tl.full((ROWS,), NO_RANK, tl.int32)
    if reduction.row_max is not None:
        row_max = tl.full((ROWS,), -INF, ACC)
        if CARRY:
            row_max = tl.load(reduction.row_max + at, mask=inside, other=-INF)
    if CARRY:
        if reduction.rank is not None:
            rank = tl.load(reduction.rank + at, mask=inside, other=NO_RANK)
        if reduction.row_sum is not None:
            row_sum = tl.load(reduction.row_sum + at, mask=inside, other=0.0)
    return State(row_max, row_sum, rank)


@triton.jit
def store_state(reduction, at, inside, state):
    if reduction.row_max is not None:
        tl.store(reduction.row_max + at, state.row_max, mask=inside)
    if reduction.row_sum is not None:
        tl.store(reduction.row_sum + at, state.row_sum, mask=inside)
    if reduction.rank is not None:
        tl.store(reduction.rank + at, state.rank, mask=inside)


@triton.jit
def accumulate(z, keep, reduction, scale, vectors, cols, valid, perm, live_at, state, ACC: tl.constexpr):
    """A state with a tile's pairs added: z, keep (R, C).

    cols, valid: (1, C), or (R, C) where each row has columns of its own. live_at: the tile's place in `live`.
    """
    row_max, row_sum, rank = state
    windowed: tl.constexpr = (reduction.lower is not None) | (reduction.upper is not None)
    keep = inside_window(z, keep, vectors.lower[:, None], vectors.upper[:, None], reduction)
    if reduction.OP == LOGSUMEXP:
        signed = z * scale_sign(scale)
        if windowed:
            # Pairs that are left out are -inf: a number a pair to keep, where a mask is a predicate of every one.
            signed = tl.where(keep, signed, -INF)
            tile_max = tl.max(signed, 1)
            # A window that lets no pair of the tile through costs no exponential.
            some = vector_max(tile_max) > -INF
            if reduction.live is not None:
                tl.store(reduction.live + live_at, some.to(tl.int8))
            if some:
                row_max, row_sum = add_exponentials(signed, None, scale_in_base_2(scale), tile_max, row_max, row_sum)
        else:
            tile_max = tl.max(tl.where(keep, signed, -INF), 1)
            row_max, row_sum = add_exponentials(signed, keep, scale_in_base_2(scale), tile_max, row_max, row_sum)
    elif reduction.OP == TRANSFORMED:
        phi = reduction.PHI(z * scale, vectors.offset[:, None])
        tile_max = tl.max(tl.where(keep, phi, -INF), 1)
        row_max, row_sum = add_exponentials(phi, keep, LOG2E, tile_max, row_max, row_sum)
    elif reduction.OP == SUM:
        ref_offset = load_vector(reduction.ref_offset, cols, valid, 0.0, ACC)
        phi = reduction.PHI(
            z * scale, total_offset(vectors.offset[:, None], ref_offset, reduction.ref_offset is not None)
        )  # fmt: skip
        row_sum += tl.sum(tl.where(keep, phi, 0.0), 1)
        if reduction.live is not None:
            tl.store(reduction.live + live_at, vector_max(tl.max(keep.to(tl.int32), 1)).to(tl.int8))
    elif reduction.OP == COUNT:
        row_sum += tl.sum(tl.where(keep, 1.0, 0.0).to(ACC), 1)
    else:
        signed = tl.where(keep, z if reduction.OP == MAX else -z, -INF)
        tile_max = tl.max(signed, 1)
        if reduction.rank is not None:
            # The caller's indices are read only where a row's extreme changes, or is met again.
            if vector_max(((tile_max >= row_max) & (tile_max > -INF)).to(tl.int32)) > 0:
                ranks = tl.load(perm + cols, mask=valid, other=NO_RANK).to(tl.int32)
                first = tl.min(tl.where(keep & (signed == tile_max[:, None]), ranks, NO_RANK), 1)
                best = tl.where(tile_max > row_max, first, tl.minimum(first, rank))
                rank = tl.where(tile_max >= row_max, best, rank)
        row_max = tl.maximum(row_max, tile_max)
    return State(row_max, row_sum, rank)


@triton.jit
def common_max(one, other):
    """The larger of two maxima, and what sums are taken relative to: the same, 0 where there is no term yet."""
    highest = tl.maximum(one, other)
    return highest, tl.where(highest > -INF, highest, 0.0)


@triton.jit
def rescale(row_sum, row_max, base, scale2):
    """A sum relative to row_max, relative to `base` instead; 0 where there is none (0 * -inf is not 0)."""
    return tl.where(row_max > -INF, row_sum * tl.exp2((row_max - base) * scale2), 0.0)


@triton.jit
def add_exponentials(signed, keep, scale2, tile_max, row_max, row_sum):
    """signed (R, C): the terms that count, those of `keep`, or where that is None those above -inf; tile_max (R,): each
    row's largest."""
    highest, base = common_max(row_max, tile_max)
    terms = tl.exp2((signed - base[:, None]) * scale2)
    if keep is not None:
        terms = tl.where(keep, terms, 0.0)
    return highest, rescale(row_sum, row_max, base, scale2) + tl.sum(terms, 1)
