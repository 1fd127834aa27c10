"""`tiled` on the CPU: threads compute tiles of similarities that stay in cache, and reduce each tile at once.

Computes: the row reductions of a problem, which may be two-sided, and their gradients. csrc/cpu/tile/pass.h has the
loop over tiles.
Never materialises: more than one tile of similarities and one tile of weights for each thread.
Keeps for backward: the row values. If a mining window leaves few pairs of a tile, these live pairs are kept, too, and
backward need not visit the tile. `live_capacity` bounds them to a fixed number for each row.
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
SCREENED_PAIRS_PER_ROW = 512  # 16 times as many (csrc/cpu/tile/pass.h): 4 KB a row in float32, of which few are used
MOST_LISTED = 2**20  # how many pairs `all_similarities` computes at a time
INLINE_WORK = 2**25  # with fewer multiply-adds, to wake threads takes longer than it saves


class Grid(NamedTuple):
    """How the matrix of pairs is cut into tiles (csrc/cpu/tile/tiles.h).

    Attributes:
        size: rows and columns of a tile.
        lanes: ranges of columns, each of which has a state of the rows of its own.
        slots: the number of tiles.
        live_capacity: how many live pairs of a tile can be kept.
    """

    size: int
    lanes: int
    slots: int
    live_capacity: int


def grid(n: int, m: int, square: bool, live_per_row: int = LIVE_PAIRS_PER_ROW, split: int = 0) -> Grid:
    """The grid of N x M pairs, in tiles that stay in the second-level cache of a core.

    Args:
        n: N.
        m: M.
        square: the anchors are the references.
        live_per_row: how many live pairs of a row can be kept.
        split: see `Problem`.
    """
    pairs = 2 * split * (n - split) if split else n * m
    size = 512 if pairs > 16384**2 else 256 if pairs > 1024**2 else 128
    rows, cols = -(-(split or n) // size), -(-(m - split) // size)
    lanes = 1 if square else max(1, min(16 // max(rows, 1), cols // 4))
    slots = rows * (rows + 1) // 2 if square and not split else rows * cols
    capacity = live_per_row * (n if square else n + m) // max(slots, 1)
    return Grid(size, lanes, slots, min(capacity, size * size // 8))


def _arguments(terms: Terms, operands: Operands) -> list[tuple[tuple[Any, ...], Any]]:
    """The terms as the C++ pass takes them. The caller keeps the vectors alive."""
    scales = operands.scales if operands.scale is None else operands.scale.tolist()
    arguments = []
    for t, scale in zip(terms, scales, strict=True):
        offset, ref_offset, lower, upper = (address(operands.vector(slot)) for slot in t.slots)
        bounds = t.lower_of, t.upper_of, t.lower_shift, t.upper_shift
        term = t.op, t.side, t.transform, scale, offset, ref_offset, lower, upper, *bounds, t.shift
        arguments.append((term, _program(TRANSFORMS[t.transform])))
    return arguments


def _program(name: str) -> Any:
    """The steps of a user's transform as the C++ kernels take them; None for a built-in transform."""
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
    """The tensors that forward keeps for backward beside the values; each may be empty.

    Attributes:
        extreme: (K, N) int64, the sorted reference that attained each min and max, -1 if there is none.
        live_count: (slots,) int32, the number of live pairs of each tile; -1: they were too many, or were not listed.
        live_entry: (slots, capacity) int32, where each live pair stands in its tile.
        live_z: (slots, capacity), the similarity of each live pair.
    """

    extreme: Tensor
    live_count: Tensor
    live_entry: Tensor
    live_z: Tensor

    def trimmed(self, most: int) -> Kept:
        """The same in less memory: tiles with more than `most` live pairs are computed as a whole in backward."""
        count = self.live_count.masked_fill(self.live_count > most, -1)
        longest = max(0, int(count.max())) if count.numel() else 0
        return Kept(self.extreme, count, self.live_entry[:, :longest].clone(), self.live_z[:, :longest].clone())

    def lists(self) -> tuple[int, int, int, int]:
        """The addresses of the live pairs, and their capacity, as the C++ pass takes them."""
        if not self.live_count.numel():
            return 0, 0, 0, 0
        return (
            address(self.live_count),
            address(self.live_entry),
            address(self.live_z),
            self.live_entry.shape[1],
        )


def _weighted(terms: Terms) -> list[int]:
    """The terms that give a weight to every pair and are not over positives."""
    return [k for k, t in enumerate(terms) if t.weighted and t.side != POSITIVES]


def _listed(terms: Terms) -> int:
    """The term whose live pairs are listed without a screen: the only one of `_weighted`, if it has a window; or -1."""
    weighted = _weighted(terms)
    return weighted[0] if len(weighted) == 1 and terms[weighted[0]].window else -1


def _kept_sizes(
    n: int, m: int, square: bool, split: int, terms: Terms, keep: bool, screen: bool
) -> list[tuple[int, ...]]:
    """The shapes of `Kept`. Live pairs are listed if `_listed` names a term, or if tiles are screened."""
    g = grid(n, m, square, SCREENED_PAIRS_PER_ROW if screen else LIVE_PAIRS_PER_ROW, split)
    listing = keep and (bool(_weighted(terms)) if screen else _listed(terms) >= 0)
    slots, capacity = (g.slots, g.live_capacity) if listing else (0, 0)
    extremes = len(terms) if keep and any(t.indexed for t in terms) else 0
    return [(extremes, n), (slots,), (slots, capacity), (slots, capacity)]


def kept_like(
    x: Tensor, y: Tensor | None, terms: Terms, keep: bool, *, screen: bool = False, split: int = 0
) -> list[Like]:
    """See core/problem.py. screen: the call is screened; split: see `Problem`."""
    sizes = _kept_sizes(x.shape[0], (x if y is None else y).shape[0], y is None, split, terms, keep, screen)
    return list(zip(sizes, (torch.int64, torch.int32, torch.int32, x.dtype), strict=True))


def cpu_pass(p: Problem, squares: tuple[Tensor | None, Tensor | None], lanes: int | None = None) -> Any:
    """The C++ pass over a problem. The caller keeps all tensors alive.

    Args:
        p: the problem.
        squares: the squared norms of the anchors (N,) and of the references (M,), or None.
        lanes: see `Grid`; None: as `grid` says.
    """
    (n, d), refs = p.x.shape, p.refs
    if p.split and (p.y is not None or p.end is not None or not 0 < p.split <= n):
        raise ValueError(f"a two-sided problem takes no y and no end, and split from 1 to N = {n}, got split={p.split}")
    m, g = refs.shape[0], grid(n, refs.shape[0], p.y is None, split=p.split)
    module = extension.require()
    return (module.PassDouble if p.x.dtype == torch.float64 else module.PassFloat)(
        extension.instruction_set(), n, m, m if p.end is None else int(p.end), p.y is None, p.split,
        address(p.lo), address(p.hi), address(p.order), address(squares[0]), address(squares[1]),
        p.distance == "squared_euclidean", address(p.x), address(refs), d, g.size, lanes or g.lanes,
    )  # fmt: skip


def pair_similarities(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, distance: str) -> Tensor:
    """The similarities of given pairs, with the bits that `forward` has for them.

    Args:
        x: (N, D).
        y: (M, D).
        rows: int64, the row of x of each pair, in any shape.
        cols: int64, the row of y of each pair, in the same shape.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """
    x, y, rows, cols = (t.contiguous() for t in (x, y, rows, cols))
    none = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # no labels, so no positives
    p = Problem(x, y, none, none, None, cols, distance)
    z, squares = x.new_empty(rows.shape), p.row_and_ref_squares()
    work = cpu_pass(p, squares)
    count = rows.numel()
    work.similarities(threads(count, x.shape[1]), count, address(rows), address(cols), address(z))
    return z


def all_similarities(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """The similarities (N, M) of x (N, D) and y (M, D), with the bits that `forward` has for them."""
    (n, _), m = x.shape, y.shape[0]
    at_once = max(1, MOST_LISTED // max(m, 1))
    z = x.new_empty(n, m)
    for first in range(0, n, at_once):
        rows = torch.arange(first, min(first + at_once, n), device=x.device)[:, None].expand(-1, m)
        cols = torch.arange(m, device=x.device).expand_as(rows)
        z[first : first + at_once] = pair_similarities(x, y, rows, cols, distance)
    return z


def threads(pairs: int, d: int) -> int:
    """How many threads to use for `pairs` products of width D."""
    return 1 if pairs * d < INLINE_WORK else torch.get_num_threads()


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, Kept]:
    """See core/problem.py."""
    values, kept, _ = run(p, terms, operands, keep, "")
    return values, kept


def run(
    p: Problem, terms: Terms, operands: Operands, keep: bool, screen: str, refs: Any = None
) -> tuple[Tensor, Kept, tuple[int, ...]]:
    """`forward`, which also returns the counts of the Tally in csrc/cpu/screen/screened_tiles.h.

    Args:
        p: the problem.
        terms: the K terms.
        operands: their operands.
        keep: a backward pass may follow.
        screen: the instruction set of int8 products; empty: do not screen.
        refs: the int8 form of the references, if there is one.
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
    """See core/problem.py. need: whether gradients of x, y, scale, offset and ref_offset are needed."""
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
    """A whole loss by csrc/cpu/small_batch.h."""
    x, labels, refs, ref_labels = call.operands()
    n, m, d, _, square = call.shape
    results = call.empty_results(x.dtype)
    extension.require().small_batch_loss(
        extension.instruction_set(), call.shape, call.code, call.numbers,
        *map(address, (x, refs, labels, ref_labels, call.upstream, *results)), *grid(n, m, square), threads(n * m, d),
    )  # fmt: skip
    return results
