"""Angular loss (Wang et al., ICCV 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess, PairReducer
from ..core.reduction import Reduction
from ..core.similarity import softplus
from .base import Criterion, RowLosses, Terms
from .declaration import Range, Search, Source, loss
from .papers import WANG_2017
from .positive_blocks import sum_of_blocks

SLACK = 16  # a hinge at most this many roundings (of terms up to 1 + 4 tan^2) above 0 counts as 0


@loss(
    key="angular",
    group="rows",
    sources=(Source(WANG_2017),),
    forms={"": {}, "(form='hinge')": {"alpha": 30.0, "form": "hinge"}},
    searches={"": Search({"alpha": Range(10.0, 60.0)})},
)
class AngularLoss(Criterion):
    """Angular loss: bounds the angle at the negative of each triplet (Wang et al., 2017).

    With t = tan(alpha) and unit vectors x, for each ordered positive pair (a, p):

        form="logsumexp":  L_ap  = log(1 + sum_N e^(4 t^2 (x_a + x_p) . x_n - 2 (1 + t^2) x_a . x_p))
        form="hinge":      L_apn = max(0, |x_a - x_p|^2 - 4 t^2 |x_n - (x_a + x_p) / 2|^2)    for every triplet

    An anchor's loss is the sum of its pairs' (triplets').

    Args:
        alpha: the angle in degrees, above 0 and below 90 (45 and 40 are common).
        form: ``"logsumexp"`` (the default) or ``"hinge"``.
        max_positives: the largest number of positives an anchor can have, if known; see `TripletMarginLoss`.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by the number of ordered positive pairs, those without a negative
            counting as 0 (``"hinge"``: by the number of triplets); ``"nonzero"`` of ``"hinge"``: over triplets above 0
            by more than rounding. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers. No references.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `alpha` is not a number (tensors are not taken), `max_positives` not an int, `normalize` not a bool.
        ValueError: `alpha` is not above 0 and below 90; the hinge with ``normalize=False``; an unknown `form`,
            `reduction` or `impl`; in a call, `ref_emb` (the loss needs the products of positives with negatives).

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.AngularLoss(alpha=30.0)(x, labels).item(), 4)
        0.5045
    """

    takes_references = False
    shown = ("alpha", "form", "max_positives")

    def __init__(
        self,
        alpha: float = 40.0,
        form: str = "logsumexp",
        max_positives: int | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.alpha = checks.plain_number(alpha, "alpha", above=0)
        if alpha >= 90:
            raise ValueError(f"alpha must be under 90 degrees, got {alpha!r}")
        self.form = checks.word(form, ("logsumexp", "hinge"), "form")
        if form == "hinge" and not normalize:
            raise ValueError("normalize must be True with form 'hinge', got False")
        self.max_positives = checks.most(max_positives, "max_positives")

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        blocks = pairs.pair_sum_blocks(pairs.most_positives(self.max_positives))
        each = self._hinges if self.form == "hinge" else self._logsumexps

        def run(steps: range) -> tuple[Tensor, Tensor]:
            found = []
            for step in steps:
                sums, z, other, first = pairs.pair_sums(step)
                found.append([pairs.symmetrize(part, other, first) for part in each(sums, z)])
            losses, above = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
            return losses, above

        losses, above = sum_of_blocks(run, blocks, 1, pairs.labels.device)
        positives = pairs.num_positives()
        if self.max_positives is not None:
            losses = torch.where(positives > self.max_positives, torch.nan, losses)
        if self.form == "logsumexp":
            return RowLosses(losses, positives > 0, positives.sum())
        triplets = positives * pairs.num_negatives()
        return RowLosses(losses, triplets > 0, triplets.sum(), (Terms(losses, triplets, above),))

    def _logsumexps(self, sums: PairReducer, z: Tensor) -> tuple[Tensor, Tensor]:
        t2 = math.tan(math.radians(self.alpha)) ** 2
        (neg,) = sums.reduce(Reduction("logsumexp", "negatives", scale=4 * t2))
        return softplus(neg - 2 * (1 + t2) * z), torch.zeros_like(z)

    def _hinges(self, sums: PairReducer, z: Tensor) -> tuple[Tensor, Tensor]:
        """|x_a - x_p|^2 - 4 t^2 |x_n - c|^2 = 4 t^2 (x_a + x_p) . x_n + offset, c = (x_a + x_p) / 2, of unit rows."""
        t2 = math.tan(math.radians(self.alpha)) ** 2
        offset = 2 - 2 * z - 4 * t2 * (1 + (1 + z) / 2)
        (loss,) = sums.reduce(Reduction("sum", "negatives", "hinge", scale=4 * t2, offset=offset))
        if self.reduction != "nonzero":
            return loss, torch.zeros_like(loss)
        # The hinge of three equal rows is 0 up to rounding, and must not count as above 0.
        slack = SLACK * torch.finfo(z.dtype).eps * (1 + 4 * t2)
        (above,) = sums.reduce(Reduction("count", "negatives", lower=((slack - offset) / (4 * t2)).detach()))
        return loss, above
