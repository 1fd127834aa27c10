"""What the forward and backward passes of `tiled` share: the problem, its reductions, tiles and addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..pool import scratch
from ..reduction import OPS, SIDES
from ..tiling import Tile, band, grid

LOGSUMEXP, SUM, MIN, MAX, COUNT = range(len(OPS))
POSITIVES = SIDES.index("positives")
WIDE_BAND = 4  # positives of over 1 / 4 of all pairs go over the grid's tiles instead of the band's
INLINE_WORK = 2**25  # multiply-adds of a product under which waking threads costs more than it saves


class Problem(NamedTuple):
    """Sorted embeddings x (N, D), y (M, D) or None for x itself, intervals lo, hi (N,), and the caller's order (M,)."""

    x: Tensor
    y: Tensor | None
    lo: Tensor
    hi: Tensor
    end: Tensor | None
    order: Tensor
    distance: str

    @property
    def refs(self) -> Tensor:
        return self.x if self.y is None else self.y


@dataclass(frozen=True)
class Term:
    """One reduction as the kernels take it: codes, and vectors in sorted order."""

    op: int
    side: int
    transform: int
    detach: bool
    scale: float = 1.0
    offset: Tensor | None = None
    ref_offset: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None

    @property
    def window(self) -> bool:
        return self.lower is not None or self.upper is not None

    @property
    def weighted(self) -> bool:
        return self.op in (LOGSUMEXP, SUM) and not self.detach


def decode(code: list[int], scale: Tensor | None = None, vectors: list[Tensor | None] | None = None) -> list[Term]:
    """Reductions from the registered op's arguments: four codes and four vectors each."""
    values = [1.0] * (len(code) // 4) if scale is None else scale.tolist()
    vectors = [None] * len(code) if vectors is None else vectors
    return [
        Term(*code[4 * k : 4 * k + 3], bool(code[4 * k + 3]), values[k], *vectors[4 * k : 4 * k + 4])
        for k in range(len(values))
    ]


class Kept(NamedTuple):
    """What forward leaves for backward beside the values; tensors of no elements where there is nothing."""

    index: Tensor  # (K, N) int64: sorted reference of each min and max, -1 without
    live_count: Tensor  # (slots,) int32: pairs listed of each grid tile, -1: too many, or none were to be listed
    live_entry: Tensor  # (slots, capacity) int32
    live_z: Tensor  # (slots, capacity)


def listed_term(code: list[int], windows: list[bool]) -> int | None:
    """The one reduction whose live pairs are listed: alone in needing weights over the grid, behind a window."""
    weighted = [i for i, t in enumerate(decode(code)) if t.weighted and t.side != POSITIVES]
    return weighted[0] if len(weighted) == 1 and windows[weighted[0]] else None


def kept_sizes(n: int, m: int, square: bool, code: list[int], windows: list[bool], keep: bool) -> list[tuple[int, ...]]:
    """The shapes of `Kept`, from what the fake of the registered op knows too."""
    g = grid(n, m, square)
    extremes = keep and any(t.op in (MIN, MAX) and not t.detach for t in decode(code))
    listing = keep and listed_term(code, windows) is not None
    live = (g.slots, g.live_capacity) if listing else (0, 0)
    return [(len(windows) if extremes else 0, n), live[:1], live, live]


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Engine:
    """What forward and backward share: sizes, the choice between grid and band, the products, and addresses."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.x, self.y = problem.x, problem.refs
        self.n, self.d = problem.x.shape
        self.m = self.y.shape[0]
        self.square = problem.y is None
        self.grid = grid(self.n, self.m, self.square)
        self.lo, self.hi = problem.lo.tolist(), problem.hi.tolist()
        self.wide = WIDE_BAND * sum(h - l for l, h in zip(self.lo, self.hi)) > self.n * self.m
        self.end = self.m if problem.end is None else int(problem.end)
        self.squares: tuple[Tensor, Tensor] | None = None
        if problem.distance == "euclidean":
            row_square = (self.x * self.x).sum(1)
            self.squares = row_square, row_square if self.square else (self.y * self.y).sum(1)
        self.pass_type = getattr(extension.require(), "PassDouble" if self.x.dtype == torch.float64 else "PassFloat")

    def over_band(self, term: Term) -> bool:
        return term.side == POSITIVES and not self.wide

    def new_pass(self) -> Any:
        squares = self.squares or (None, None)
        return self.pass_type(
            extension.instruction_set(), self.n, self.m, self.end, self.square,
            address(self.p.lo), address(self.p.hi), address(self.p.order), address(squares[0]), address(squares[1]),
        )  # fmt: skip

    def tiles(self, positives_only: bool) -> Iterable[Tile]:
        for tile in self.grid.tiles():
            first, last = self.lo[tile.r0], self.hi[tile.r0 + tile.rows - 1]
            if not positives_only or (first < tile.c0 + tile.cols and last > tile.c0):
                yield tile

    def band_tiles(self) -> list[Tile]:
        return band(self.lo, self.hi, self.n, self.square, self.grid.size)

    def workers(self) -> int:
        return 1 if self.n * self.m * self.d < INLINE_WORK else torch.get_num_threads()

    def buffer(self, name: str, tile: Tile) -> Tensor:
        size = self.grid.size
        whole = scratch(name, size * size, self.x.dtype)[: size * size].view(size, size)
        return whole[: tile.rows, : tile.cols]

    def similarities(self, tile: Tile) -> tuple[Tensor, int]:
        """The tile's dot products in this thread's buffer, and its row stride."""
        size = self.grid.size
        z = self.buffer("z", tile)
        torch.mm(self.x[tile.r0 : tile.r0 + tile.rows], self.y[tile.c0 : tile.c0 + tile.cols].T, out=z)
        return z, size
