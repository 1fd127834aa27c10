"""Forward: the row reductions of a block of rows, from one pass over its pairs.

Computes: for each row r_i = reduce over its pairs of phi(scale * z_ij), for one or two reductions (`ForwardOperands`).
Never stores: similarities, masks, exponentials.
Leaves: a state (state.py) for each row and split of the columns, which `merge_splits` turns into the row's value.
Deterministic: a program owns its rows, and splits are merged in order: no atomics, same inputs, same bits.
"""

import triton
import triton.language as tl

from .similarity import load_rows, similarities
from .state import (
    NO_RANK,
    accumulate,
    common_max,
    init_state,
    load_row_vectors,
    rescale,
    scale_sign,
    store_state,
)
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
    load_positives,
    load_scalar,
    load_vector,
    pairs_of_side,
    split_list,
    split_tiles,
    tile_columns,
)


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
