"""The candidates of the int8 screen: found, listed in order of their rows, and worked on; for `screened`.

A block of pairs is dense where its pairs are left to the kernels of all pairs: where there are positives, at the ragged
ends, which need a mask, and where the screen found too many. In a square problem a block and its mirror image go
together, so that both ends of a pair see the same bits of it. From one stage of a call to the next a pair may change
between list and dense block, and its similarity the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...core.problem import MAX, MIN, SUM
from ...core.reduction import HINGES, TRANSFORMS
from . import launch
from .gradients import GradientCollector
from .kernels import candidates, configs, screen
from .kernels.operands import BackwardOperands, ForwardOperands
from .kernels.screen import Quantised, Window
from .launcher import Launcher, Listed, Role, pair

ROOM = 32  # candidates a row that there is room for, on average over a block
CROWDED = 64  # one candidate in so many pairs of a block, and all pairs cost less than a list
LAST = candidates.LAST.value
PAIRS, BLOCK_D = 32, 32  # of the exact products
ROWS, ENTRIES = 8, 16  # of what is summed over rows


class Candidates(NamedTuple):
    """keys, z (L,): see kernels/candidates.py; starts (N + 1,). dense (row blocks, column blocks) int8."""

    keys: Tensor
    z: Tensor
    starts: Tensor
    dense: Tensor


class Mirror(NamedTuple):
    """The same pairs in order of their columns: column << 32 | place in keys (L,), and where each column's begin."""

    lists: Tensor
    starts: Tensor


class ScreenShape(NamedTuple):
    """The tiles of the screen, how many blocks of rows and columns there are, and L, the room for candidates."""

    config: configs.Screen
    row_blocks: int
    col_blocks: int
    room: int


def screen_shape(n: int, m: int, d: int, device: torch.device) -> ScreenShape:
    config = configs.choose_screen(configs.family(device), d)
    row_blocks, col_blocks = -(-n // config.block), -(-m // config.block)
    return ScreenShape(config, row_blocks, col_blocks, row_blocks * config.block * ROOM)


def outward(bound: Tensor, sign: int) -> Tensor:
    """A bound (N,) in float32, moved down (-1) or up (1) by what its own rounding and underflow may hide."""
    single = bound.to(torch.float32)
    moved = torch.where(single.isfinite(), single + sign * (single.abs() * 2.0**-22 + 1e-28), single)
    return torch.where(single.isinf() & bound.isfinite(), torch.nan, moved)  # beyond float32: no bound


def _tighter(which: Callable[[Tensor, Tensor], Tensor], bound: Tensor | None, edge: Tensor) -> Tensor:
    return edge if bound is None else which(bound, edge)


def window(launcher: Launcher, k: int, values: Tensor) -> Window:
    """Between which h (see kernels/screen.py) the pairs of a term count, and whether just the highest or lowest do."""
    t, inputs = launcher.terms[k], launcher.inputs(k, values)
    lower, upper = inputs["lower"], inputs["upper"]
    if t.op == SUM and TRANSFORMS[t.transform] in HINGES:
        # A hinge is 0 on one side of its edge, which is as good as a window.
        learned, known, offset = inputs["scale"], launcher.operands.scales[k], inputs["offset"]
        scale = values.new_full((), known) if learned is None else learned
        edge = -(values.new_zeros(launcher.n) if offset is None else offset) / scale
        if learned is not None or known > 0:
            lower = _tighter(torch.maximum, lower, torch.where(scale > 0, edge, -torch.inf))
        if learned is not None or known < 0:
            upper = _tighter(torch.minimum, upper, torch.where(scale < 0, edge, torch.inf))
    best = {MAX: 1, MIN: -1}.get(t.op, 0)
    if launcher.euclidean:
        # h falls where the distance grows.
        power = 1 if launcher.squared else 2
        nearer = None if upper is None else torch.where(upper > 0, upper**power * -0.5, torch.inf)
        farther = None if lower is None else torch.where(lower >= 0, lower**power * -0.5, torch.inf)
        lower, upper, best = nearer, farther, -best
    lower = None if lower is None else outward(lower, -1)
    return Window(lower, None if upper is None else outward(upper, 1), tl.constexpr(best))


class ScreenedTiles:
    """One problem's quantised rows, and what is done with candidates."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.shape = screen_shape(launcher.n, launcher.m, launcher.d, launcher.device)
        depth = self.shape.config.depth
        self.width = -(-launcher.d // depth) * depth
        self._quantised: tuple[Quantised, Quantised] | None = None

    def list_of(self, z: Tensor, place: int) -> Tensor:
        """The similarities of the list that stands at a place among all that are kept for backward."""
        return z[place * self.shape.room : (place + 1) * self.shape.room]

    def screen(self, group: Sequence[int], values: Tensor) -> tuple[Tensor, Tensor]:
        """keys (L,), unsorted, and dense, of what the windows of one or two terms may let through."""
        launcher, (block, cols, depth, (warps, stages)) = self.launcher, self.shape.config
        windows = self._windows(group, values)
        first, second = pair(windows, Window())
        if len(windows) == 2 or first.BEST.value or not (first.lower is None or first.upper is None):
            cols = min(cols, 64)  # more to test of a pair takes more registers
        dense = self.masked()
        keys = torch.full((self.shape.room,), LAST, dtype=torch.int64, device=launcher.device)
        full_blocks = launcher.n // block
        splits = launch.choose_splits(full_blocks, self.shape.col_blocks, launcher.device)
        launch.run(
            screen.screen, (full_blocks, splits), launcher.device,
            *self._quantised_rows(), (first, second), dense, keys, launcher.p.end, launcher.m, self.width,
            self.shape.col_blocks, block * ROOM // splits, block * cols // CROWDED, TWO=len(windows) == 2,
            ONE_CHUNK=self.width == depth, BLOCK=block, BLOCK_COLS=cols, BLOCK_K=depth, warps=warps, stages=stages,
        )  # fmt: skip
        if launcher.square:
            dense |= dense.clone().T
        if keys.numel() and dense.numel():
            at = (keys >> 32) // block * self.shape.col_blocks + (keys & 0xFFFFFFFF) // block
            keys = torch.where(dense.flatten()[torch.where(keys == LAST, 0, at)] > 0, LAST, keys)
        return keys, dense

    def _windows(self, group: Sequence[int], values: Tensor) -> list[Window]:
        """Those of one or two terms; one where a term wants all that the other may want."""
        windows = [window(self.launcher, k, values) for k in group]
        if len(group) == 2:
            a, b = (self.launcher.terms[k] for k in group)
            bounds = [(t.lower_of, t.upper_of, t.lower_shift, t.upper_shift, *t.slots[2:]) for t in (a, b)]
            hinged = any(t.op == SUM and TRANSFORMS[t.transform] in HINGES for t in (a, b))
            of_all = [w for w in windows if w.BEST.value == 0]
            if bounds[0] == bounds[1] and of_all and not hinged:
                return of_all[:1]
        return windows

    def find(self, group: Sequence[int], values: Tensor) -> Candidates:
        """The candidates of one or two terms, with their similarities."""
        launcher = self.launcher
        keys, dense = self.screen(group, values)
        keys = torch.sort(keys).values
        z = values.new_empty(keys.shape)
        launch.run(
            candidates.pair_similarities, (-(-self.shape.room // PAIRS),), launcher.device,
            launcher.p.x, launcher.p.refs, launcher.d, keys, z, self.shape.room,
            EUCLIDEAN=launcher.euclidean, SQUARED=launcher.squared, PAIRS=PAIRS, BLOCK_D=BLOCK_D, ACC=launcher.acc,
            warps=4, stages=1,
        )  # fmt: skip
        return Candidates(keys, z, self.starts(keys, launcher.n), dense)

    def starts(self, keys: Tensor, rows: int) -> Tensor:
        """(rows + 1,): where each row's keys begin."""
        return torch.searchsorted(keys, torch.arange(rows + 1, device=keys.device) << 32)

    def masked(self) -> Tensor:
        """The dense blocks that are known beforehand: all those with a tile that needs a mask, from either end."""
        launcher, block = self.launcher, self.shape.config.block
        p, shape = launcher.p, (self.shape.row_blocks, self.shape.col_blocks)
        rows, cols = (torch.arange(count, device=launcher.device) for count in shape)
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.int8, device=launcher.device)
        ends = p.end if p.end is not None else torch.full((), launcher.m, device=launcher.device)
        found = _touched(p.lo, p.hi, block, cols)
        found |= (cols == ends // block) & (ends % block > 0)
        if launcher.square:
            found |= found.T.clone()
        else:
            references = launcher.references().rows
            found |= _touched(references.pos_begin, references.pos_end, block, rows).T
        found |= (rows == launcher.n // block)[:, None]
        return found.to(torch.int8)

    def dense_tiles(self, dense: Tensor, role: Role) -> Listed:
        """The clean tiles of dense blocks that a role's row blocks must visit, for both widths of tiles."""
        launcher, block, listed = self.launcher, self.shape.config.block, {}
        tall = dense.repeat_interleave(block // launcher.config.rows, 0)[: launcher.row_blocks(launcher.n)]
        for width in {launcher.config.cols, launcher.narrow}:
            live = tall.repeat_interleave(block // width, 1)[:, : -(-launcher.m // width)]
            listed[width] = launcher.list_tiles(live[None].contiguous(), role, width)
        return listed

    def reduce(
        self, group: Sequence[int], states: Sequence[ForwardOperands], found: Candidates, splits: int
    ) -> None:  # fmt: skip
        """The states of one or two terms over candidates, behind those of so many splits."""
        launcher = self.launcher
        launch.run(
            candidates.reduce_candidates, (-(-launcher.n // ROWS),), launcher.device,
            found.keys, found.z, found.starts, launcher.p.order, launcher.n, splits, *launcher.scales(group),
            pair(states, ForwardOperands()), ROWS=ROWS, PAIRS=ENTRIES, ACC=launcher.acc, warps=4, stages=1,
        )  # fmt: skip

    def backward(
        self, group: Sequence[int], found: Candidates, into: GradientCollector
    ) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """dL/d(x.y) of each candidate through one or two terms, and of each term, where it has a gradient of the
        references' offsets, their shares (L,). `into` gets the anchors' sums."""
        launcher, weights = self.launcher, torch.empty_like(found.z)
        reductions = into.operands(group, launcher.anchors(), 1)
        wanted = [into.ref_offset is not None and launcher.terms[k].slots[1] >= 0 for k in group]
        ref_shares = [torch.empty_like(found.z) if want else None for want in wanted]
        launch.run(
            candidates.backward_candidates, (-(-launcher.n // ROWS),), launcher.device,
            found.keys, found.z, found.starts, weights, pair(ref_shares, None), launcher.n, *launcher.scales(group),
            pair(reductions, BackwardOperands()), EUCLIDEAN=launcher.euclidean, SQUARED=launcher.squared, ROWS=ROWS,
            PAIRS=ENTRIES, ACC=launcher.acc, warps=4, stages=1,
        )  # fmt: skip
        into.add_parts()
        return weights, ref_shares

    def mirrored(self, keys: Tensor) -> Mirror:
        place = torch.arange(keys.shape[0], device=keys.device)
        lists = torch.sort(torch.where(keys == LAST, LAST, (keys & 0xFFFFFFFF) << 32 | place)).values
        return Mirror(lists, self.starts(lists, self.launcher.m))

    def add_grads(self, found: Candidates, weights: Tensor, dx: Tensor, mirror: Mirror | None = None) -> None:
        """dx (rows, D) += the candidates' weights times the other ends' embeddings. `mirror`: rows are references."""
        launcher, slab = self.launcher, min(128, configs.power_of_two(self.launcher.d))
        p = launcher.p
        x, y = (p.x, p.refs) if mirror is None else (p.refs, p.x)
        lists, starts = (found.keys, found.starts) if mirror is None else mirror
        launch.run(
            candidates.add_candidate_grads, (dx.shape[0], -(-launcher.d // slab)), launcher.device,
            x, y, launcher.d, lists, found.keys, starts, weights, dx, MIRROR=mirror is not None,
            EUCLIDEAN=launcher.euclidean, PAIRS=16, BLOCK_D=slab, ACC=launcher.acc, warps=4, stages=1,
        )  # fmt: skip

    def sum_columns(self, mirror: Mirror, shares: Tensor) -> Tensor:
        """(M,): the sum of the candidates' shares (L,) over each column."""
        launcher = self.launcher
        total = shares.new_empty(launcher.m)
        launch.run(
            candidates.sum_columns, (-(-launcher.m // ROWS),), launcher.device,
            mirror.lists, mirror.starts, shares, total, launcher.m, ROWS=ROWS, PAIRS=ENTRIES, ACC=launcher.acc,
            warps=4, stages=1,
        )  # fmt: skip
        return total

    def _quantised_rows(self) -> tuple[Quantised, Quantised]:
        if self._quantised is None:
            p, (squares, ref_squares) = self.launcher.p, self.launcher.squares
            x = self._quantise(p.x, squares)
            self._quantised = x, x if p.y is None else self._quantise(p.y, ref_squares)
        return self._quantised

    def _quantise(self, x: Tensor, squares: Tensor | None) -> Quantised:
        n, step = x.shape[0], min(1024, configs.power_of_two(self.width))
        rows = 1024 // step
        q = torch.empty(n, self.width, dtype=torch.int8, device=x.device)
        numbers = torch.empty(3, launch.padded(n), dtype=torch.float32, device=x.device)[:, :n]
        launch.run(
            screen.quantise, (-(-n // rows),), x.device, x, q, *numbers, n, self.launcher.d, self.width,
            ROWS=rows, STEP=step, ACC=self.launcher.acc, warps=4, stages=1,
        )  # fmt: skip
        return Quantised(q, *numbers, None if squares is None else (0.5 * squares).to(torch.float32))


def _touched(pos_begin: Tensor, pos_end: Tensor, block: int, cols: Tensor) -> Tensor:
    """(row blocks, column blocks): which column blocks the intervals of a row block's positives, as one, reach into."""
    n = pos_begin.shape[0]
    first = torch.arange(0, n, block, device=pos_begin.device)
    # Intervals of sorted rows begin in order and end in order.
    lowest = pos_begin[first] // block
    highest = (pos_end[(first + block - 1).clamp_max(n - 1)] + block - 1) // block
    return (cols >= lowest[:, None]) & (cols < highest[:, None])
