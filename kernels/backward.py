"""Backward: the gradients of a block of rows, from one pass over its pairs (General Pair Weighting).

Computes: dX_i = sum_j w_ij y_j,   w_ij = the sum over one or two reductions (`BackwardOperands`) of dL/dz_ij. For
Euclidean distances w_ij (y_j - x_i), as sum_j w_ij y_j - norm_grad_i x_i, but pair by pair where x_i and y_j are close.
Never stores: similarities, and weights unless a launch is asked for them. The similarities are computed again.
Leaves: dx of each split, or the weights of a block of given products; the sums of the reductions' own operands.
Deterministic: a row block is the anchor of its pairs, the reference of its pairs, or both, and one program's alone: no
atomics, same inputs, same bits.
"""

import triton
import triton.language as tl

from .pair_grads import load_anchors, no_anchors, no_sums, store_sums, tile_grads
from .similarity import leading_bits, load_rows, matrix_offsets, product_grad, similarities
from .tile import (
    NOTHING,
    POSITIVES,
    SIZES,
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
    vector_max,
)

# As similarity.py's CLOSE, of the gradient, whose terms lose the square root of it.
CLOSE_GRAD: tl.constexpr = tl.constexpr(1 / 256)
CLOSE_STEP: tl.constexpr = tl.constexpr(4)  # columns of embeddings at a time


@triton.jit
def add_product(w, y_tile, acc, PRECISION: tl.constexpr):
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


@triton.jit
def add_close_pairs(w, close_dx, x, y, block, taking_part, columns, d, first, last, STEP: tl.constexpr):
    """close_dx (rows, D) += sum_j w_ij (y_j - x_i) in columns [first, last) of the embeddings: the difference first,
    where w_ij y_j and w_ij x_i would cancel.

    A few columns at a time, which takes few registers, and in memory, where these rows are this program's alone. The
    barrier, because another thread of it may have written there before.
    """
    tl.debug_barrier()
    place, some = tl.arange(0, w.shape[1]), tl.max((w != 0.0).to(tl.int32), 0)
    for start in tl.range(first, last, STEP, num_stages=1):
        column = start + tl.arange(0, STEP)
        within = column < last
        offset = block.index.to(tl.int64)[:, None] * d + column[None, :]
        mask = taking_part[:, None] & within[None, :]
        acc = tl.load(close_dx + offset, mask=mask, other=0.0)
        x_rows = tl.load(x + offset, mask=mask, other=0.0).to(acc.dtype)
        for j in tl.range(0, w.shape[1], num_stages=1):
            # Column j of the tile, if any row of the program is close to it.
            if tl.sum(tl.where(place == j, some, 0), 0) > 0:
                weight = tl.sum(tl.where(place[None, :] == j, w, 0.0), 1)
                at = tl.sum(tl.where(place == j, columns.index, 0), 0).to(tl.int64)
                y_row = tl.load(y + at * d + column, mask=within, other=0.0).to(acc.dtype)
                acc += weight[:, None] * (y_row[None, :] - x_rows)
        tl.store(close_dx + offset, acc, mask=mask)


@triton.jit
def add_weights(
    w, z, y_tile, acc, norm_grad, rows, cols, weights, dx, close_dx, block, taking_part, columns, corner, d, slab, form,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile's weights dL/dz where they go: through the product into acc (R, BLOCK_D), or to `weights`."""
    if cols.squares is not None:
        w = product_grad(w, z, form.SQUARED)
        squares = (
            block.squares[:, None] + load_vector(cols.squares, columns.index, columns.valid, 0.0, w.dtype)[None, :]
        )
        close = ((z if form.SQUARED else z * z) <= CLOSE_GRAD * squares) & (w != 0.0)
        if vector_max(tl.max(close.to(tl.int32), 1)) > 0:
            if close_dx is not None:
                first = slab * form.BLOCK_D
                last = d if dx is None else tl.minimum(first + form.BLOCK_D, d)
                add_close_pairs(
                    tl.where(close, w, 0.0), close_dx, rows.x, cols.y, block, taking_part, columns, d, first, last,
                    CLOSE_STEP,
                )  # fmt: skip
        w = tl.where(close, 0.0, w)
        norm_grad -= tl.sum(w, 1)
    if weights.data is not None:
        at = matrix_offsets(weights, block, columns, corner)
        mask = block.inside[:, None] & columns.valid[None, :]
        tl.store(weights.data + at, w.to(weights.data.dtype.element_ty), mask=mask)
    elif dx is not None:
        if not form.ONE_CHUNK:
            start = slab * form.BLOCK_D
            y_tile = load_rows(cols.y, columns.index, columns.valid, d, start, form.BLOCK_D, form.EVEN_SLAB, MASKED)
        acc = add_product(w, y_tile, acc, form.PRECISION)
    return acc, norm_grad


@triton.jit
def backward_tile(
    tile, rows, cols, d, products, weights, dx, close_dx, block, taking_part, corner, slab, reductions, scales,
    shared_tops, anchors, ref_offsets, sums, norm_grad, acc, form, ANCHOR: tl.constexpr, REFERENCE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """All that a program adds up, with one tile's pairs added."""
    columns = tile_columns(tile, corner, form.BLOCK_COLS, MASKED)
    z, y_tile = similarities(rows, cols, products, block, columns, corner, d, form, MASKED)
    one, other = sums
    w = tl.zeros((form.BLOCK_ROWS, form.BLOCK_COLS), form.ACC)
    if MASKED or reductions[0].SIDE != POSITIVES:
        keep = pairs_of_side(block, columns, corner.col0, reductions[0].SIDE, form.SQUARE, MASKED)
        w, one = tile_grads(
            z, keep, reductions[0], scales[0], shared_tops[0], anchors[0], ref_offsets[0], columns, one, ANCHOR,
            REFERENCE, form.ACC,
        )  # fmt: skip
    if reductions[1].OP != NOTHING and (MASKED or reductions[1].SIDE != POSITIVES):
        keep = pairs_of_side(block, columns, corner.col0, reductions[1].SIDE, form.SQUARE, MASKED)
        w_other, other = tile_grads(
            z, keep, reductions[1], scales[1], shared_tops[1], anchors[1], ref_offsets[1], columns, other, ANCHOR,
            REFERENCE, form.ACC,
        )  # fmt: skip
        w += w_other
    acc, norm_grad = add_weights(
        w, z, y_tile, acc, norm_grad, rows, cols, weights, dx, close_dx, block, taking_part, columns, corner, d, slab,
        form, MASKED,
    )  # fmt: skip
    return (one, other), norm_grad, acc


@triton.jit(do_not_specialize=SIZES)
def backward_rows(
    rows, cols, d, products, weights, listed, gate, nonfinite, dx, close_dx, norm_grad_out,
    row0, row1, col0, col1, n, m, list_stride, scale_a: tl.float64, scale_b: tl.float64, reductions, form,
    ANCHOR: tl.constexpr, REFERENCE: tl.constexpr, POSITIVES_ONLY: tl.constexpr, CARRY: tl.constexpr,
    WANTED: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [row0, row1) through two reductions and their pairs with columns [col0, col1).

    Grid: (row blocks, splits of the columns, slabs of D). The groups are those of operands.py, as for `reduce_rows`,
    with a pair of `BackwardOperands`; rows are anchors (N of them, against M references), references, or both. gate ()
    int8: nothing is done unless it is WANTED. nonfinite (): 0 or NaN, added to all.

    Leaves dx (splits, rows, D); or, of given products, `weights`, a `Matrix`. norm_grad_out (rows,): what the rows
    themselves are to be multiplied by and added to dx, of Euclidean distances. What close pairs give is added up in
    close_dx (rows, D), or in dx itself, which then begins as 0.
    """
    if gate is not None:
        if tl.load(gate) != WANTED:
            return
    # Which rows, and which of their tiles.
    split, slab = tl.program_id(1), tl.program_id(2)
    row_block = tl.program_id(0)
    index = row0 + row_block * form.BLOCK_ROWS + tl.arange(0, form.BLOCK_ROWS)
    inside = index < row1
    pos_begin, pos_end, begin, end = load_positives(rows.pos_begin, rows.pos_end, index, inside, col0)
    num_cols = count_columns(cols.num_valid, col0, col1)
    visit = split_tiles(begin, end, num_cols, split, tl.num_programs(1), form.BLOCK_COLS, POSITIVES_ONLY)
    first_clean, num_clean = visit.first_clean, visit.num_clean
    if listed.index is not None:
        first_clean, num_clean = split_list(listed.counts, row_block, split, tl.num_programs(1))

    # What is loaded once for all of them.
    x_tile = 0
    if products.data is None and form.ONE_CHUNK:
        x_tile = load_rows(rows.x, index, inside, d, 0, form.BLOCK_K, form.EVEN_D, True)
    squares = load_vector(rows.squares, index, inside, 0.0, form.ACC)
    block, corner = RowBlock(index, inside, pos_begin, pos_end, squares, x_tile), Corner(row0, col0, num_cols)
    taking_part = inside
    if rows.num_valid is not None:
        taking_part = inside & (index < tl.load(rows.num_valid))
    if (close_dx is not None) & (dx is not None):
        close_dx += split.to(tl.int64) * row1 * d
    scales = (
        load_scalar(scale_a, reductions[0].scale, form.ACC), load_scalar(scale_b, reductions[1].scale, form.ACC),
    )  # fmt: skip
    shared_tops = (
        load_scalar(0.0, reductions[0].shared_top, form.ACC), load_scalar(0.0, reductions[1].shared_top, form.ACC),
    )  # fmt: skip
    if ANCHOR:
        anchors = (
            load_anchors(reductions[0], index, inside, form.ACC), load_anchors(reductions[1], index, inside, form.ACC),
        )  # fmt: skip
    else:
        anchors = (no_anchors(form.BLOCK_ROWS, form.ACC), no_anchors(form.BLOCK_ROWS, form.ACC))
    ref_offset_a, ref_offset_b = tl.zeros((form.BLOCK_ROWS,), form.ACC), tl.zeros((form.BLOCK_ROWS,), form.ACC)
    if REFERENCE:
        ref_offset_a = load_vector(reductions[0].ref_offset, index, inside, 0.0, form.ACC)
        ref_offset_b = load_vector(reductions[1].ref_offset, index, inside, 0.0, form.ACC)
    ref_offsets = (ref_offset_a, ref_offset_b)

    sums = (no_sums(form.BLOCK_ROWS, form.ACC), no_sums(form.BLOCK_ROWS, form.ACC))
    norm_grad, acc = tl.zeros((form.BLOCK_ROWS,), form.ACC), tl.zeros((form.BLOCK_ROWS, form.BLOCK_D), form.ACC)
    for k in tl.range(0, visit.num_masked + visit.num_tail, num_stages=1):
        tile = tl.where(k < visit.num_masked, visit.first_masked + k, visit.tail_tile)
        sums, norm_grad, acc = backward_tile(
            tile, rows, cols, d, products, weights, dx, close_dx, block, taking_part, corner, slab, reductions, scales,
            shared_tops, anchors, ref_offsets, sums, norm_grad, acc, form, ANCHOR, REFERENCE, True,
        )  # fmt: skip
    if not POSITIVES_ONLY:
        for k in range(0, num_clean):
            tile = clean_tile(first_clean + k, visit, listed, row_block, list_stride)
            sums, norm_grad, acc = backward_tile(
                tile, rows, cols, d, products, weights, dx, close_dx, block, taking_part, corner, slab, reductions,
                scales, shared_tops, anchors, ref_offsets, sums, norm_grad, acc, form, ANCHOR, REFERENCE, False,
            )  # fmt: skip

    nan = tl.load(nonfinite)
    if slab == 0:
        at, ref_at = split.to(tl.int64) * n + index, split.to(tl.int64) * m + index
        store_sums(reductions[0], at, ref_at, inside, taking_part, nan, sums[0], CARRY)
        store_sums(reductions[1], at, ref_at, inside, taking_part, nan, sums[1], CARRY)
    if norm_grad_out is not None:
        if CARRY:
            norm_grad += tl.load(norm_grad_out + index, mask=inside, other=0.0)
        norm_grad = tl.where(taking_part, norm_grad, 0.0)
        tl.store(norm_grad_out + index, norm_grad, mask=inside)
    if dx is not None:
        start = slab * form.BLOCK_D
        column = start + tl.arange(0, form.BLOCK_D)
        if cols.squares is not None:
            # Anew, by way of a 0 that the compiler cannot see: kept over the loops, rows took registers that spilled.
            index = row0 + (row_block + tl.minimum(num_clean, 0)) * form.BLOCK_ROWS + tl.arange(0, form.BLOCK_ROWS)
            inside = index < row1
            x_rows = load_rows(rows.x, index, inside, d, start, form.BLOCK_D, form.EVEN_SLAB, True)
            acc += norm_grad[:, None] * x_rows.to(acc.dtype)
            tl.debug_barrier()  # what other threads have left of close pairs
            acc += load_rows(close_dx, index, inside, d, start, form.BLOCK_D, form.EVEN_SLAB, True)
        at = (split.to(tl.int64) * row1 + index)[:, None] * d + column[None, :]
        acc = tl.where(taking_part[:, None], acc, 0.0) + nan
        tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside[:, None] & (column[None, :] < d))
