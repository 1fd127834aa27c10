"""The int8 screen: which pairs a mining window may let through, proved from quantised rows.

    x_i = s_i q_i + r_i,   e_i >= |r_i|,   N_i >= max(|x_i|, |s_i q_i|)
    |x_i.y_j - s_i s_j q_i.q_j| = |s_i q_i.r_j + r_i.y_j| <= N_i e_j + e_i N_j      (Cauchy-Schwarz)

A pair is ruled out where the estimate, moved by that bound, is still outside of the window; NaN and inf never are.
Every rounding is part of e: a sum of D products in float32, in any order, errs by at most D 2^-24 |x||y| to first
order, the estimate and the comparison by a few units of 2^-24 of |x||y| and of the bound itself, and e takes in
(D + 64) 2^-23 N, which gives each pair (D + 64) 2^-22 N_i N_j. Sums that make e and N err by a share of D 2^-24, and
are widened by more. What underflows is under TINY in e and N, or under the 1e-28 that windows are widened by.
Euclidean distances: z < u where h = x.y - |x|^2 / 2 - |y|^2 / 2 > -u^2 / 2. 64 2^-24 (|x|^2 + |y|^2) / 2 more cover
their roundings, and those that count as 0.

Never stored: estimates, masks.
Leaves: candidates in the list of the program that found them, in order. A tile with too many, or for which the list has
no room, is marked as dense and left to the kernels of all pairs.
Deterministic: no atomics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import INF, SIZES, nan_unless_finite

TINY: tl.constexpr = tl.constexpr(1e-36)
ULP: tl.constexpr = tl.constexpr(2.0**-23)
WORD: tl.constexpr = tl.constexpr(32)


class Quantised(NamedTuple):
    """Rows as int8, and what bounds their rounding."""

    q: Any  # (N, width) int8: zeros from D on
    step: Any  # (N,) float32: s
    error: Any  # (N,) float32: e
    norm: Any  # (N,) float32: N
    half: Any = None  # (N,) float32: |x|^2 / 2, for Euclidean distances


class Window(NamedTuple):
    """Outside of which a pair of row i does not count, (N,) float32, moved outward; None where there is no such side.

    BEST: 1 where only the highest h of the window is wanted, -1 the lowest, 0 all.
    """

    lower: Any = None
    upper: Any = None
    BEST: Any = tl.constexpr(0)


@triton.jit(do_not_specialize=SIZES)
def quantise(
    x, q, step, error, norm, n, d, width, ROWS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of x (N, D) as `Quantised`. Grid: (blocks of ROWS). Squares are of numbers around 1: none is lost."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    source = x + rows.to(tl.int64)[:, None] * d
    target = q + rows.to(tl.int64)[:, None] * width
    # The step: a row's largest entry is 127 of them.
    largest = tl.zeros((ROWS,), ACC)
    for start in range(0, d, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        part = tl.load(source + column, mask=inside[:, None] & (column < d), other=0.0).to(ACC)
        largest = tl.maximum(largest, tl.max(tl.abs(part), 1))
    unit = tl.maximum(largest, 1e-30)
    s = tl.where(largest > 1e-30, unit / 127.0, 0.0).to(tl.float32)
    some = s > 0.0
    wide = s.to(ACC)
    inverse = tl.where(some, 1.0 / tl.where(some, wide, 1.0), 0.0)
    # The int8 entries, and the squared norms of the row, of what rounding leaves of it (both over `unit`), and of q.
    # By column first, as in rows.py.
    row_squares = tl.zeros((ROWS, STEP), ACC)
    rest_squares, q_squares = row_squares, row_squares
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        part = tl.load(source + column, mask=inside[:, None] & (column < d), other=0.0).to(ACC)
        rounded = tl.floor(part * inverse[:, None] + 0.5)
        rounded = tl.where(rounded == rounded, tl.minimum(tl.maximum(rounded, -127.0), 127.0), 0.0)
        rest = (part - rounded * wide[:, None]) / unit[:, None]
        part = part / unit[:, None]
        row_squares += part * part
        rest_squares += rest * rest
        q_squares += rounded * rounded
        tl.store(target + column, rounded.to(tl.int32).to(tl.int8), mask=inside[:, None] & (column < width))
    row_square, rest_square, q_square = tl.sum(row_squares, 1), tl.sum(rest_squares, 1), tl.sum(q_squares, 1)
    # e and N, moved up by what their own sums may have lost.
    widened = 1.0 + 1.0 / 1024 + d * ULP
    bound = tl.maximum(unit * tl.sqrt(row_square), wide * tl.sqrt(q_square)) * widened + TINY
    rounding = unit * tl.sqrt(rest_square) * widened + (d + 64) * ULP * bound + TINY
    rounding = nan_unless_finite(rounding, row_square)  # a maximum may drop a NaN
    tl.store(step + rows, s, mask=inside)
    tl.store(error + rows, rounding.to(tl.float32), mask=inside)
    tl.store(norm + rows, bound.to(tl.float32), mask=inside)


@triton.jit
def count_bits(word):
    """The number of bits that are set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def may_count(low, high, window, lower, upper, best, masked):
    """(R, C): the pairs with low <= h <= high that may count for their row, and the best h proved in a row so far.

    lower, upper: the window's, of the rows. masked: not all pairs of the tile count, so that none proves anything.
    """
    out = tl.zeros((low.shape[0], low.shape[1]), tl.int1)
    if window.BEST != 0:
        # Pairs that are surely inside of the window raise what the others have to reach.
        sure = (low == low) & (masked == 0)
        if window.lower is not None:
            sure = sure & (low > (lower + tl.abs(lower) * (8 * ULP) + 4e-28)[:, None])
        if window.upper is not None:
            sure = sure & (high < (upper - tl.abs(upper) * (8 * ULP) - 4e-28)[:, None])
        if window.BEST == 1:
            best = tl.maximum(best, tl.max(tl.where(sure, low, -INF), 1))
            out = high < best[:, None]
        else:
            best = tl.minimum(best, tl.min(tl.where(sure, high, INF), 1))
            out = low > best[:, None]
    if window.lower is not None:
        out = out | (high <= lower[:, None])
    if window.upper is not None:
        out = out | (low >= upper[:, None])
    return out == 0, best


@triton.jit
def load_window(window, rows):
    lower, upper = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    if window.lower is not None:
        lower = tl.load(window.lower + rows)
    if window.upper is not None:
        upper = tl.load(window.upper + rows)
    return lower, upper


@triton.jit(do_not_specialize=SIZES)
def screen(
    x, y, windows, dense, found, num_valid, m, width, dense_stride, room, most,
    TWO: tl.constexpr, ONE_CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lists the pairs of whole blocks of rows and columns that the first or (TWO) the second window may let through.

    Grid: (whole row blocks, splits of the columns). x, y: `Quantised`; windows: a pair of `Window`. dense (row blocks,
    column blocks) int8: 1 on entry where a block is not to be listed, and on return where a tile had over `most`, or no
    room; what its other tiles have listed is to be dropped. found (row blocks, splits, room) int64: row << 32 | column
    of each candidate, from the front.
    """
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_cols = m
    if num_valid is not None:
        num_cols = tl.minimum(tl.load(num_valid).to(tl.int32), m)
    blocks = num_cols // BLOCK
    share = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.minimum(split * share, blocks)
    last = tl.minimum(first + share, blocks)

    # What is loaded of the rows.
    chunk = tl.arange(0, BLOCK_K)
    x_at = x.q + rows.to(tl.int64)[:, None] * width + chunk[None, :]
    x_tile = 0
    if ONE_CHUNK:
        x_tile = tl.load(x_at)
    step, error, norm = tl.load(x.step + rows), tl.load(x.error + rows), tl.load(x.norm + rows)
    half = 0.0
    if x.half is not None:
        half = tl.load(x.half + rows)
    lower_a, upper_a = load_window(windows[0], rows)
    lower_b, upper_b = load_window(windows[1], rows)
    best_a = tl.full((BLOCK,), -INF if windows[0].BEST == 1 else INF, tl.float32)
    best_b = tl.full((BLOCK,), -INF if windows[1].BEST == 1 else INF, tl.float32)

    tiles_a_block: tl.constexpr = BLOCK // BLOCK_COLS
    words: tl.constexpr = BLOCK_COLS // WORD
    place = tl.arange(0, BLOCK * words)
    key = (tl.program_id(0) * BLOCK + place // words).to(tl.int64) << 32
    base = found + (block * tl.num_programs(1) + split) * room
    listed, masked = room * 0, room * 0
    for tile in range(first * tiles_a_block, last * tiles_a_block):
        # The estimate of each pair, and its bound.
        cols = tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        y_at = y.q + cols.to(tl.int64)[:, None] * width + chunk[None, :]
        product = tl.zeros((BLOCK, BLOCK_COLS), tl.int32)
        if ONE_CHUNK:
            product = tl.dot(x_tile, tl.trans(tl.load(y_at)), product, out_dtype=tl.int32)
        else:
            for start in range(0, width, BLOCK_K):
                left, right = tl.load(x_at + start), tl.load(y_at + start)
                product = tl.dot(left, tl.trans(right), product, out_dtype=tl.int32)
        col_step, col_error, col_norm = tl.load(y.step + cols), tl.load(y.error + cols), tl.load(y.norm + cols)
        known = tl.load(dense + block * dense_stride + tile // tiles_a_block).to(tl.int32)
        masked = tl.where(tile % tiles_a_block == 0, known, masked)
        h = product.to(tl.float32) * (step[:, None] * col_step[None, :])
        bound = norm[:, None] * col_error[None, :] + error[:, None] * col_norm[None, :]
        if x.half is not None:
            squares = half[:, None] + tl.load(y.half + cols)[None, :]
            h -= squares
            bound += squares * (32 * ULP)
        low, high = h - bound, h + bound
        alive, best_a = may_count(low, high, windows[0], lower_a, upper_a, best_a, masked)
        if TWO:
            also, best_b = may_count(low, high, windows[1], lower_b, upper_b, best_b, masked)
            alive = alive | also
        # As 32 bits a word: what follows is of a thirty-second of the tile.
        bits = tl.reshape(alive.to(tl.int32), (BLOCK, words, WORD)) << tl.arange(0, WORD)[None, None, :]
        word = tl.reshape(tl.sum(bits, 2), (BLOCK * words,)).to(tl.uint32, bitcast=True)
        each = count_bits(word)
        count = tl.where(masked == 0, tl.sum(each, 0), 0)
        if count > 0:
            if (count <= most) & (listed + count <= room):
                # Each word writes its lowest bit's column, behind all those of the words before it, and drops the bit.
                at = base + listed + tl.cumsum(each, 0) - each
                first_column = tile * BLOCK_COLS + (place % words) * WORD
                for _ in range(0, tl.max(each, 0)):
                    others = word & (word - 1)
                    column = first_column + count_bits((word ^ others) - 1)
                    tl.store(at, key | column.to(tl.int64), mask=word != 0)
                    at += 1
                    word = others
                listed += count
            else:
                masked = masked * 0 + 1
                tl.store(dense + block * dense_stride + tile // tiles_a_block, 1)
