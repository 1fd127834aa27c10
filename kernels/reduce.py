"""Forward: the row reductions of a block of rows, from one pass over its pairs.

Computes: for each row r_i = reduce over its pairs of phi(scale * z_ij), for one or two reductions (`ForwardOperands`).
Never stores: similarities, masks, exponentials.
Leaves: a state for each row and split of the columns, which `merge_splits` turns into the row's value. It is
    logsumexp   row_max, its largest term's z times the sign of the scale, and row_sum, the sum relative to that term
    sum, count  row_sum
    min, max    row_max, the best of -z or z, and, where its index is wanted, rank: the caller's, the lowest of equals
Deterministic: a program owns its rows, and splits are merged in order: no atomics, same inputs, same bits.

A logsumexp's exponents are (z - row_max) * scale: the largest term is e^0 at any magnitude, whether or not a compiler
multiplies and adds at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .similarity import load_rows, similarities
from .tile import (
    COUNT,
    INF,
    LN2,
    LOG2E,
    LOGSUMEXP,
    MAX,
    NOTHING,
    POSITIVES,
    SIZES,
    SUM,
    TRANSFORMED,
    Corner,
    RowBlock,
    clean_tile,
    count_columns,
    inside_window,
    load_positives,
    load_scalar,
    load_vector,
    pairs_of_side,
    split_list,
    split_tiles,
    tile_columns,
    vector_max,
)
from .transforms import log1p_unit

NO_RANK: tl.constexpr = tl.constexpr(2147483647)
LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # of the normal float32 numbers


class State(NamedTuple):
    """What is known of a reduction so far, (R,) each; see above. The compiler drops what an op does not need."""

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


@triton.jit
def reduce_tile(
    tile, rows, cols, perm, d, products, block, corner, reductions, scales, vectors, states, live_row, form,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The states of both reductions with one tile's pairs added."""
    columns = tile_columns(tile, corner, form.BLOCK_COLS, MASKED)
    z, _ = similarities(rows, cols, products, block, columns, corner, d, form, MASKED)
    one, other = states
    if MASKED or reductions[0].SIDE != POSITIVES:
        keep = pairs_of_side(block, columns, corner.col0, reductions[0].SIDE, form.SQUARE, MASKED)
        one = accumulate(
            z, keep, reductions[0], scales[0], vectors[0], columns.index[None, :], columns.valid[None, :], perm,
            live_row + tile, one, form.ACC,
        )  # fmt: skip
    if reductions[1].OP != NOTHING and (MASKED or reductions[1].SIDE != POSITIVES):
        keep = pairs_of_side(block, columns, corner.col0, reductions[1].SIDE, form.SQUARE, MASKED)
        other = accumulate(
            z, keep, reductions[1], scales[1], vectors[1], columns.index[None, :], columns.valid[None, :], perm,
            live_row + tile, other, form.ACC,
        )  # fmt: skip
    return one, other


@triton.jit(do_not_specialize=SIZES)
def reduce_rows(
    rows, cols, d, products, listed, perm, row0, row1, col0, col1, n, live_stride, list_stride,
    scale_a: tl.float64, scale_b: tl.float64, reductions, form, POSITIVES_ONLY: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """States of two reductions of rows [row0, row1) against columns [col0, min(col1, num_valid)).

    Grid: (row blocks, splits of the columns). The groups are those of operands.py: `Rows` (N), `Cols` (M), `Matrix`
    (instead of the embeddings, where products are given), `ListedTiles`, a pair of `ForwardOperands`, `Form`. perm (M,)
    int64: the columns' places in the caller's order. POSITIVES_ONLY: both reductions are of positives, so no clean tile
    is visited. CARRY: earlier launches have left a state.
    """
    # Which rows, and which of their tiles.
    split = tl.program_id(1)
    index = row0 + tl.program_id(0) * form.BLOCK_ROWS + tl.arange(0, form.BLOCK_ROWS)
    inside = index < row1
    pos_begin, pos_end, begin, end = load_positives(rows.pos_begin, rows.pos_end, index, inside, col0)
    num_cols = count_columns(cols.num_valid, col0, col1)
    visit = split_tiles(begin, end, num_cols, split, tl.num_programs(1), form.BLOCK_COLS, POSITIVES_ONLY)
    first_clean, num_clean = visit.first_clean, visit.num_clean
    if listed.index is not None:
        first_clean, num_clean = split_list(listed.counts, tl.program_id(0), split, tl.num_programs(1))

    # What is loaded once for all of them.
    x_tile = 0
    if products.data is None and form.ONE_CHUNK:
        x_tile = load_rows(rows.x, index, inside, d, 0, form.BLOCK_K, form.EVEN_D, True)
    squares = load_vector(rows.squares, index, inside, 0.0, form.ACC)
    block, corner = RowBlock(index, inside, pos_begin, pos_end, squares, x_tile), Corner(row0, col0, num_cols)
    at = split.to(tl.int64) * n + index
    live_row = (row0 // form.BLOCK_ROWS + tl.program_id(0)).to(tl.int64) * live_stride + col0 // form.BLOCK_COLS
    scales = (
        load_scalar(scale_a, reductions[0].scale, form.ACC), load_scalar(scale_b, reductions[1].scale, form.ACC),
    )  # fmt: skip
    vectors = load_row_vectors(reductions[0], reductions[1], index, inside, form.ACC)
    states = (
        init_state(reductions[0], at, inside, form.BLOCK_ROWS, CARRY, form.ACC),
        init_state(reductions[1], at, inside, form.BLOCK_ROWS, CARRY, form.ACC),
    )  # fmt: skip

    for k in tl.range(0, visit.num_masked + visit.num_tail, num_stages=1):
        tile = tl.where(k < visit.num_masked, visit.first_masked + k, visit.tail_tile)
        states = reduce_tile(
            tile, rows, cols, perm, d, products, block, corner, reductions, scales, vectors, states, live_row,
            form, True,
        )  # fmt: skip
    if not POSITIVES_ONLY:
        for k in range(0, num_clean):
            tile = clean_tile(first_clean + k, visit, listed, tl.program_id(0), list_stride)
            states = reduce_tile(
                tile, rows, cols, perm, d, products, block, corner, reductions, scales, vectors, states, live_row,
                form, False,
            )  # fmt: skip
    store_state(reductions[0], at, inside, states[0])
    store_state(reductions[1], at, inside, states[1])


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("value", "top", "rest", "index"))
def merge_splits(
    row_max, row_sum, rank, nonfinite, value, top, rest, index, n, splits, scale: tl.float64, learned,
    OP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """value (N,) of a reduction from the states of all splits, (splits, N) each, plus `nonfinite` (), 0 or NaN.

    Of logsumexp, value = top * factor + rest, its largest term's z (of a transform: phi, and a factor of 1) and the log
    of its sum relative to that one; 0 and inf of an empty set. index (N,) int64 of min and max: the rank, -1 without.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    best, total, first = tl.full((BLOCK,), -INF, ACC), tl.zeros((BLOCK,), ACC), tl.full((BLOCK,), NO_RANK, tl.int32)
    at = rows.to(tl.int64)
    factor = load_scalar(1.0, None, ACC) if OP == TRANSFORMED else load_scalar(scale, learned, ACC)
    scale2 = tl.abs(factor) * LOG2E
    for _ in range(0, splits):
        if (OP == LOGSUMEXP) | (OP == TRANSFORMED):
            own_max = tl.load(row_max + at, mask=inside, other=0.0)
            own_sum = tl.load(row_sum + at, mask=inside, other=0.0)
            highest, base = common_max(best, own_max)
            total = rescale(total, best, base, scale2) + rescale(own_sum, own_max, base, scale2)
            best = highest
        elif (OP == SUM) | (OP == COUNT):
            total += tl.load(row_sum + at, mask=inside, other=0.0)
        else:
            own_max = tl.load(row_max + at, mask=inside, other=0.0)
            if rank is not None:
                own_rank = tl.load(rank + at, mask=inside, other=NO_RANK)
                higher, equal = own_max > best, own_max == best
                first = tl.where(higher, own_rank, tl.where(equal, tl.minimum(first, own_rank), first))
            best = tl.maximum(best, own_max)
        at += n
    if (OP == LOGSUMEXP) | (OP == TRANSFORMED):
        # Not `total > 0`: a sum that is NaN is no empty set.
        some = best > -INF
        highest = tl.where(some, best, 0.0) * scale_sign(factor)
        logarithm = tl.log2(tl.where(some, total, 1.0)) * LN2
        tl.store(top + rows, highest, mask=inside)
        tl.store(rest + rows, tl.where(some, logarithm, INF), mask=inside)
        result = tl.where(some, highest * factor + logarithm, -INF)
    elif (OP == SUM) | (OP == COUNT):
        result = total
    else:
        result = best if OP == MAX else -best
    tl.store(value + rows, result + tl.load(nonfinite), mask=inside)
    if index is not None:
        tl.store(index + rows, tl.where(first == NO_RANK, -1, first).to(tl.int64), mask=inside)
