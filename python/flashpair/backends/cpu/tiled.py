"""`tiled` on the CPU: products of a tile that stays in cache, one fused C++ epilogue over it, in parallel.

Computes: the row reductions of an N x M problem, or of two groups of anchors with each other, and their gradients;
csrc/cpu/tile/pass.h is the loop over tiles.
Never materialises: more than one tile of similarities and one of weights a thread.
Keeps for backward: the row values; of a tile in which a mining window leaves few pairs, those pairs, so that backward
need not visit it (`live_capacity` bounds them to a fixed number a row).
Deterministic: same inputs, same bits, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import expression
from ...core.problem import (
    POSITIVES,
    Gradients,
    Like,
    Operands,
    Problem,
    Results,
    SmallBatch,
    Terms,
    address,
    num_rows,
    tops,
)
from ...core.reduction import BUILT_IN, TRANSFORMS
from ...core.transforms import custom
from .. import extension

LIVE_PAIRS_PER_ROW = 32
SCREENED_PAIRS_PER_ROW = 512  # 16 (csrc/cpu/tile/pass.h) times as many; 4 KB of float32 a row, touched as far as used
MOST_LISTED = 2**20  # pairs that are listed at a time of a matrix that has all
INLINE_WORK = 2**25  # multiply-adds of a product under which waking threads costs more than it saves


class Grid(NamedTuple):
    """Tiles of `size` rows and columns; `lanes` copies of the rows' state over ranges of columns (tile/tiles.h)."""

    size: int
    lanes: int
    slots: int
    live_capacity: int


def grid(n: int, m: int, square: bool, live_per_row: int = LIVE_PAIRS_PER_ROW, split: int = 0) -> Grid:
    """How N x M pairs are cut, or those of two groups (Problem's split): into tiles that stay in a core's second-level
    cache."""
    pairs = 2 * split * (n - split) if split else n * m
    size = 512 if pairs > 16384**2 else 256 if pairs > 1024**2 else 128
    rows, cols = -(-(split or n) // size), -(-(m - split) // size)
    lanes = 1 if square else max(1, min(16 // max(rows, 1), cols // 4))
    slots = rows * (rows + 1) // 2 if square and not split else rows * cols
    capacity = live_per_row * (n if square else n + m) // max(slots, 1)
    return Grid(size, lanes, slots, min(capacity, size * size // 8))


def _arguments(terms: Terms, operands: Operands) -> list[tuple[tuple[Any, ...], Any]]:
    """Each reduction as the C++ pass takes it; the caller holds the vectors' memory."""
    values = operands.scales if operands.scale is None else operands.scale.tolist()
    arguments = []
    for t, value in zip(terms, values, strict=True):
        offset, ref_offset, lower, upper = (address(operands.vector(slot)) for slot in t.slots)
        of = t.op, t.side, t.transform, value, offset, ref_offset, lower, upper, *t[4:9]
        arguments.append((of, _program(TRANSFORMS[t.transform])))
    return arguments


def _program(name: str) -> Any:
    """The steps of a user's transform as the C++ kernels take them, made once; None for a built-in transform."""
    if name in BUILT_IN:
        return None
    transform = custom(name)
    if "cpu" not in transform.compiled:
        p = transform.program
        assert not isinstance(p, str)
        listed = [(expression.OPS.index(s.op), s.a, s.b, s.c, s.constant) for s in p.steps]
        transform.compiled["cpu"] = extension.require().Program(listed, p.value, p.slope, p.d_offset)
    return transform.compiled["cpu"]


class Kept(NamedTuple):
    """What forward leaves for backward beside the values; tensors of no elements where there is nothing."""

    extreme: Tensor  # (K, N) int64: sorted reference of each min and max, -1 without
    live_count: Tensor  # (slots,) int32: pairs listed of each tile; -1: too many, or none were to be listed
    live_entry: Tensor  # (slots, capacity) int32
    live_z: Tensor  # (slots, capacity)

    def trimmed(self, most: int) -> Kept:
        """With lists as long as the longest of up to `most` pairs a tile; tiles of more are visited whole again."""
        count = self.live_count.masked_fill(self.live_count > most, -1)
        longest = max(0, int(count.max())) if count.numel() else 0
        return Kept(self.extreme, count, self.live_entry[:, :longest].clone(), self.live_z[:, :longest].clone())

    def lists(self) -> tuple[int, int, int, int]:
        if not self.live_count.numel():
            return 0, 0, 0, 0
        return (
            address(self.live_count),
            address(self.live_entry),
            address(self.live_z),
            self.live_entry.shape[1],
        )


def _weighted(terms: Terms) -> list[int]:
    """The reductions that give weights to pairs off the positives' band."""
    return [k for k, t in enumerate(terms) if t.weighted and t.side != POSITIVES]


def _listed(terms: Terms) -> int:
    """The reduction whose live pairs are listed of tiles computed whole: alone in `_weighted`, and windowed."""
    weighted = _weighted(terms)
    return weighted[0] if len(weighted) == 1 and terms[weighted[0]].window else -1


def _kept_sizes(
    n: int, m: int, square: bool, split: int, terms: Terms, keep: bool, screen: bool
) -> list[tuple[int, ...]]:
    """The shapes of `Kept`. Live pairs are listed where `_listed` names a reduction, and of every screened tile."""
    g = grid(n, m, square, SCREENED_PAIRS_PER_ROW if screen else LIVE_PAIRS_PER_ROW, split)
    listing = keep and (bool(_weighted(terms)) if screen else _listed(terms) >= 0)
    slots, capacity = (g.slots, g.live_capacity) if listing else (0, 0)
    extremes = len(terms) if keep and any(t.indexed for t in terms) else 0
    return [(extremes, n), (slots,), (slots, capacity), (slots, capacity)]


def kept_like(
    x: Tensor, y: Tensor | None, terms: Terms, keep: bool, *, screen: bool = False, split: int = 0
) -> list[Like]:
    sizes = _kept_sizes(x.shape[0], (x if y is None else y).shape[0], y is None, split, terms, keep, screen)
    return list(zip(sizes, (torch.int64, torch.int32, torch.int32, x.dtype), strict=True))


def cpu_pass(p: Problem, squares: tuple[Tensor | None, Tensor | None], lanes: int | None = None) -> Any:
    """The C++ pass over these tensors, whose memory the caller holds."""
    (n, d), refs = p.x.shape, p.refs
    if p.split and (p.y is not None or p.end is not None or not 0 < p.split <= n):
        raise ValueError(f"two groups take no y and no end, and split from 1 to N = {n}, got split={p.split}")
    m, g = refs.shape[0], grid(n, refs.shape[0], p.y is None, split=p.split)
    module = extension.require()
    return (module.PassDouble if p.x.dtype == torch.float64 else module.PassFloat)(
        extension.instruction_set(), n, m, m if p.end is None else int(p.end), p.y is None, p.split,
        address(p.lo), address(p.hi), address(p.order), address(squares[0]), address(squares[1]),
        p.distance == "squared_euclidean", address(p.x), address(refs), d, g.size, lanes or g.lanes,
    )  # fmt: skip


def pair_similarities(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, distance: str) -> Tensor:
    """z of x's row rows[...] with y's cols[...], int64 of one shape: the bits that a pass has for these pairs."""
    x, y, rows, cols = (t.contiguous() for t in (x, y, rows, cols))
    none = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # no labels, so no positives
    p = Problem(x, y, none, none, None, cols, distance)
    z, squares = x.new_empty(rows.shape), p.row_and_ref_squares()
    work = cpu_pass(p, squares)
    count = rows.numel()
    work.similarities(threads(count, x.shape[1]), count, address(rows), address(cols), address(z))
    return z


def all_similarities(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """z (N, M) of all pairs, the bits that a pass has for them: for what is done once more over the dense matrix."""
    (n, _), m = x.shape, y.shape[0]
    at_once = max(1, MOST_LISTED // max(m, 1))
    z = x.new_empty(n, m)
    for first in range(0, n, at_once):
        rows = torch.arange(first, min(first + at_once, n), device=x.device)[:, None].expand(-1, m)
        cols = torch.arange(m, device=x.device).expand_as(rows)
        z[first : first + at_once] = pair_similarities(x, y, rows, cols, distance)
    return z


def threads(pairs: int, d: int) -> int:
    return 1 if pairs * d < INLINE_WORK else torch.get_num_threads()


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, Kept]:
    """Values (K, N), sorted, without logsumexp's offset; `keep`: for backward too."""
    values, kept, _ = run(p, terms, operands, keep, "")
    return values, kept


def run(
    p: Problem, terms: Terms, operands: Operands, keep: bool, screen: str, refs: Any = None
) -> tuple[Tensor, Kept, tuple[int, ...]]:
    """`forward`, and the counts of csrc/cpu/screen/screened_tiles.h's Tally.

    screen: the instruction set of its products, or none; refs: the references' Int8Rows where they are at hand.
    """
    if screen:
        p.refuse_groups("screened takes")
    squares = p.row_and_ref_squares()
    work, arguments = cpu_pass(p, squares), _arguments(terms, operands)
    n, m = p.x.shape[0], p.refs.shape[0]
    sizes = _kept_sizes(n, m, p.y is None, p.split, terms, keep, bool(screen))
    values = p.x.new_empty(num_rows(terms), n)
    kept = Kept(
        torch.empty(sizes[0], dtype=torch.int64, device="cpu"),
        torch.full(sizes[1], -1, dtype=torch.int32, device="cpu"),
        torch.empty(sizes[2], dtype=torch.int32, device="cpu"), p.x.new_empty(sizes[3]),
    )  # fmt: skip
    for k, t in enumerate(terms):
        index = kept.extreme[k] if t.indexed and sizes[0][0] else None
        work.add(*arguments[k], address(index), 0, 0, 0, 0, 0, 0, 0)
    listed = _listed(terms) if sizes[1][0] else -1
    places = address(kept.extreme) if sizes[0][0] else 0
    tally = work.forward(threads(p.pairs, p.x.shape[1]), address(values), places, kept.lists(), listed, screen, refs)
    return values, kept, tuple(tally)


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    n, m, k = p.x.shape[0], p.refs.shape[0], len(terms)
    dx = torch.zeros_like(p.x) if need[0] else None
    dy = torch.zeros_like(p.y) if need[1] and p.y is not None else None
    dscale = torch.zeros(k, dtype=torch.float64, device="cpu") if need[2] else None
    doffset = p.x.new_zeros(k, n) if need[3] else None
    dref_offset = p.x.new_zeros(k, m) if need[4] else None
    kept, squares = Kept(*kept), p.row_and_ref_squares()
    work, arguments = cpu_pass(p, squares), _arguments(terms, operands)
    for i, (t, top) in enumerate(zip(terms, tops(terms), strict=True)):
        work.add(
            *arguments[i], address(kept.extreme[i] if t.indexed else None), address(values[i]),
            *((address(values[top]), address(values[top + 1])) if top >= 0 else (0, 0)),
            address(None if t.detach else grads[i]),
            address(None if dscale is None else dscale[i]), address(None if doffset is None else doffset[i]),
            address(None if dref_offset is None else dref_offset[i]),
        )  # fmt: skip
    work.backward(threads(p.pairs, p.x.shape[1]), address(values), address(dx), address(dy), kept.lists())
    return Gradients(dx, dy, None if dscale is None else dscale.to(p.x.dtype), doffset, dref_offset)


def run_small_batch(call: SmallBatch) -> Results:
    x, labels, refs, ref_labels = call.operands()
    n, m, d, _, square = call.shape
    results = call.room(x.dtype)
    extension.require().small_batch_loss(
        extension.instruction_set(), call.shape, call.code, call.numbers,
        *map(address, (x, refs, labels, ref_labels, call.upstream, *results)), *grid(n, m, square), threads(n * m, d),
    )  # fmt: skip
    return results
