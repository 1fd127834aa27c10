"""One exponential for both ends of a pair in a square problem's backward pass.

A softmax weight of pair (i, j) is exp((z_ij - top_i) scale - rest_i) from one end and exp((z_ij - top_j) scale -
rest_j) from the other. With the largest top of all rows in place of both, it is one exponential times a factor of each
row. That is exact enough where no row's own sum is far below the largest, which is decided on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import LOGSUMEXP, Terms
from .kernels import tile
from .kernels.operands import BackwardOperands

SPREAD = {
    torch.float32: 60.0,
    torch.float64: 600.0,
}  # of logsumexps, within which e^(their difference) is a safe factor
EXACT = 8.0  # of which the same factor's rounding is none to speak of
LOG2E = tile.LOG2E.value


class SharedTops:
    """The shared tops of a problem's logsumexps, each computed once a backward pass."""

    def __init__(self, terms: Terms, scales: Sequence[float], dtype: torch.dtype) -> None:
        self.terms, self.scales, self.dtype = terms, scales, dtype
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def apply(
        self, group: Sequence[int], reductions: Sequence[BackwardOperands]
    ) -> tuple[Sequence[BackwardOperands], Tensor | None]:
        """The operands with a shared top where they are of a logsumexp, and whether all are exact enough, () int8; None
        where there is no logsumexp."""
        gate, found = None, list(reductions)
        for place, (k, r) in enumerate(zip(group, reductions, strict=True)):
            t = self.terms[k]
            if t.op != LOGSUMEXP or t.transformed:
                continue
            if k not in self._known:
                self._known[k] = self._compute(k, r)
            shared_top, grad, exact = self._known[k]
            gate = exact if gate is None else gate & exact
            found[place] = r._replace(shared_top=shared_top, grad=grad, top=None, rest=None)
        return found, gate

    def _compute(self, k: int, r: BackwardOperands) -> tuple[Tensor, Tensor, Tensor]:
        """A z that no row's terms are larger than, (); dL/dr times what each row's weights relative to it are to be
        multiplied by, (N,); and whether that is exact enough, () int8.

        A difference in the exponent is rounded by itself, which counts for nothing beside how similarities themselves
        are rounded, where a row's largest term is as large.
        """
        scale = r.top.new_full((), float(self.scales[k])) if r.scale is None else r.scale
        sign, some = torch.where(scale < 0, -1.0, 1.0), r.rest < torch.inf
        top = torch.where(some, r.top * sign, -torch.inf).amax() * sign
        top = torch.where(top.isinf(), 0.0, top)
        gap = torch.where(some, (top - r.top) * scale - r.rest, 0.0)
        most = (EXACT + 2 * (r.top * scale).abs()).clamp_max(SPREAD[self.dtype])
        # As the kernel rounds the other half of the exponent.
        factor = torch.exp2((top - r.top) * (scale * LOG2E) - r.rest * LOG2E)
        return top, torch.where(some, r.grad * factor, 0.0), (gap <= most).all().to(torch.int8)
