"""Backward of `fused` and `tiled`: the gradients beside dx, and how launches over all pairs become one dx."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import Gradients
from .kernels.gradient import Weighed
from .launcher import Block, Lists, Side, Work, aligned, groups, splits

PARTIAL_BYTES = 64 * 2**20  # that the splits' partial gradients may take


class GradientCollector:
    """One backward pass: `launch` leaves row sums in parts, `settle` adds them up in a fixed order."""

    def __init__(
        self, work: Work, values: Tensor, grads: Sequence[Tensor | None], need: Sequence[bool], poison: Tensor
    ) -> None:
        self.work, self.values, self.grads, self.poison = work, values, grads, poison
        k, n, m = len(work.terms), work.n, work.m
        self.scale = values.new_zeros(k) if need[2] else None
        self.offset = values.new_zeros(k, n) if need[3] else None
        self.ref_offset = values.new_zeros(k, m) if need[4] else None
        self.parts: list[tuple[Tensor, Tensor]] = []

    @property
    def of_anchors(self) -> bool:
        """Whether something beside dx is wanted that only a launch over anchors leaves."""
        return self.scale is not None or self.offset is not None or (self.work.square and self.ref_offset is not None)

    def slots(self, group: Sequence[int], side: Side, count: int) -> list[Weighed]:
        """The operands of a launch of `count` splits; parts start at zero, so that launches can add to each other."""
        found = []
        for k in group:
            t, (top, rest) = self.work.terms[k], self.work.relative(k, self.values)
            own = {"top": aligned(top), "rest": aligned(rest), "grad": aligned(self.grads[k])}
            s = Weighed(**self.work.shared(k, self.values), **own)
            if side.anchor and self.scale is not None:
                s = s._replace(d_scale=self._part(self.scale[k], count, self.work.n))
            if side.anchor and self.offset is not None and t.slots[0] >= 0:
                s = s._replace(d_offset=self._part(self.offset[k], count, self.work.n))
            if side.reference and self.ref_offset is not None and t.slots[1] >= 0:
                s = s._replace(d_ref_offset=self._part(self.ref_offset[k], count, self.work.m))
            found.append(s)
        return found

    def _part(self, into: Tensor, count: int, rows: int) -> Tensor:
        part = self.values.new_zeros(count, rows)
        self.parts.append((into, part))
        return part

    def settle(self) -> None:
        for into, part in self.parts:
            into += part.sum() if into.dim() == 0 else part.sum(0)
        self.parts.clear()

    def rows(self, side: Side, active: Sequence[int], want: bool, *, exact: bool, lists: Lists | None) -> Tensor | None:
        """Gradient (rows, D) of one side through the terms `active`, None if not wanted; in the embeddings' dtype
        where one launch leaves it whole and `exact` is not asked for, else in the accumulators'."""
        work, values = self.work, self.values
        rows, cols = side.x.shape[0], side.y.shape[0]
        launches = groups(work.terms, active)
        most = PARTIAL_BYTES // max(1, rows * work.d * values.itemsize)
        count = splits(work.blocks(rows), work.tiles(cols), work.device, most)
        if want and not launches:
            return values.new_zeros(rows, work.d) + self.poison
        # a loss of many terms takes many launches, whose parts may not all be there at once
        at_once = max(1, most // count)
        euclidean = work.p.distance != "dot"
        whole = len(launches) == 1 and count == 1 and not exact and not euclidean
        total = None
        for first in range(0, len(launches), at_once):
            some, parts = launches[first : first + at_once], None
            if want:
                parts = (side.x if whole else values).new_empty(len(some) * count, rows, work.d)
                if euclidean:
                    parts.zero_()  # close pairs are added to them
            for place, group in enumerate(some):
                dx = None if parts is None else parts[place * count : (place + 1) * count]
                slots = self.slots(group, side, count)
                work.weigh(group, slots, side, Block(0, rows, 0, cols), self.poison, dx=dx, count=count, lists=lists)
            self.settle()
            if parts is not None:
                part = parts[0] if parts.shape[0] == 1 else parts.sum(0)
                total = part if total is None else total + part
        return total

    def add_extreme(self, k: int, place: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        """A min's or max's gradient goes to the one pair that attained it; dy is dx itself in a square problem."""
        work, value, grad = self.work, self.values[k], self.grads[k]
        if work.m == 0 or grad is None:
            return
        j = place.clamp_min(0)
        w = torch.where(place >= 0, grad, 0.0)
        own, other = work.p.x.to(work.dtype), work.p.refs.index_select(0, j).to(work.dtype)
        if work.p.distance != "dot":
            apart = value > 0
            slope = 2.0 if work.p.distance == "squared_euclidean" else 1 / torch.where(apart, value, 1.0)
            w = torch.where(apart, -w * slope, 0.0)
            own, other = own - other, other - own
        if dx is not None:
            dx.addcmul_(w[:, None], other)
        if dy is not None:
            dy.index_put_((j,), w[:, None] * own, accumulate=True)

    def gradients(self, dx: Tensor | None, dy: Tensor | None) -> Gradients:
        dtype = self.work.p.x.dtype
        dx, dy = (None if g is None else g.to(dtype) for g in (dx, dy))
        return Gradients(dx, dy, self.scale, self.offset, self.ref_offset)
