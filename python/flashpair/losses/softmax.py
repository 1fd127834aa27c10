"""Losses that are a softmax over an anchor's pairs: neighbourhood components analysis (Goldberger et al., NIPS 2004),
NT-Xent (Chen et al., ICML 2020, eq. 1) and supervised contrastive (Khosla et al., NeurIPS 2020, eq. 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.distances import ENGINE_WORDS, argument_word
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from .base import Criterion, RowLosses
from .declaration import POSITIVE, SCALE, Search, Source, loss
from .papers import CHEN_2020, GOLDBERGER_2004, KHOSLA_2020, WANG_2019


@loss(
    key="nca",
    group="pairs",
    sources=(
        Source(GOLDBERGER_2004),
        Source(WANG_2019, "supplement, eq. 1"),
    ),
    forms={"": {}, "(distance='cosine')": {"softmax_scale": 16.0, "distance": "cosine"}},
    searches={"": Search({"softmax_scale": SCALE})},
)
class NCALoss(Criterion):
    """Neighbourhood components analysis (Goldberger et al., 2004; Wang et al., 2019, supplement, eq. 1).

    With z = -D^2 (squared Euclidean distance) or z = s (cosine), P anchor i's positives:

        L_i = -log(sum_P e^(softmax_scale z_ip) / sum_{k != i} e^(softmax_scale z_ik))

    Anchors without a positive have no loss.

    Args:
        softmax_scale: above 0; a number or a learnable tensor ().
        distance: ``"squared_euclidean"`` (the default) or ``"cosine"``.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean_valid"`` (the default): mean over anchors with a positive. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `softmax_scale` is not a number or tensor, `normalize` not a bool.
        ValueError: `softmax_scale` is not above 0; an unknown `distance`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.NCALoss()(x, labels).item(), 4)
        0.668
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
        self.distance = ENGINE_WORDS[checks.word(distance, ("squared_euclidean", "cosine"), "distance")]

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": argument_word(self.distance)}

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        scale = self.softmax_scale if self.distance == "dot" else -self.softmax_scale
        pos, every = pairs.reduce(
            Reduction("logsumexp", "positives", scale=scale), Reduction("logsumexp", "all", scale=scale)
        )
        valid = pairs.num_positives() > 0
        losses = torch.where(valid, every, 0.0) - torch.where(valid, pos, 0.0)
        return RowLosses(losses, valid, valid.shape[0])


@loss(
    key="nt_xent",
    group="pairs",
    sources=(Source(CHEN_2020, "eq. 1 (SimCLR), with labels"),),
    searches={"": Search({"temperature": POSITIVE})},
)
class NTXentLoss(Criterion):
    """NT-Xent, SimCLR's normalised temperature-scaled cross entropy, by labels (Chen et al., 2020, eq. 1).

    With cosines s, for each ordered positive pair (i, p) against all negatives N of anchor i:

        L_ip = log(1 + sum_N e^((s_in - s_ip) / temperature))

    Other positives are not in the denominator. With two views of each sample it is SimCLR's loss. An anchor's loss is
    the sum of its positive pairs'.

    Args:
        temperature: above 0; a number or a learnable tensor ().
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by the number of ordered positive pairs. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `temperature` is not a number or tensor, `normalize` not a bool.
        ValueError: `temperature` is not above 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.NTXentLoss(temperature=0.5)(x, labels).item(), 4)
        0.668
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        scale = 1 / self.temperature
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=scale))
        (losses,) = pairs.reduce(Reduction("sum", "positives", "softplus", scale=-scale, offset=neg))
        positives = pairs.num_positives()
        return RowLosses(losses, positives > 0, positives.sum())


@loss(
    key="sup_con",
    group="pairs",
    sources=(Source(KHOSLA_2020, "eq. 2"),),
    forms={"": {"temperature": 0.1, "base_temperature": 0.07}},
    searches={"": Search({"temperature": POSITIVE})},
)
class SupConLoss(Criterion):
    """Supervised contrastive loss, the form L_out (Khosla et al., 2020, eq. 2).

    With cosines s; all positives are in the denominator, too:

        L_i = -mean_P log(e^(s_ip / temperature) / sum_{a != i} e^(s_ia / temperature))

    Anchors without a positive have no loss.

    Args:
        temperature: above 0; a number or a learnable tensor ().
        base_temperature: None (the default), or a number above 0: the loss is multiplied by
            temperature / base_temperature, as in the authors' code (0.07).
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean_valid"`` (the default): mean over anchors with a positive. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `temperature` is not a number or tensor, `base_temperature` not a number, `normalize` not a bool.
        ValueError: a temperature is not above 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.SupConLoss(temperature=0.5)(x, labels).item(), 4)
        0.668
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
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
