"""Which tiles of pairs a program visits, and which pairs of a tile count.

A program owns BLOCK_ROWS sorted rows and visits tiles of BLOCK_COLS sorted columns. Row i and column j are a positive
pair where pos_begin_i <= j < pos_end_i. So the tiles with a positive pair follow each other; these are *masked*, and so
is the *tail*, the last tile where it is not full. All others are *clean*: all of their pairs are negatives, and none
needs a mask.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOGSUMEXP: tl.constexpr = tl.constexpr(0)
SUM: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
MAX: tl.constexpr = tl.constexpr(3)
COUNT: tl.constexpr = tl.constexpr(4)
TRANSFORMED: tl.constexpr = tl.constexpr(5)  # logsumexp of a transform
NOTHING: tl.constexpr = tl.constexpr(-1)  # the second of a launch of one reduction

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


class RowBlock(NamedTuple):
    """A program's rows, (BLOCK_ROWS,) each."""

    index: Any
    inside: Any  # the row is there
    pos_begin: Any  # int32, relative to the launch's first column
    pos_end: Any
    squares: Any  # squared norms, of Euclidean distances
    x_tile: Any  # (BLOCK_ROWS, BLOCK_K): the embeddings, where that is all of D


class ColBlock(NamedTuple):
    """The columns of a tile, (BLOCK_COLS,) each."""

    index: Any
    valid: Any  # the column is there and takes part


class Corner(NamedTuple):
    """Where a launch's pairs begin, and how many columns take part."""

    row0: Any
    col0: Any
    num_cols: Any


class Visit(NamedTuple):
    """Tiles to visit: [first_masked, + num_masked), tail_tile if num_tail is 1, and num_clean clean ones, of which the
    k-th is first_clean + k, behind the masked ones if they come before it."""

    first_masked: Any
    num_masked: Any
    num_tail: Any
    tail_tile: Any
    first_clean: Any
    num_clean: Any


@triton.jit
def load_scalar(value, pointer, ACC: tl.constexpr):
    """A scalar that the host knows, or the one at `pointer` if there is one."""
    return tl.full([], value, ACC) if pointer is None else tl.load(pointer)


@triton.jit
def load_vector(pointer, index, inside, default, ACC: tl.constexpr):
    """Entries `index` of a vector; without one, the default (which the compiler then drops)."""
    if pointer is None:
        return tl.full(index.shape, default, ACC)
    else:
        return tl.load(pointer + index, mask=inside, other=default)


@triton.jit
def vector_max(vector):
    """The largest entry. By way of a matrix: Triton 3.6 fails where a vector made of a Blackwell product is reduced."""
    return tl.reshape(tl.max(vector[:, None], 0), ())


@triton.jit
def nan_unless_finite(value, of):
    """value, NaN where `of` is inf or NaN."""
    return tl.where(of - of == 0.0, value, float("nan"))


@triton.jit
def load_positives(pos_begin, pos_end, index, inside, col0):
    """Each row's interval of positives, relative to column col0, and the smallest interval that holds them all."""
    begin = (tl.load(pos_begin + index, mask=inside, other=0) - col0).to(tl.int32)
    end = (tl.load(pos_end + index, mask=inside, other=0) - col0).to(tl.int32)
    return begin, end, tl.min(tl.where(inside, begin, 2147483647), 0), tl.max(tl.where(inside, end, -2147483648), 0)


@triton.jit
def count_columns(num_valid, col0, col1):
    """How many of the columns [col0, col1) take part."""
    num_cols = col1 - col0
    if num_valid is not None:
        num_cols = tl.maximum(tl.minimum(tl.load(num_valid).to(tl.int32), col1) - col0, 0)
    return num_cols


@triton.jit
def split_tiles(begin, end, num_cols, split, splits, BLOCK_COLS: tl.constexpr, POSITIVES_ONLY: tl.constexpr):
    """The part of one of `splits` programs of the tiles of a row block, whose positives are in [begin, end)."""
    full = num_cols // BLOCK_COLS
    from_tile = tl.minimum(tl.maximum(begin, 0), num_cols) // BLOCK_COLS
    to_tile = tl.cdiv(tl.minimum(tl.maximum(end, 0), num_cols), BLOCK_COLS)
    if POSITIVES_ONLY:
        # The masked tiles are shared among the programs, and the tail is one of them where it has a positive pair.
        share = tl.cdiv(tl.maximum(to_tile - from_tile, 0), splits)
        first_masked = tl.minimum(from_tile + split * share, to_tile)
        num_masked = tl.minimum(to_tile - first_masked, share)
        return Visit(first_masked, num_masked, num_cols * 0, full, first_masked, num_cols * 0)
    else:
        # All tiles are shared: a program's are [first, last), of which [first, stop) are full.
        tiles = tl.cdiv(num_cols, BLOCK_COLS)
        share = tl.cdiv(tiles, splits)
        first = tl.minimum(split * share, tiles)
        last = tl.minimum(first + share, tiles)
        stop = tl.maximum(tl.minimum(last, full), first)
        first_masked = tl.minimum(tl.maximum(from_tile, first), stop)
        num_masked = tl.minimum(tl.maximum(to_tile, first_masked), stop) - first_masked
        return Visit(first_masked, num_masked, last - stop, full, first, stop - first - num_masked)


@triton.jit
def split_list(counts, block, split, splits):
    """The first of a split's clean tiles, and their number, where a list says which they are."""
    count = tl.load(counts + block)
    share = tl.cdiv(count, splits)
    first = tl.minimum(split * share, count)
    return first, tl.minimum(count - first, share)


@triton.jit
def clean_tile(k, visit, listed, block, list_stride):
    """The k-th clean tile of a row block, of those that are listed if there is a list."""
    if listed.index is not None:
        return tl.load(listed.index + block.to(tl.int64) * list_stride + k)
    else:
        return k + tl.where(k >= visit.first_masked, visit.num_masked, 0)


@triton.jit
def tile_columns(tile, corner, BLOCK_COLS: tl.constexpr, MASKED: tl.constexpr):
    index = corner.col0 + tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if MASKED:
        return ColBlock(index, index < corner.col0 + corner.num_cols)
    else:
        return ColBlock(index, tl.full((BLOCK_COLS,), 1, tl.int1))


@triton.jit
def pairs_of_side(block, columns, col0, SIDE: tl.constexpr, SQUARE: tl.constexpr, MASKED: tl.constexpr):
    """(R, C): the pairs of a tile that are on a reduction's side. Of a tile that is not MASKED, all."""
    if MASKED:
        at = columns.index - col0
        keep = columns.valid[None, :] & (block.index[:, None] == block.index[:, None])
        if SQUARE:
            keep = keep & (columns.index[None, :] != block.index[:, None])
        positive = (at[None, :] >= block.pos_begin[:, None]) & (at[None, :] < block.pos_end[:, None])
        if SIDE == POSITIVES:
            keep = keep & positive
        elif SIDE == NEGATIVES:
            keep = keep & (positive == 0)
        return keep
    else:
        return tl.full((block.index.shape[0], columns.index.shape[0]), 1, tl.int1)


@triton.jit
def inside_window(z, keep, lower, upper, reduction):
    """The pairs of `keep` with lower < z < upper, as far as the reduction has these bounds."""
    if reduction.lower is not None:
        keep = keep & (z > lower)
    if reduction.upper is not None:
        keep = keep & (z < upper)
    return keep
