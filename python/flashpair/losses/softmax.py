"""Losses that are a softmax over an anchor's pairs: neighbourhood components analysis (Goldberger et al., NIPS 2004),
NT-Xent (Chen et al., ICML 2020, eq. 1) and supervised contrastive (Khosla et al., NeurIPS 2020, eq. 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from .base import AnyPairs, Criterion, RowLosses
from .distances import DISTANCES, similarity_of


class NCALoss(Criterion):
    """Neighbourhood components analysis (Goldberger et al., 2004; Wang et al., 2019, supplement, eq. 1):
    L_i = -log(sum_P e^(scale z) / sum_{k != i} e^(scale z)), z = -D^2 or s.

    Args:
        softmax_scale: above 0; a number or a learnable tensor ().
        distance: ``"squared_euclidean"`` or ``"cosine"``.
        normalize, reduction, impl: see `Criterion`; rows without a positive have no loss. Default: "mean_valid".
    """

    shown = ("softmax_scale", "distance")

    def __init__(
        self,
        softmax_scale: float | Tensor = 1.0,
        distance: str = "squared_euclidean",
        *,
        normalize: bool = True,
        reduction: str = "mean_valid",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.softmax_scale = checks.number(softmax_scale, "softmax_scale", above=0)
        self.distance = DISTANCES[checks.word(distance, ("squared_euclidean", "cosine"), "distance")]

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": similarity_of(self.distance)}

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        scale = self.softmax_scale if self.distance == "dot" else -self.softmax_scale
        pos, every = pairs.reduce(
            Reduction("logsumexp", "positives", scale=scale), Reduction("logsumexp", "all", scale=scale)
        )
        valid = pairs.num_positives() > 0
        losses = torch.where(valid, every, 0.0) - torch.where(valid, pos, 0.0)
        return RowLosses(losses, valid, valid.shape[0])


class NTXentLoss(Criterion):
    """Normalised temperature-scaled cross entropy (Chen et al., 2020, eq. 1), of labels.

    One term for each ordered positive pair: log(1 + sum_N e^((s_in - s_ip) / temperature)); other positives are not in
    the denominator. With two views of each sample it is SimCLR's loss.

    Args:
        temperature: above 0; a number or a learnable tensor ().
        normalize, reduction, impl: see `Criterion`; "mean" divides by the number of ordered positive pairs. A row's
            loss is the sum of its pairs'.
    """

    shown = ("temperature",)

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.temperature = checks.number(temperature, "temperature", above=0)

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        scale = 1 / self.temperature
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=scale))
        (losses,) = pairs.reduce(Reduction("sum", "positives", "softplus", scale=-scale, offset=neg))
        positives = pairs.num_positives()
        return RowLosses(losses, positives > 0, positives.sum())


class SupConLoss(Criterion):
    """Supervised contrastive loss, L_out (Khosla et al., 2020, eq. 2):
    L_i = -mean_P log(e^(s_ip / temperature) / sum_{a != i} e^(s_ia / temperature)), all positives in the denominator.

    Args:
        temperature: above 0; a number or a learnable tensor ().
        base_temperature: None, or a number above 0: the loss times temperature / base_temperature, as the authors' code
            has it (0.07).
        normalize, reduction, impl: see `Criterion`; rows without a positive have no loss. Default: "mean_valid".
    """

    shown = ("temperature", "base_temperature")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        base_temperature: float | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean_valid",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.temperature = checks.number(temperature, "temperature", above=0)
        self.base_temperature = (
            None if base_temperature is None else checks.plain_number(base_temperature, "base_temperature", above=0)
        )

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        scale = 1 / self.temperature
        pos, every = pairs.reduce(
            Reduction("sum", "positives", scale=scale), Reduction("logsumexp", "all", scale=scale)
        )
        positives = pairs.num_positives()
        valid = positives > 0
        losses = torch.where(valid, every, 0.0) - pos / positives.clamp_min(1)
        if self.base_temperature is not None:
            losses = losses * (self.temperature / self.base_temperature)
        return RowLosses(losses, valid, valid.shape[0])
