"""The forward pass that `fused`, `tiled` and `screened` share: stages of terms, their launches, and the merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core.problem import Operands, Problem, Terms, num_rows, stages
from ...core.similarity import nan_unless_finite
from .kernels.operands import ForwardOperands
from .launcher import Launcher, PairBlock
from .term_groups import shared_extremes


class ForwardPass:
    """What the terms' launches fill: values (K + ..., N), see core/problem.py, and the ranks of extremes.

    A backend takes the terms stage by stage, gives each group of them states, launches what adds pairs to these, and
    merges them.
    """

    def __init__(self, p: Problem, terms: Terms, operands: Operands, keep: bool) -> None:
        self.launcher = Launcher(p, terms, operands)
        self.terms, self.anchors = terms, self.launcher.anchors()
        self.splits = self.launcher.splits(self.anchors)
        n, dtype, device = self.launcher.n, self.launcher.dtype, self.launcher.device
        self.values = torch.empty(num_rows(terms), n, dtype=dtype, device=device)
        self.nonfinite = nan_unless_finite(p.x, p.y).to(dtype)
        shape = places_shape(n, terms, keep)
        self._ranks = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._shared: dict[int, int] = {}

    def stages(self, share: bool = True) -> Iterator[list[int]]:
        """The terms to launch, in the order in which their windows become known.

        share: without the extremes that a logsumexp has anyway, which are merged with it.
        """
        for stage in stages(self.terms):
            self._shared = shared_extremes(self.terms, self.launcher.operands, stage) if share else {}
            yield [k for k in stage if k not in self._shared]

    def _index(self, k: int) -> Tensor | None:
        """Where a term's index goes (N,), if it is wanted."""
        return self._ranks[k] if self._ranks.numel() and self.terms[k].indexed else None

    def state(self, k: int, splits: int, live: Tensor | None = None) -> ForwardOperands:
        return self.launcher.forward_operands(k, splits, self._index(k) is not None, self.values, live)

    def reduce_all_pairs(self, group: Sequence[int], live: dict[int, Tensor] | None = None) -> None:
        """The values of one or two terms over all pairs, from the embeddings."""
        states = [self.state(k, self.splits, (live or {}).get(k)) for k in group]
        self.launcher.reduce(group, states, self.anchors, self.all_pairs, self.splits)
        self.merge(group, states)

    @property
    def all_pairs(self) -> PairBlock:
        return PairBlock(0, self.launcher.n, 0, self.launcher.m)

    def merge(self, group: Sequence[int], states: Sequence[ForwardOperands]) -> None:
        """The values of some terms from their states, and of the extremes that these have."""
        for k, state in zip(group, states, strict=True):
            self.launcher.merge(k, state, self.nonfinite, self.values, self._index(k))
            for extreme in (e for e, logsumexp in self._shared.items() if logsumexp == k):
                largest = ForwardOperands(row_max=state.row_max)
                self.launcher.merge(extreme, largest, self.nonfinite, self.values, None)

    def places(self) -> Tensor:
        """Sorted places (K, N) of the references that are extremes, -1 where there is none."""
        return self.launcher.places(self._ranks) if self._ranks.numel() else self._ranks


def places_shape(n: int, terms: Terms, keep: bool) -> tuple[int, int]:
    """Of the places of extremes, which backward needs: (K, N), (0, N) if there are none."""
    return (len(terms) if keep and any(t.indexed for t in terms) else 0), n
