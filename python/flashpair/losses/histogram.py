"""Losses of soft histograms: histogram loss (Ustinova and Lempitsky, NIPS 2016), FastAP (Cakir et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import histogram
from .base import Criterion, RowLosses
from .declaration import Range, Search, Source, loss
from .papers import CAKIR_2019, USTINOVA_2016


def of_batch(loss: Tensor, some: Tensor, pairs: PairAccess) -> RowLosses:
    """Row losses of a loss () that is of the whole batch: each row has the same share."""
    n = pairs.labels.shape[0]
    every = pairs.batch_sum(torch.ones_like(pairs.labels)).clamp_min(1)
    return RowLosses((loss / every).expand(n), some.expand(n), n, shares=True)


@loss(
    key="histogram",
    group="histograms",
    sources=(Source(USTINOVA_2016),),
    forms={"": {"n_bins": 20}},
    searches={"": Search({"n_bins": Range(10.0, 200.0, integer=True)})},
)
class HistogramLoss(Criterion):
    """Histogram loss: the probability that a negative pair beats a positive one (Ustinova and Lempitsky, 2016).

    h+ and h- are soft histograms of the cosines of all positive and all negative pairs of the batch, each summing to 1,
    with nodes at -1 + 2 r / n_bins, r = 0 ... n_bins:

        L = sum_r h-_r sum_{q <= r} h+_q

    Without a positive pair or without a negative pair it is 0.

    Args:
        n_bins: at least 1; there are n_bins + 1 nodes.
        normalize: L2-normalise the embeddings and references first (the default); False: they must be unit vectors
            already.
        reduction: every reduction but ``"none"`` gives the one number L; ``"none"`` an equal share of it for each row.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `n_bins` is not an int, `normalize` not a bool.
        ValueError: `n_bins` is below 1; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.HistogramLoss(n_bins=4)(x, labels).item(), 4)
        0.23
    """

    shown = ("n_bins",)

    def __init__(
        self, n_bins: int = 100, *, normalize: bool = True, reduction: str = "mean", impl: str = "auto"
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.n_bins = checks.integer(n_bins, "n_bins", at_least=1)

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        nodes, step = self.n_bins + 1, 2 / self.n_bins
        rows = pairs.reduce(*histogram("positives", nodes, -1.0, step), *histogram("negatives", nodes, -1.0, step))
        pos, neg = (pairs.batch_sum(torch.stack(rows[k : k + nodes])) for k in (0, nodes))
        num_pos, num_neg = pairs.batch_sum(pairs.num_positives()), pairs.batch_sum(pairs.num_negatives())
        loss = (neg * pos.cumsum(0)).sum() / (num_pos.clamp_min(1).to(pos.dtype) * num_neg.clamp_min(1))
        some = (num_pos > 0) & (num_neg > 0)
        return of_batch(loss.masked_fill(~some, 0.0), some, pairs)


@loss(
    key="fast_ap",
    group="histograms",
    sources=(Source(CAKIR_2019),),
    searches={"": Search({"num_bins": Range(4.0, 50.0, integer=True)})},
)
class FastAPLoss(Criterion):
    """FastAP: one minus the average precision of each anchor's ranking, from soft histograms (Cakir et al., 2019).

    The histograms are of anchor i's squared Euclidean distances, in [0, 4] for unit vectors, with nodes at 4 l /
    num_bins, l = 0 ... num_bins. h+_l counts positives; H+_l and H_l are the cumulative counts of positives and of
    all:

        L_i = 1 - 1/|P| sum_l h+_l H+_l / H_l

    Anchors without a positive have no loss.

    Args:
        num_bins: at least 1; there are num_bins + 1 nodes.
        normalize: L2-normalise the embeddings and references first (the default); False: they must be unit vectors
            already.
        reduction: ``"mean_valid"`` (the default): mean over anchors with a positive. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `num_bins` is not an int, `normalize` not a bool.
        ValueError: `num_bins` is below 1; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.FastAPLoss()(x, labels).item(), 4)
        0.25
    """

    shown = ("num_bins",)

    def __init__(
        self, num_bins: int = 10, *, normalize: bool = True, reduction: str = "mean_valid", impl: str = "auto"
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.num_bins = checks.integer(num_bins, "num_bins", at_least=1)
        self.distance = "dot" if normalize else "squared_euclidean"

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        # for unit vectors D^2 = 2 - 2 s, and s is cheaper
        nodes, first, step = self.num_bins + 1, *((1.0, -2.0) if self.distance == "dot" else (0.0, 4.0))
        step /= self.num_bins
        rows = pairs.reduce(*histogram("positives", nodes, first, step), *histogram("negatives", nodes, first, step))
        pos, neg = torch.stack(rows[:nodes]), torch.stack(rows[nodes:])
        both = (pos + neg).cumsum(0)
        some = both > 0
        precision = torch.where(some, pos.cumsum(0) / torch.where(some, both, 1.0), 0.0)
        positives = pairs.num_positives()
        valid = positives > 0
        losses = torch.where(valid, 1 - (pos * precision).sum(0) / positives.clamp_min(1), 0.0)
        return RowLosses(losses, valid, valid.shape[0])
