"""Margin loss (Wu et al., ICCV 2017), with one boundary or one for each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from .base import Criterion, RowLosses, Terms
from .declaration import Range, Search, Source, loss
from .papers import WU_2017


@loss(
    key="margin",
    group="pairs",
    sources=(Source(WU_2017),),
    forms={"": {"nu": 0.01, "learn_beta": True}, "(mode='triplets')": {"mode": "triplets"}},
    searches={"": Search({"margin": Range(0.0, 0.6), "beta": Range(0.4, 1.6)}, {"learn_beta": True})},
)
class MarginLoss(Criterion):
    """Margin loss: positives within a learnable boundary, negatives beyond it (Wu et al., 2017).

    With Euclidean distances D and beta the boundary (of anchor i's class, if there is one for each):

        L_i = sum_P max(0, margin + D_ip - beta) + sum_N max(0, margin + beta - D_in) + nu beta

    Args:
        margin: alpha of the paper; a number or a learnable tensor ().
        nu: weight of the boundary's own term, at least 0. Its sum over rows (triplets) is divided as the pairs' losses
            are.
        beta: the boundary's initial value: a number, or a tensor () or (num_classes,), which is copied.
        mode: ``"pairs"`` (the default): each ordered pair once; ``"triplets"``: each pair as often as it occurs in a
            triplet of its anchor, so that an anchor needs a positive and a negative.
        learn_beta: make `beta` a Parameter of the criterion; otherwise it is a buffer.
        num_classes: None (the default): one boundary; C: one for each label in [0, C).
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"nonzero"`` (the default): mean over the pairs of both kinds, together, with a loss above 0.
            Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `margin` is not a number or tensor, `nu` not a number, `learn_beta` or `normalize` not a bool,
            `num_classes` not an int.
        ValueError: `nu` is below 0, `num_classes` below 1, `beta` of another shape; an unknown `mode`, `reduction` or
            `impl`; in a call, with `num_classes`, labels outside of [0, num_classes).

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.MarginLoss()(x, labels).item(), 4)
        0.7675
    """

    distance = "euclidean"
    shown: tuple[str, ...] = ("margin", "nu", "mode", "learn_beta", "num_classes")

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        nu: float = 0.0,
        beta: float | Tensor = 1.2,
        mode: str = "pairs",
        learn_beta: bool = False,
        num_classes: int | None = None,
        *,
        normalize: bool = True,
        reduction: str = "nonzero",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")
        self.nu = checks.plain_number(nu, "nu", at_least=0)
        self.mode = checks.word(mode, ("pairs", "triplets"), "mode")
        self.num_classes = checks.most(num_classes, "num_classes")
        start = torch.as_tensor(beta, dtype=None if isinstance(beta, Tensor) else torch.float64)
        wanted = () if num_classes is None else (num_classes,)
        if tuple(start.shape) not in ((), wanted):
            raise ValueError(f"beta must be a number or have shape {wanted}, got shape {tuple(start.shape)}")
        self.learn_beta = checks.flag(learn_beta, "learn_beta")
        if isinstance(beta, nn.Parameter) and tuple(beta.shape) == wanted:
            self.beta: Tensor = beta
        elif learn_beta:
            dtype = start.dtype if isinstance(beta, Tensor) else torch.get_default_dtype()
            self.beta = nn.Parameter(start.detach().to(dtype).expand(wanted).clone())
        else:
            self.register_buffer(
                "beta", start.detach().double().expand(wanted).clone()
            )  # float64, since float32 would round 1.2

    def hyperparameters(self) -> dict[str, object]:
        shared = (
            {"beta": self.beta.item()} if self.num_classes is None else {}
        )  # betas of all classes would be too long
        return {**super().hyperparameters(), **shared}

    def check(
        self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, labels, y, ref_labels = super().check(embeddings, labels, ref_emb, ref_labels)
        return x, labels if self.num_classes is None else checks.classes(labels, self.num_classes), y, ref_labels

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        beta = (self.beta if self.num_classes is None else self.beta[pairs.labels]).to(pairs.dtype)
        counts = []
        if self.reduction == "nonzero":
            counts = [
                Reduction("count", "positives", lower=(beta - self.margin).detach()),
                Reduction("count", "negatives", upper=(beta + self.margin).detach()),
            ]
        pos, neg, *above = pairs.reduce(
            Reduction("sum", "positives", "hinge", offset=self.margin - beta),
            Reduction("sum", "negatives", "hinge", scale=-1.0, offset=self.margin + beta),
            *counts,
        )
        num_pos, num_neg = pairs.num_positives(), pairs.num_negatives()
        times_pos, times_neg = (num_neg, num_pos) if self.mode == "triplets" else (1, 1)
        times_row = num_pos * num_neg if self.mode == "triplets" else 1
        penalty = self.nu * beta * times_row
        count = num_pos * times_pos + num_neg * times_neg
        nonzero = above[0] * times_pos + above[1] * times_neg if above else None
        if self.nu and nonzero is not None:  # without pairs above 0 the loss is 0, with no penalty
            penalty = torch.where(pairs.batch_sum(nonzero) > 0, penalty, 0.0)
        losses = pos * times_pos + neg * times_neg + penalty
        return RowLosses(losses, count > 0, losses.shape[0], (Terms(losses, count, nonzero),))
