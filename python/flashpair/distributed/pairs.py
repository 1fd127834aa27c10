"""`Pairs` of a batch that processes share: each has its own anchors' rows, against the references of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pieced import FetchedRows, PiecedPairs, in_pieces
from ..rows import sorted_rows
from ..schedule import accumulator
from ..similarity import poison
from .ranks import Ranks, Total
from .walks import WALKS, RankWalk


class SharedPairs(PiecedPairs):
    """This process's anchors (n, D) against all references; `row_losses` of a criterion gives its rows' losses.

    What it asks of all rows (`total`) is of all processes, so that every process must ask for it.
    """

    walk: RankWalk

    @property
    def ranks(self) -> Ranks:
        return self.walk.ranks

    def total(self, values: Tensor) -> Tensor:
        total: Tensor = Total.apply(self.ranks, values.sum(-1))
        return total

    def total_logsumexp(self, values: Tensor) -> Tensor:
        peak = torch.cat([values.detach(), values.new_full((1,), -torch.inf)]).max()
        peak = self.ranks.max(peak)
        peak = torch.where(peak.isinf(), 0.0, peak)
        some = values != -torch.inf
        mass = self.total(torch.where(some, torch.exp(torch.where(some, values, peak) - peak), 0.0))
        return torch.where(mass > 0, torch.where(mass > 0, mass, 1.0).log() + peak, -torch.inf)

    def most_positives(self, most: int | None = None) -> int:
        if most is not None:
            return most
        count = torch.cat([self.num_positives(), self.labels.new_ones(1)])
        return int(self.ranks.max(count.max()))

    def sum_steps(self, most: int) -> range:
        """Every ordered pair is found from both of its ends, so that nothing has to go to the other's process."""
        return range(1, most + 1)

    def sums(self, step: int) -> tuple[SharedPairs, Tensor, Tensor, Tensor]:
        lo, hi = self._interval()
        at = self.own_places()
        partner = lo + (at - lo + step) % (hi - lo).clamp_min(1)
        x, walk = self.x.to(self.dtype), self.walk.singly()
        wanted = self.walk.known()[1][partner] if len(partner) else partner
        other = FetchedRows.apply(walk, x, x, wanted)
        sums = SharedPairs(x + other, self.plan.order, walk, False, self.distance, self.impl, x)
        return sums, (x * other).sum(1), partner, step < hi - lo

    def at_both_ends(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        return torch.where(first, values, 0.0)


def of_batch(
    ranks: Ranks, schedule: str, impl: str, distance: str, unit: bool, x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """Of this process's embeddings (n, D) with labels (n,), all processes' having `sizes` rows."""
    chosen = in_pieces(impl, x)
    every = ranks.gather(labels, sizes)
    ordered, order = torch.sort(labels, stable=True)
    walk = WALKS[schedule](ranks, ordered, order + sum(sizes[: ranks.rank]), every, True)
    rows = sorted_rows(x.to(accumulator(x.dtype)), order, unit=unit, impl=chosen)
    return SharedPairs(rows, order, walk, True, distance, chosen)


def of_references(
    ranks: Ranks, schedule: str, impl: str, distance: str, unit: bool, x: Tensor, labels: Tensor, y: Tensor,
    ref_labels: Tensor, sizes: list[int],
) -> SharedPairs:  # fmt: skip
    """The same against all processes' references, of which this one has y (m, D) with ref_labels (m,)."""
    chosen = in_pieces(impl, x)
    every = ranks.gather(ref_labels, sizes)
    ordered, order = torch.sort(labels, stable=True)
    walk = WALKS[schedule](ranks, ordered, order, every, False)
    wide = torch.promote_types(accumulator(x.dtype), y.dtype)
    rows = sorted_rows(x.to(wide), order, unit=unit, impl=chosen)
    refs = sorted_rows(y.to(wide), torch.sort(ref_labels, stable=True).indices, unit=unit, impl=chosen)
    return SharedPairs(rows, order, walk, False, distance, chosen, refs)
