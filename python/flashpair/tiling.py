"""Which tiles of the N x M pairs are visited, in which order, and what each of them touches.

An order is fixed by the shapes alone. Two tiles that touch the same rows' state are worked on in that order whatever
the number of threads, so results have the same bits with one thread and with sixty-four.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

LIVE_PAIRS_PER_ROW = 32  # the memory for pairs that a mining window lets through, in pairs an anchor or reference


class Tile(NamedTuple):
    """Rows r0 + [0, rows) against columns c0 + [0, cols); the first six are csrc/cpu/types.h's Tile."""

    r0: int
    rows: int
    c0: int
    cols: int
    symmetric: bool
    mirror: bool
    row_block: int
    col_block: int
    lane: int


class Grid(NamedTuple):
    """All N x M pairs in blocks of `size`; of a square problem the upper triangle of blocks.

    Lanes are independent copies of the rows' state over disjoint ranges of columns: what keeps many threads busy when
    the anchors are few. Their results are merged in order.
    """

    n: int
    m: int
    square: bool
    size: int
    lanes: int

    @property
    def row_blocks(self) -> int:
        return -(-self.n // self.size)

    @property
    def col_blocks(self) -> int:
        return -(-self.m // self.size)

    def tile(self, i: int, j: int, lane: int = 0) -> Tile:
        r0, c0 = i * self.size, j * self.size
        rows, cols = min(self.size, self.n - r0), min(self.size, self.m - c0)
        return Tile(r0, rows, c0, cols, self.square, self.square and i != j, i, j, lane)

    def tiles(self) -> Iterator[Tile]:
        blocks = self.row_blocks
        if self.square:
            yield from (self.tile(i, i) for i in range(blocks))
            yield from (self.tile(i, j) for i, j in tournament(blocks))
            return
        width = -(-self.col_blocks // self.lanes)
        for step in range(width):
            for lane in range(self.lanes):
                for i in range(blocks):
                    j = lane * width + (step + i) % width
                    if j < self.col_blocks:
                        yield self.tile(i, j, lane)

    @property
    def slots(self) -> int:
        blocks = self.row_blocks
        return blocks * (blocks + 1) // 2 if self.square else blocks * self.col_blocks

    def slot(self, tile: Tile) -> int:
        i, j = tile.row_block, tile.col_block
        return i * self.row_blocks - i * (i - 1) // 2 + j - i if self.square else i * self.col_blocks + j

    @property
    def live_capacity(self) -> int:
        """Live pairs kept of each tile: linear memory in all, whatever the tiles' number."""
        rows = self.n if self.square else self.n + self.m
        return min(LIVE_PAIRS_PER_ROW * rows // max(self.slots, 1), self.size * self.size // 8)


def tournament(blocks: int) -> Iterator[tuple[int, int]]:
    """Every pair i < j once, in rounds in which no block plays twice (the circle method)."""
    players = blocks + blocks % 2
    for turn in range(players - 1):
        for k in range(players // 2):
            a = players - 1 if k == 0 else (turn + k) % (players - 1)
            b = (turn - k) % (players - 1)
            if max(a, b) < blocks:
                yield min(a, b), max(a, b)


def grid(n: int, m: int, square: bool) -> Grid:
    """The tile size and lanes for a shape: tiles stay in a core's second-level cache."""
    size = 512 if n * m > 16384**2 else 256
    row_blocks, col_blocks = -(-n // size), -(-m // size)
    lanes = 1 if square else max(1, min(16 // max(row_blocks, 1), col_blocks // 4))
    return Grid(n, m, square, size, lanes)


BAND_ROWS = 64


def band(lo: list[int], hi: list[int], n: int, square: bool, size: int) -> list[Tile]:
    """The tiles that hold all positives: for each block of sorted rows the columns from its first to its last.

    `lo` and `hi` are the rows' intervals. A tile serves its rows alone: every other tile holds other rows, except that
    one block's columns may be cut into several tiles of at most `size`.
    """
    tiles = []
    for block, r0 in enumerate(range(0, n, BAND_ROWS)):
        rows = min(BAND_ROWS, n - r0)
        first, last = lo[r0], hi[r0 + rows - 1]
        for c0 in range(first, last, size):
            tiles.append(Tile(r0, rows, c0, min(size, last - c0), square, False, block, 0, 0))
    return tiles
