"""What every kernel does with one tile of pairs: which tiles, their similarities, who belongs to whom.

A program owns BLOCK_ROWS sorted rows and walks over tiles of BLOCK_COLS sorted columns. Rows i and columns j are a
positive pair where low_i <= j < high_i, so the tiles that need a mask are a band (and the last, ragged one); all others
hold negatives only, and are visited without one.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

LOGSUMEXP: tl.constexpr = tl.constexpr(0)
SUM: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
MAX: tl.constexpr = tl.constexpr(3)
COUNT: tl.constexpr = tl.constexpr(4)
MAPPED: tl.constexpr = tl.constexpr(5)  # logsumexp of a transform
NOTHING: tl.constexpr = tl.constexpr(-1)  # the second slot of a launch of one reduction

POSITIVES: tl.constexpr = tl.constexpr(0)
NEGATIVES: tl.constexpr = tl.constexpr(1)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
INF: tl.constexpr = tl.constexpr(float("inf"))

# Arguments that grow with the batch, for `triton.jit(do_not_specialize=SIZES)`: a kernel compiled for one N serves all.
# Where blocks begin (row0, col0), d and the strides of products stay special: 0, or multiples of 16 nearly always, they
# are what wide loads are proved from.
SIZES = (
    "row1", "col1", "n", "m", "rows", "cols", "live_rows", "live_stride", "list_stride", "planes", "splits", "count",
    "dense_stride", "room", "most",
)  # fmt: skip

# |x - y|^2 under this share of |x|^2 + |y|^2 is added up from differences: |x|^2 + |y|^2 - 2 x.y would lose its digits.
NEAR: tl.constexpr = tl.constexpr(1 / 16)
NEAR_GRADIENT: tl.constexpr = tl.constexpr(1 / 256)  # of the gradient, whose terms lose the square root of it


@triton.jit
def number(value, learned, ACC: tl.constexpr):
    """A scalar that the host knows, or one that lives on the device."""
    return tl.full([], value, ACC) if learned is None else tl.load(learned)


@triton.jit
def direction(scale):
    """1, or -1 where a negative scale makes the lowest z the largest term."""
    return tl.where(scale < 0.0, -1.0, 1.0).to(scale.dtype)


@triton.jit
def largest(vector):
    """The largest entry. By way of a matrix: Triton 3.6 fails where a vector made of a Blackwell product is reduced."""
    return tl.reshape(tl.max(vector[:, None], 0), ())


@triton.jit
def row_vector(pointer, index, inside, default, ACC: tl.constexpr):
    """Entries `index` of a vector; without one, the default (which the compiler then drops)."""
    if pointer is None:
        return tl.full(index.shape, default, ACC)
    else:
        return tl.load(pointer + index, mask=inside, other=default)


@triton.jit
def intervals(lo, hi, rows, inside, col0):
    """Each row's interval of positives, relative to column col0, and the smallest one that holds them all."""
    low = (tl.load(lo + rows, mask=inside, other=0) - col0).to(tl.int32)
    high = (tl.load(hi + rows, mask=inside, other=0) - col0).to(tl.int32)
    return low, high, tl.min(tl.where(inside, low, 2147483647), 0), tl.max(tl.where(inside, high, -2147483648), 0)


@triton.jit
def span(lowest, highest, limit, split, splits, BLOCK_COLS: tl.constexpr, BAND_ONLY: tl.constexpr):
    """The tiles of one split of a row block over columns [0, limit).

    Masked: band + [0, in_band), then tile `whole` if `ragged` is 1. Clean: first + [0, clean), skipping the band.
    """
    whole = limit // BLOCK_COLS
    from_tile = tl.minimum(tl.maximum(lowest, 0), limit) // BLOCK_COLS
    to_tile = tl.cdiv(tl.minimum(tl.maximum(highest, 0), limit), BLOCK_COLS)
    if BAND_ONLY:
        share = tl.cdiv(tl.maximum(to_tile - from_tile, 0), splits)
        band = tl.minimum(from_tile + split * share, to_tile)
        in_band = tl.minimum(to_tile - band, share)
        return band, in_band, limit * 0, whole, band, limit * 0
    else:
        tiles = tl.cdiv(limit, BLOCK_COLS)
        share = tl.cdiv(tiles, splits)
        first = tl.minimum(split * share, tiles)
        last = tl.minimum(first + share, tiles)
        stop = tl.maximum(tl.minimum(last, whole), first)
        band = tl.minimum(tl.maximum(from_tile, first), stop)
        in_band = tl.minimum(tl.maximum(to_tile, band), stop) - band
        return band, in_band, last - stop, whole, first, stop - first - in_band


@triton.jit
def share_of(counts, block, split, splits):
    """The first of a split's clean tiles, and their number, where a list says which they are."""
    count = tl.load(counts + block)
    share = tl.cdiv(count, splits)
    first = tl.minimum(split * share, count)
    return first, tl.minimum(count - first, share)


@triton.jit
def clean_tile(k, band, in_band, listed, block, list_stride):
    """The k-th clean tile of a row block, of those that are `listed` if there is a list."""
    if listed is not None:
        return tl.load(listed + block.to(tl.int64) * list_stride + k)
    else:
        return k + tl.where(k >= band, in_band, 0)


@triton.jit
def load_rows(x, index, inside, d, start, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, WHOLE: tl.constexpr):
    """(R, BLOCK_D): columns start + [0, BLOCK_D) of rows `index` of x (., d); zeros outside of it."""
    column = start + tl.arange(0, BLOCK_D)
    at = x + index.to(tl.int64)[:, None] * d + column[None, :]
    if WHOLE and EVEN_D:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=column[None, :] < d, other=0.0)
    elif EVEN_D:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (column[None, :] < d), other=0.0)


@triton.jit
def leading_bits(x):
    """float32 rounded to the 11 bits that tf32 holds; the rest, x - leading_bits(x), is exact."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


# numpy's products, which stand in for the tensor cores then, round z_ij by where i and j stand in a tile.
INTERPRETED: tl.constexpr = tl.constexpr(isinstance(direction, InterpretedFunction))


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
def add_products(a, b, whole, left, right, PRECISION: tl.constexpr):
    """a b^T (R, C) added to the sum of three accumulators.

    PRECISION "split": float32 in three tf32 products. The two cross terms are kept apart and added last, so that S_ij
    and S_ji have the same bits: a window must not open for a pair seen from one end and stay shut from the other.
    Chunks are added outside of the tensor cores, which do not round their sums to nearest.
    """
    if PRECISION == "split":
        a1, b1 = leading_bits(a), leading_bits(b)
        whole = product(a1, b1, whole, PRECISION)
        left = product(a - a1, b1, left, PRECISION)
        right = product(a1, b - b1, right, PRECISION)
    else:
        whole = product(a, b, whole, PRECISION)
    return whole, left, right


@triton.jit
def similarities(
    x, x_tile, row_squares, y, col_squares, given, given_row, given_col, rows, inside, cols, valid, row0, col0, d,
    SQUARE: tl.constexpr, SQUARED: tl.constexpr, ONE_CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(R, C): z of `rows` and `cols`, and the columns' embeddings (C, BLOCK_K) if that holds all of D at once.

    From embeddings, or from `given` products (the block that begins at row0, col0). WHOLE: all columns are valid.
    """
    y_tile = 0
    if given is not None:
        at = (rows - row0).to(tl.int64)[:, None] * given_row + (cols - col0).to(tl.int64)[None, :] * given_col
        z = tl.load(given + at, mask=inside[:, None] & valid[None, :], other=0.0)
    else:
        z = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
        left, right = z, z
        if ONE_CHUNK:
            y_tile = load_rows(y, cols, valid, d, 0, BLOCK_K, EVEN_D, WHOLE)
            z, left, right = add_products(x_tile, y_tile, z, left, right, PRECISION)
        else:
            for start in range(0, d, BLOCK_K):
                a = load_rows(x, rows, inside, d, start, BLOCK_K, EVEN_D, False)
                b = load_rows(y, cols, valid, d, start, BLOCK_K, EVEN_D, WHOLE)
                z, left, right = add_products(a, b, z, left, right, PRECISION)
        if PRECISION == "split":
            z += left + right
    if col_squares is not None:
        squares = row_squares[:, None] + row_vector(col_squares, cols, valid, 0.0, ACC)[None, :]
        d2 = squares - 2.0 * z
        # Squares that overflow are among the near ones.
        near = (d2 <= NEAR * squares) | (d2 != d2) | (squares == INF)
        near = near & inside[:, None] & valid[None, :]
        if SQUARE:
            self = rows[:, None] == cols[None, :]
            d2, near = tl.where(self, 0.0, d2), near & (self == 0)
        if largest(tl.max(near.to(tl.int32), 1)) > 0:
            d2 = tl.where(near, apart(x, y, rows, inside, cols, valid, d, ACC), d2)
        z = d2 if SQUARED else tl.sqrt(d2)
    return z, y_tile


@triton.jit
def apart(x, y, rows, inside, cols, valid, d, ACC: tl.constexpr):
    """(R, C): |x_i - y_j|^2 as the sum of squared differences, which loses no digits where rows are close."""
    total = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    left, right = x + rows.to(tl.int64) * d, y + cols.to(tl.int64) * d
    for k in tl.range(0, d, num_stages=1):
        a = tl.load(left + k, mask=inside, other=0.0).to(ACC)
        b = tl.load(right + k, mask=valid, other=0.0).to(ACC)
        difference = a[:, None] - b[None, :]
        total += difference * difference
    return total


@triton.jit
def through_distance(w, z, SQUARED: tl.constexpr):
    """dL/dS from w = dL/dz: dD/dS = -1 / D, and -2 for the square; 0 at 0."""
    some = z > 0.0
    if SQUARED:
        return tl.where(some, -2.0 * w, 0.0)
    else:
        return tl.where(some, -w / tl.where(some, z, 1.0), 0.0)


@triton.jit
def members(rows, cols, valid, low, high, col0, SIDE: tl.constexpr, SQUARE: tl.constexpr, MASKED: tl.constexpr):
    """(R, C): the pairs of that side. Tiles that are not MASKED hold valid negatives only."""
    if MASKED:
        at = cols - col0
        keep = valid[None, :] & (rows[:, None] == rows[:, None])
        if SQUARE:
            keep = keep & (cols[None, :] != rows[:, None])
        positive = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        if SIDE == POSITIVES:
            keep = keep & positive
        elif SIDE == NEGATIVES:
            keep = keep & (positive == 0)
        return keep
    else:
        return tl.full((rows.shape[0], cols.shape[0]), 1, tl.int1)


@triton.jit
def inside_window(z, keep, lower, upper, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr):
    if HAS_LOWER:
        keep = keep & (z > lower)
    if HAS_UPPER:
        keep = keep & (z < upper)
    return keep
