"""The similarities of one tile of pairs: products of the embeddings, or Euclidean distances made of them.

A pair has the same bits from either end, in tiles of any shape, in the forward and the backward pass: a window must not
open for a pair in one place and stay shut in another. So D is always added up in the same order.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .tile import INF, load_vector, vector_max

# |x - y|^2 under this share of |x|^2 + |y|^2 is added up from differences: |x|^2 + |y|^2 - 2 x.y would lose its digits.
CLOSE: tl.constexpr = tl.constexpr(1 / 16)


@triton.jit
def load_rows(x, index, inside, d, start, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr):
    """(R, BLOCK_D): columns start + [0, BLOCK_D) of rows `index` of x (., d); zeros outside of it.

    MASKED: not every row may be there. EVEN_D: every column is.
    """
    column = start + tl.arange(0, BLOCK_D)
    at = x + index.to(tl.int64)[:, None] * d + column[None, :]
    if MASKED and EVEN_D:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=inside[:, None] & (column[None, :] < d), other=0.0)
    elif EVEN_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=column[None, :] < d, other=0.0)


@triton.jit
def matrix_offsets(matrix, block, columns, corner):
    """(R, C): where the pairs of a tile stand in a matrix that begins at the launch's corner."""
    row = (block.index - corner.row0).to(tl.int64)[:, None] * matrix.row_stride
    return row + (columns.index - corner.col0).to(tl.int64)[None, :] * matrix.col_stride


@triton.jit
def leading_bits(x):
    """float32 rounded to the 11 bits that tf32 holds; the rest, x - leading_bits(x), is exact."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


# numpy's products, which stand in for the tensor cores then, round z_ij by where i and j stand in a tile.
INTERPRETED: tl.constexpr = tl.constexpr(isinstance(leading_bits, InterpretedFunction))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b^T: the same bits for a pair from either end and in tiles of any shape."""
    if INTERPRETED:
        return acc + tl.sum(a.to(acc.dtype)[:, None, :] * b.to(acc.dtype)[None, :, :], 2)
    elif PRECISION == "split":
        # Without a limit the compiler moves the sum that this is part of into the tensor cores' accumulator.
        return acc + tl.dot(a, tl.trans(b), input_precision="tf32", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def add_products(a, b, leading, left, right, PRECISION: tl.constexpr):
    """a b^T (R, C) added to the sum of three accumulators.

    PRECISION "split": float32 in three tf32 products. The two cross terms are kept apart and added last, so that S_ij
    and S_ji have the same bits. Chunks are added outside of the tensor cores, which do not round their sums to nearest.
    """
    if PRECISION == "split":
        a1, b1 = leading_bits(a), leading_bits(b)
        leading = product(a1, b1, leading, PRECISION)
        left = product(a - a1, b1, left, PRECISION)
        right = product(a1, b - b1, right, PRECISION)
    else:
        leading = product(a, b, leading, PRECISION)
    return leading, left, right


@triton.jit
def similarities(rows, cols, products, block, columns, corner, d, form, MASKED: tl.constexpr):
    """(R, C): z of a tile, and the columns' embeddings (C, BLOCK_K) if that holds all of D at once.

    From embeddings, or from their products if there are any. MASKED: not every column may be valid.
    """
    y_tile = 0
    if products.data is not None:
        at = matrix_offsets(products, block, columns, corner)
        z = tl.load(products.data + at, mask=block.inside[:, None] & columns.valid[None, :], other=0.0)
    else:
        z = tl.zeros((form.BLOCK_ROWS, form.BLOCK_COLS), form.ACC)
        left, right = z, z
        if form.ONE_CHUNK:
            y_tile = load_rows(cols.y, columns.index, columns.valid, d, 0, form.BLOCK_K, form.EVEN_D, MASKED)
            z, left, right = add_products(block.x_tile, y_tile, z, left, right, form.PRECISION)
        else:
            for start in range(0, d, form.BLOCK_K):
                a = load_rows(rows.x, block.index, block.inside, d, start, form.BLOCK_K, form.EVEN_D, True)
                b = load_rows(cols.y, columns.index, columns.valid, d, start, form.BLOCK_K, form.EVEN_D, MASKED)
                z, left, right = add_products(a, b, z, left, right, form.PRECISION)
        if form.PRECISION == "split":
            z += left + right
    if cols.squares is not None:
        z = distances(z, rows, cols, block, columns, d, form)
    return z, y_tile


@triton.jit
def distances(products, rows, cols, block, columns, d, form):
    """(R, C): Euclidean distances, or their squares, of pairs with these products."""
    squares = block.squares[:, None] + load_vector(cols.squares, columns.index, columns.valid, 0.0, form.ACC)[None, :]
    d2 = squares - 2.0 * products
    # Close pairs, and those whose squares overflow, are taken again from differences, if a tile has any.
    close = (d2 <= CLOSE * squares) | (d2 != d2) | (squares == INF)
    close = close & block.inside[:, None] & columns.valid[None, :]
    if form.SQUARE:
        self = block.index[:, None] == columns.index[None, :]
        d2, close = tl.where(self, 0.0, d2), close & (self == 0)
    if vector_max(tl.max(close.to(tl.int32), 1)) > 0:
        d2 = tl.where(close, squared_differences(rows.x, cols.y, block, columns, d, form.ACC), d2)
    return d2 if form.SQUARED else tl.sqrt(d2)


@triton.jit
def squared_differences(x, y, block, columns, d, ACC: tl.constexpr):
    """(R, C): |x_i - y_j|^2 as the sum of squared differences, which loses no digits where rows are close."""
    total = tl.zeros((block.index.shape[0], columns.index.shape[0]), ACC)
    left, right = x + block.index.to(tl.int64) * d, y + columns.index.to(tl.int64) * d
    for k in tl.range(0, d, num_stages=1):
        a = tl.load(left + k, mask=block.inside, other=0.0).to(ACC)
        b = tl.load(right + k, mask=columns.valid, other=0.0).to(ACC)
        difference = a[:, None] - b[None, :]
        total += difference * difference
    return total


@triton.jit
def product_grad(w, z, SQUARED: tl.constexpr):
    """dL/d(x.y) from w = dL/dz of a distance: dD/d(x.y) = -1 / D, and -2 for the square; 0 at 0."""
    some = z > 0.0
    if SQUARED:
        return tl.where(some, -2.0 * w, 0.0)
    else:
        return tl.where(some, -w / tl.where(some, z, 1.0), 0.0)
