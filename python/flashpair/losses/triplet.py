"""Triplet losses: every triplet (Schroff et al., CVPR 2015; Musgrave et al., 2020), the hardest of each anchor
(Hermans et al., 2017, eq. 5), and semi-hard ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.distances import ENGINE_WORDS
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.similarity import softplus
from .base import Criterion, RowLosses, Terms
from .declaration import MARGIN, Search, Source, loss
from .papers import HERMANS_2017, SCHROFF_2015
from .positive_blocks import sum_of_blocks

KEPT_BLOCKS = 2  # with more blocks of positives than these, backward recomputes each block
TRIPLETS = ("all", "hard", "semihard", "semihard_all")


@loss(
    key="triplet_margin",
    group="rows",
    sources=(
        Source(SCHROFF_2015),
        Source(HERMANS_2017, "eq. 5"),
    ),
    forms={
        "": {},
        "(distance='cosine', smooth=True)": {"distance": "cosine", "smooth": True},
        "(power=2)": {"power": 2},
        "(triplets='hard')": {"triplets": "hard"},
        "(triplets='semihard')": {"triplets": "semihard"},
        "(triplets='semihard_all')": {"distance": "cosine", "triplets": "semihard_all"},
    },
    searches={"": Search({"margin": MARGIN}), "_hard": Search({"margin": MARGIN}, {"triplets": "hard"})},
)
class TripletMarginLoss(Criterion):
    """Triplet margin loss: each negative farther than each positive by a margin (Schroff et al., 2015).

    For a triplet of anchor a, positive p and negative n, with Euclidean distances D or cosines s:

        d = D_ap^power - D_an^power + margin    or    d = s_an - s_ap + margin
        loss of the triplet = max(0, d), or log(1 + e^d) with smooth=True

    `triplets` selects which of them count:

    - ``"all"``: every triplet of the batch;
    - ``"hard"``: for each anchor its farthest positive and nearest negative (Hermans et al., 2017, eq. 5);
    - ``"semihard"``: for each positive pair the nearest negative that is farther than the positive, or the farthest
      negative if there is none (the choice of TensorFlow Addons);
    - ``"semihard_all"``: every triplet with 0 < D_an - D_ap <= margin.

    Comparisons are strict. Equal rows are equally far: an exact copy of the positive is not "farther".

    Args:
        margin: a number or a learnable tensor ().
        distance: ``"euclidean"`` (the default) or ``"cosine"``.
        triplets: ``"all"`` (the default), ``"hard"``, ``"semihard"`` or ``"semihard_all"``.
        smooth: replace the hinge max(0, d) by log(1 + e^d).
        power: 1 (the default), or 2 for squared Euclidean distances (FaceNet).
        max_positives: the largest number of positives an anchor can have, if known (M - 1 with M samples a class).
            Without it the batch is inspected, which waits for the GPU and breaks a compiled graph. The loss of an
            anchor with more positives is NaN. Not needed for ``"hard"``.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"nonzero"`` (the default): mean over triplets with a loss above 0; ``"mean"``: over all triplets
            (``"hard"``: over N anchors; ``"semihard_all"``: over the triplets of ``"all"``). Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `margin` is not a number or tensor, `smooth` or `normalize` not a bool, `power` or `max_positives`
            not an int.
        ValueError: power 2 with cosines; ``smooth=True`` with semi-hard triplets; an unknown `distance`, `triplets`,
            `power`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.TripletMarginLoss(distance="cosine")(x, labels).item(), 4)
        0.4
    """

    shown = ("margin", "distance", "triplets", "smooth", "power", "max_positives")

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        distance: str = "euclidean",
        triplets: str = "all",
        smooth: bool = False,
        power: int = 1,
        max_positives: int | None = None,
        *,
        normalize: bool = True,
        reduction: str = "nonzero",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")
        self.triplets = checks.word(triplets, TRIPLETS, "triplets")
        self.smooth = checks.flag(smooth, "smooth")
        self.power = checks.integer(power, "power", (1, 2))
        self.max_positives = checks.most(max_positives, "max_positives")
        self.distance = ENGINE_WORDS[checks.word(distance, ("euclidean", "cosine"), "distance")]
        if power == 2 and distance == "cosine":
            raise ValueError("power must be 1 with distance 'cosine', got 2")
        if smooth and triplets.startswith("semihard"):
            raise ValueError(f"smooth must be False with triplets {triplets!r}, got True")
        if power == 2:
            self.distance = "squared_euclidean"

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": "cosine" if self.distance == "dot" else "euclidean"}

    @property
    def sign(self) -> float:
        """A negative's z times this is what a triplet's loss rises with."""
        return 1.0 if self.distance == "dot" else -1.0

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        return self._hardest(pairs) if self.triplets == "hard" else self._by_positives(pairs)

    def _hardest(self, pairs: PairAccess) -> RowLosses:
        far, near = ("min", "max") if self.sign > 0 else ("max", "min")
        pos, neg = pairs.reduce(Reduction(far, "positives"), Reduction(near, "negatives"))
        valid = (pairs.num_positives() > 0) & (pairs.num_negatives() > 0)
        d = self.sign * (torch.where(valid, neg, 0.0) - torch.where(valid, pos, 0.0)) + self.margin
        losses = torch.where(valid, softplus(d) if self.smooth else d.relu(), 0.0)
        return RowLosses(losses, valid, valid.shape[0])

    def _by_positives(self, pairs: PairAccess) -> RowLosses:
        """A few reductions over the negatives for each place in the list of positives."""
        most = pairs.most_positives(self.max_positives)
        each = self._nearest_farther if self.triplets == "semihard" else self._sums

        def run(block: range) -> tuple[Tensor, ...]:
            z, there = pairs.positives(most, block)
            return each(pairs, z.T, there.T & (pairs.num_negatives() > 0))

        losses, above = sum_of_blocks(run, pairs.positive_blocks(most), KEPT_BLOCKS, pairs.labels.device)
        positives, negatives = pairs.num_positives(), pairs.num_negatives()
        if self.max_positives is not None:
            losses = torch.where(positives > self.max_positives, torch.nan, losses)
        count = positives * ((negatives > 0) if self.triplets == "semihard" else negatives)
        above = count if self.smooth else above
        return RowLosses(losses, count > 0, count.sum(), (Terms(losses, count, above),))

    def _sums(self, pairs: PairAccess, z: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The sum (N,) of the triplets with the positives z (K, N), and how many of them are above 0."""
        offset = torch.where(there, self.margin - self.sign * z, -torch.inf)
        limit = torch.where(there, z - self.sign * self.margin, self.sign * torch.inf).detach()
        near, far = ("lower", "upper") if self.sign > 0 else ("upper", "lower")
        window: list[dict[str, Any]] = [{near: row} for row in limit]
        if self.triplets == "semihard_all":
            for row, options in zip(z.detach(), window, strict=True):
                options[far] = row
            offset = torch.where(there, offset, 0.0)
        phi = "softplus" if self.smooth else "hinge"
        bounds = window if self.triplets == "semihard_all" else [{}] * len(window)
        sums = [
            Reduction("sum", "negatives", phi, scale=self.sign, offset=o, **w)
            for o, w in zip(offset, bounds, strict=True)
        ]
        counts = []
        if self.reduction == "nonzero" and not self.smooth:
            counts = [Reduction("count", "negatives", detach=True, **w) for w in window]
        rows = pairs.reduce(*sums, *counts)
        losses = torch.stack(rows[: len(sums)]).sum(0)
        return losses, torch.stack(rows[len(sums) :]).sum(0) if counts else torch.zeros_like(losses)

    def _nearest_farther(self, pairs: PairAccess, z: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """As `_sums`, of the one triplet of each positive."""
        near, far, side = ("max", "min", "upper") if self.sign > 0 else ("min", "max", "lower")
        each = [Reduction(near, "negatives", **{side: row}) for row in z.detach()]
        *nearest, last = pairs.reduce(*each, Reduction(far, "negatives"))
        chosen = torch.stack(nearest)
        chosen = torch.where(chosen.isinf(), last, chosen)
        d = self.sign * (torch.where(there, chosen, 0.0) - z) + self.margin
        each_loss = torch.where(there, d.relu(), 0.0)
        return each_loss.sum(0), (each_loss > 0).sum(0)
