"""The backward pass that `fused`, `tiled` and `screened` share: launches over pairs become one dx, and the gradients
beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...core.problem import Gradients, Operands, Problem, Terms
from .kernels.operands import BackwardOperands
from .launch import aligned
from .launcher import Launcher, Listed, PairBlock, Role
from .term_groups import launch_groups, transform_functions, weighted_terms

PARTIAL_BYTES = 64 * 2**20  # that the splits' partial gradients may take


class GradientCollector:
    """One backward pass. Launches leave row sums in parts; `add_parts` adds them up in a fixed order.

    Args:
        grads: dL/dr, K tensors (N,) or None. need: of x, y, scale, offset, ref_offset. nonfinite: (), 0 or NaN.
    """

    def __init__(
        self, p: Problem, terms: Terms, operands: Operands, values: Tensor, grads: Sequence[Tensor | None],
        need: Sequence[bool], nonfinite: Tensor,
    ) -> None:  # fmt: skip
        self.launcher = Launcher(p, terms, operands)
        self.terms, self.values, self.grads, self.need, self.nonfinite = terms, values, grads, need, nonfinite
        self.weighted = weighted_terms(terms, grads)
        self.extremes = [k for k, t in enumerate(terms) if t.indexed and grads[k] is not None]
        k, n, m = len(terms), self.launcher.n, self.launcher.m
        self.scale = values.new_zeros(k) if need[2] else None
        self.offset = values.new_zeros(k, n) if need[3] else None
        self.ref_offset = values.new_zeros(k, m) if need[4] else None
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def wants_anchors(self) -> bool:
        """Whether anything is wanted that launches with anchors as rows leave."""
        beside = self.scale is not None or self.offset is not None
        return self.need[0] or beside or (self.launcher.square and self.ref_offset is not None)

    @property
    def wants_references(self) -> bool:
        """The same of references, which are rows of their own where the problem is not square."""
        return not self.launcher.square and (self.need[1] or self.ref_offset is not None)

    def each_side(
        self, row_grads: Callable[[Role, bool], Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """dx and dy from a function of who owns the rows, and whether their gradient is wanted.

        It is called for a side of which anything is wanted. A square problem has no dy.
        """
        dx = row_grads(self.launcher.anchors(), self.need[0]) if self.wants_anchors else None
        dy = row_grads(self.launcher.references(), self.need[1]) if self.wants_references else None
        return dx, dy

    def operands(self, group: Sequence[int], role: Role, splits: int) -> list[BackwardOperands]:
        """Those of a launch; parts start at zero, so that launches can add to each other."""
        found = []
        for k in group:
            t, (top, rest) = self.terms[k], self.launcher.top_and_rest(k, self.values)
            r = BackwardOperands(
                **self.launcher.inputs(k, self.values), SLOPE=transform_functions(t)[1], top=aligned(top),
                rest=aligned(rest), grad=aligned(self.grads[k]),
            )  # fmt: skip
            if role.anchor and self.scale is not None:
                r = r._replace(d_scale=self._part(self.scale[k], splits, self.launcher.n))
            if role.anchor and self.offset is not None and t.slots[0] >= 0:
                r = r._replace(d_offset=self._part(self.offset[k], splits, self.launcher.n))
            if role.reference and self.ref_offset is not None and t.slots[1] >= 0:
                r = r._replace(d_ref_offset=self._part(self.ref_offset[k], splits, self.launcher.m))
            found.append(r)
        return found

    def _part(self, into: Tensor, splits: int, rows: int) -> Tensor:
        part = self.values.new_zeros(splits, rows)
        self._parts.append((into, part))
        return part

    def add_parts(self) -> None:
        for into, part in self._parts:
            into += part.sum() if into.dim() == 0 else part.sum(0)
        self._parts.clear()

    def row_grads(
        self, role: Role, chosen: Sequence[int], want: bool, *, added_to: bool, listed: Listed | None = None
    ) -> Tensor | None:
        """Gradient (rows, D) of one side through the chosen terms, None if not wanted.

        added_to: more is going to be added to it, so it is of the accumulators' dtype. Else, where one launch leaves
        all of it, it is of the embeddings'.
        """
        launcher, values = self.launcher, self.values
        rows, cols = role.num_rows, role.num_cols
        groups = launch_groups(self.terms, chosen)
        most = PARTIAL_BYTES // max(1, rows * launcher.d * values.itemsize)
        splits = launcher.splits(role, most)
        if want and not groups:
            return values.new_zeros(rows, launcher.d) + self.nonfinite
        # a loss of many terms takes many launches, whose parts may not all be there at once
        at_once = max(1, most // splits)
        final = len(groups) == 1 and splits == 1 and not added_to and not launcher.euclidean
        total = None
        for first in range(0, len(groups), at_once):
            some, parts = groups[first : first + at_once], None
            if want:
                parts = (role.rows.x if final else values).new_empty(len(some) * splits, rows, launcher.d)
                if launcher.euclidean:
                    parts.zero_()  # close pairs are added to them
            for place, group in enumerate(some):
                dx = None if parts is None else parts[place * splits : (place + 1) * splits]
                reductions, block = self.operands(group, role, splits), PairBlock(0, rows, 0, cols)
                launcher.backward(
                    group, reductions, role, block, self.nonfinite, dx=dx, splits=splits, listed=listed
                )  # fmt: skip
            self.add_parts()
            if parts is not None:
                part = parts[0] if parts.shape[0] == 1 else parts.sum(0)
                total = part if total is None else total + part
        return total

    def _add_extreme(self, k: int, place: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        """A min's or max's gradient goes to the one pair that attained it; dy is dx itself in a square problem."""
        launcher, value, grad = self.launcher, self.values[k], self.grads[k]
        if launcher.m == 0 or grad is None:
            return
        p, j = launcher.p, place.clamp_min(0)
        w = torch.where(place >= 0, grad, 0.0)
        x, y = p.x.to(launcher.dtype), p.refs.index_select(0, j).to(launcher.dtype)
        if launcher.euclidean:
            some = value > 0
            slope = 2.0 if launcher.squared else 1 / torch.where(some, value, 1.0)
            w = torch.where(some, -w * slope, 0.0)
            x, y = x - y, y - x
        if dx is not None:
            dx.addcmul_(w[:, None], y)
        if dy is not None:
            dy.index_put_((j,), w[:, None] * x, accumulate=True)

    def finish(self, dx: Tensor | None, dy: Tensor | None, places: Tensor) -> Gradients:
        """All gradients, once the extremes' are in dx and dy. places (K, N): the references that are extremes."""
        for k in self.extremes:
            self._add_extreme(k, places[k], dx, dx if self.launcher.square else dy)
        dtype = self.launcher.p.x.dtype
        dx, dy = (None if g is None else g.to(dtype) for g in (dx, dy))
        return Gradients(dx, dy, self.scale, self.offset, self.ref_offset)
