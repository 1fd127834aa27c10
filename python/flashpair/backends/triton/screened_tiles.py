"""The survivors of the int8 screen: found, listed in order of their rows, and worked on; for `screened`.

A block of pairs is dense where its pairs are left to the kernels of all pairs: the band of positives and the ragged
ends, which need a mask, and those in which the screen found too many. In a square problem a block and its mirror image
go together, so that both ends of a pair see the same bits of it. From one stage of a call to the next a pair may change
sides, and its similarity the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.problem import MAX, MIN, SUM
from ...core.reduction import HINGES, TRANSFORMS
from .gradients import GradientCollector
from .kernels import configs, screen, survivors
from .kernels.reduce import Reduced
from .kernels.screen import Quantised, Window
from .launcher import NOTHING, TRITON, Lists, Side, Work, padded, phi, run, splits

ROOM = 32  # survivors a row that there is room for, on average over a block
CROWDED = 64  # one survivor in so many pairs of a block, and all pairs cost less than a list
LAST = survivors.LAST.value
PAIRS, BLOCK_D = 32, 32  # of the exact products
ROWS, ENTRIES = 8, 16  # of what is summed over rows
NO_WINDOW = (Window(), 0)


class Found(NamedTuple):
    """keys, z (L,): see kernels/survivors.py; starts (N + 1,). dense (row blocks, column blocks) int8."""

    keys: Tensor
    z: Tensor
    starts: Tensor
    dense: Tensor


def plan(n: int, m: int, d: int, device: torch.device) -> tuple[configs.Screen, tuple[int, int], int]:
    """The tiles of the screen, the blocks of rows and columns, and L, the room for survivors."""
    config = configs.screen(configs.family(device), d)
    blocks = -(-n // config.block), -(-m // config.block)
    return config, blocks, blocks[0] * config.block * ROOM


def outward(bound: Tensor, sign: int) -> Tensor:
    """A bound (N,) in float32, moved down (-1) or up (1) by what its own rounding and underflow may hide."""
    near = bound.to(torch.float32)
    moved = torch.where(near.isfinite(), near + sign * (near.abs() * 2.0**-22 + 1e-28), near)
    return torch.where(near.isinf() & bound.isfinite(), torch.nan, moved)  # beyond float32: no bound


def _tighter(which: Callable[[Tensor, Tensor], Tensor], bound: Tensor | None, edge: Tensor) -> Tensor:
    return edge if bound is None else which(bound, edge)


def window(work: Work, k: int, values: Tensor) -> tuple[Window, int]:
    """Between which h (see kernels/screen.py) the pairs of a term count, and whether just the highest or lowest do."""
    t, own = work.terms[k], work.shared(k, values)
    lower, upper = own["lower"], own["upper"]
    if t.op == SUM and TRANSFORMS[t.transform] in HINGES:
        learned, known, offset = own["scale"], work.operands.scales[k], own["offset"]
        scale = values.new_full((), known) if learned is None else learned
        edge = -(values.new_zeros(work.n) if offset is None else offset) / scale
        if learned is not None or known > 0:
            lower = _tighter(torch.maximum, lower, torch.where(scale > 0, edge, -torch.inf))
        if learned is not None or known < 0:
            upper = _tighter(torch.minimum, upper, torch.where(scale < 0, edge, torch.inf))
    best = {MAX: 1, MIN: -1}.get(t.op, 0)
    if work.p.distance != "dot":
        power = 1 if work.p.distance == "squared_euclidean" else 2
        nearer = None if upper is None else torch.where(upper > 0, upper**power * -0.5, torch.inf)
        farther = None if lower is None else torch.where(lower >= 0, lower**power * -0.5, torch.inf)
        lower, upper, best = nearer, farther, -best
    lower = None if lower is None else outward(lower, -1)
    return Window(lower, None if upper is None else outward(upper, 1)), best


class Sieve:
    """One problem's quantised rows, and what is done with survivors."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.config, self.blocks, self.room = plan(work.n, work.m, work.d, work.device)
        self.width = -(-work.d // self.config.depth) * self.config.depth
        self._rows: tuple[Quantised, Quantised] | None = None

    def screen(self, group: Sequence[int], values: Tensor) -> tuple[Tensor, Tensor]:
        """keys (L,), unsorted, and dense, of what the windows of one or two terms may let through."""
        work, (block, cols, depth, options) = self.work, self.config
        windows = [window(work, k, values) for k in group]
        if len(group) == 2:
            a, b = (work.terms[k] for k in group)
            bounds = [(t.lower_of, t.upper_of, t.lower_shift, t.upper_shift, *t.slots[2:]) for t in (a, b)]
            hinged = any(t.op == SUM and TRANSFORMS[t.transform] in HINGES for t in (a, b))
            alike = [found for found in windows if found[1] == 0]
            if bounds[0] == bounds[1] and alike and not hinged:  # one wants all that the other may want
                windows = alike[:1]
        (a, best_a), (b, best_b) = [*windows, NO_WINDOW][:2]
        if len(windows) == 2 or best_a or not (a.lower is None or a.upper is None):
            cols = min(cols, 64)  # more to test of a pair takes more registers
        dense = self.masked()
        keys = torch.full((self.room,), LAST, dtype=torch.int64, device=work.device)
        whole = work.n // block
        count = splits(whole, self.blocks[1], work.device)
        run(
            screen.screen, (whole, count), work.device,
            *self._quantised(), a, b, dense, keys, work.p.end, work.m, self.width, self.blocks[1],
            block * ROOM // count, block * cols // CROWDED, BEST_A=best_a, BEST_B=best_b, TWO=len(windows) == 2,
            ONE_CHUNK=self.width == depth, BLOCK=block, BLOCK_COLS=cols, BLOCK_K=depth,
            warps=options[0], stages=options[1],
        )  # fmt: skip
        if work.square:
            dense |= dense.clone().T
        if keys.numel() and dense.numel():
            at = (keys >> 32) // block * self.blocks[1] + (keys & 0xFFFFFFFF) // block
            keys = torch.where(dense.flatten()[torch.where(keys == LAST, 0, at)] > 0, LAST, keys)
        return keys, dense

    def find(self, group: Sequence[int], values: Tensor) -> Found:
        keys, dense = self.screen(group, values)
        keys = torch.sort(keys).values
        work, z = self.work, values.new_empty(keys.shape)
        run(
            survivors.pair_similarities, (-(-self.room // PAIRS),), work.device,
            work.p.x, work.p.refs, work.d, keys, z, self.room,
            EUCLIDEAN=work.p.distance != "dot", SQUARED=work.constants["SQUARED"], PAIRS=PAIRS, BLOCK_D=BLOCK_D,
            ACC=TRITON[work.dtype], warps=4, stages=1,
        )  # fmt: skip
        return Found(keys, z, self.starts(keys, work.n), dense)

    def starts(self, keys: Tensor, rows: int) -> Tensor:
        """(rows + 1,): where each row's keys begin."""
        return torch.searchsorted(keys, torch.arange(rows + 1, device=keys.device) << 32)

    def masked(self) -> Tensor:
        """The dense blocks that are known beforehand. No tile of theirs is clean in `span`'s sense, from either end."""
        work, block = self.work, self.config.block
        rows, cols = (torch.arange(count, device=work.device) for count in self.blocks)
        if 0 in self.blocks:
            return torch.zeros(self.blocks, dtype=torch.int8, device=work.device)
        ends = work.p.end if work.p.end is not None else torch.full((), work.m, device=work.device)
        found = _touched(work.p.lo, work.p.hi, block, cols)
        found |= (cols == ends // block) & (ends % block > 0)
        if work.square:
            found |= found.T.clone()
        else:
            side = work.references()
            found |= _touched(side.lo, side.hi, block, rows).T
        found |= (rows == work.n // block)[:, None]
        return found.to(torch.int8)

    def lists(self, dense: Tensor, side: Side) -> Lists:
        """The clean tiles of dense blocks that a side's row blocks must visit, for both widths of tiles."""
        work, found = self.work, {}
        tall = dense.repeat_interleave(self.config.block // work.config.rows, 0)[: work.blocks(work.n)]
        for width in {work.config.cols, work.narrow}:
            live = tall.repeat_interleave(self.config.block // width, 1)[:, : -(-work.m // width)]
            found[width] = work.list_live(live[None].contiguous(), side, width)
        return found

    def fold(self, group: Sequence[int], states: Sequence[Reduced], found: Found) -> None:
        """The states of one or two terms over survivors, where `reduce_all` has one split more."""
        work = self.work
        splits = next(t.shape[0] - 1 for s in states for t in (s.peak, s.total) if t is not None)
        run(
            survivors.fold_survivors, (-(-work.n // ROWS),), work.device,
            found.keys, found.z, found.starts, work.p.order, work.n, splits, *work.scales(group),
            *(states if len(states) == 2 else [*states, Reduced()]), *self._forms(group, 0),
            ROWS=ROWS, PAIRS=ENTRIES, ACC=TRITON[work.dtype], warps=4, stages=1,
        )  # fmt: skip

    def weigh(self, group: Sequence[int], found: Found, into: GradientCollector) -> tuple[Tensor, list[Tensor | None]]:
        """dL/dS of each survivor through one or two terms, and of each term, where it has a gradient of the references'
        offsets, their shares (L,). `into` gets the anchors' sums."""
        work, weights = self.work, torch.empty_like(found.z)
        slots = into.slots(group, work.anchors(), 1)
        shared = [into.ref_offset is not None and work.terms[k].slots[1] >= 0 for k in group]
        shares = [torch.empty_like(found.z) if wanted else None for wanted in shared]
        pad: list[Any] = [None] * (2 - len(group))
        run(
            survivors.weigh_survivors, (-(-work.n // ROWS),), work.device,
            found.keys, found.z, found.starts, weights, *shares, *pad, work.n, *work.scales(group),
            *slots, *(slots[0]._make([None] * len(slots[0])) for _ in pad), *self._forms(group, 1),
            EUCLIDEAN=work.p.distance != "dot", SQUARED=work.constants["SQUARED"], ROWS=ROWS, PAIRS=ENTRIES,
            ACC=TRITON[work.dtype], warps=4, stages=1,
        )  # fmt: skip
        into.settle()
        return weights, shares

    def mirrored(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The same pairs in order of their columns: column << 32 | place in keys (L,), and where each one's begin."""
        place = torch.arange(keys.shape[0], device=keys.device)
        lists = torch.sort(torch.where(keys == LAST, LAST, (keys & 0xFFFFFFFF) << 32 | place)).values
        return lists, self.starts(lists, self.work.m)

    def spread(self, found: Found, weights: Tensor, dx: Tensor, mirror: tuple[Tensor, Tensor] | None = None) -> None:
        """dx (rows, D) += the survivors' weights times the other ends' embeddings; rows are anchors, or of `mirror`."""
        work, slab = self.work, min(128, configs.power_of_two(self.work.d))
        x, y = (work.p.x, work.p.refs) if mirror is None else (work.p.refs, work.p.x)
        lists, starts = (found.keys, found.starts) if mirror is None else mirror
        run(
            survivors.spread_survivors, (dx.shape[0], -(-work.d // slab)), work.device,
            x, y, work.d, lists, found.keys, starts, weights, dx, MIRROR=mirror is not None,
            EUCLIDEAN=work.p.distance != "dot", PAIRS=16, BLOCK_D=slab, ACC=TRITON[work.dtype], warps=4, stages=1,
        )  # fmt: skip

    def sum_columns(self, mirror: tuple[Tensor, Tensor], shares: Tensor) -> Tensor:
        work, (lists, starts) = self.work, mirror
        total = shares.new_empty(work.m)
        run(
            survivors.sum_columns, (-(-work.m // ROWS),), work.device, lists, starts, shares, total, work.m,
            ROWS=ROWS, PAIRS=ENTRIES, ACC=TRITON[work.dtype], warps=4, stages=1,
        )  # fmt: skip
        return total

    def _forms(self, group: Sequence[int], what: int) -> list[Any]:
        found: list[Any] = []
        for k in group:
            found += [self.work.terms[k].op, phi(self.work.terms[k])[what]]
        return found if len(group) == 2 else [*found, NOTHING, phi(None)[what]]

    def _quantised(self) -> tuple[Quantised, Quantised]:
        if self._rows is None:
            p, (rows, cols) = self.work.p, self.work.squares
            own = self._quantise(p.x, rows)
            self._rows = own, own if p.y is None else self._quantise(p.y, cols)
        return self._rows

    def _quantise(self, x: Tensor, squares: Tensor | None) -> Quantised:
        n, step = x.shape[0], min(1024, configs.power_of_two(self.width))
        q = torch.empty(n, self.width, dtype=torch.int8, device=x.device)
        own = torch.empty(3, padded(n), dtype=torch.float32, device=x.device)[:, :n]
        run(
            screen.quantise, (-(-n // (1024 // step)),), x.device, x, q, *own, n, self.work.d, self.width,
            ROWS=1024 // step, STEP=step, ACC=TRITON[self.work.dtype], warps=4, stages=1,
        )  # fmt: skip
        return Quantised(q, *own, None if squares is None else (0.5 * squares).to(torch.float32))


def _touched(lo: Tensor, hi: Tensor, block: int, cols: Tensor) -> Tensor:
    """(row blocks, column blocks): which column blocks the intervals of a row block's positives, as one, reach into."""
    n = lo.shape[0]
    first = torch.arange(0, n, block, device=lo.device)
    # Intervals of sorted rows begin in order and end in order.
    lowest = lo[first] // block
    highest = (hi[(first + block - 1).clamp_max(n - 1)] + block - 1) // block
    return (cols >= lowest[:, None]) & (cols < highest[:, None])
