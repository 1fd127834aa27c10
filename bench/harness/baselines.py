"""pytorch-metric-learning's loss of the same kind as one of family_cases.py, called as flashpair's are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..studies.family_cases import FAMILY
from .cases import Case


class NotThere(Exception):
    """A variant does not have this loss, or cannot run on this machine; the message says why."""


class BaselineLoss:
    """Loss and miner in one call. Class losses start from flashpair's weights; `as_ours` converts their gradient.

    Args:
        function: the loss, of embeddings, labels, mined indices, references and their labels.
        miner: None, or the miner of the indices.
        ours: None, or flashpair's weights (C, D) or (C, K, D).
    """

    def __init__(self, function: Any, miner: Any = None, ours: Tensor | None = None) -> None:
        self.function, self.miner = function, miner
        self.weight: nn.Parameter | None = None
        if ours is not None:
            (self.weight,) = function.parameters()
            rows = ours.detach().flatten(0, -2)  # (C, D), or all centres, class by class
            self.turned = self.weight.shape != rows.shape or type(function).__name__ not in PROXIES
            with torch.no_grad():
                self.weight.data = (rows.T if self.turned else rows).contiguous().clone()

    def as_ours(self, gradient: Tensor) -> Tensor:
        return gradient.T if self.turned else gradient

    def __call__(
        self, x: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        mined = None if self.miner is None else self.miner(x, labels, ref_emb, ref_labels)
        return self.function(x, labels, mined, ref_emb, ref_labels)


PROXIES = ("ProxyNCALoss", "ProxyAnchorLoss")  # the other losses keep a class's weights in a column


def make_baseline(case: Case) -> BaselineLoss:
    """Raises NotThere."""
    family = FAMILY[case.options.loss]
    if family.baseline is None:
        raise NotThere("it has no loss of this formula")
    if case.options.loss == "n_pairs" and not case.square:
        raise NotThere("its NPairsLoss takes no references")
    try:
        import pytorch_metric_learning as package
        from pytorch_metric_learning import distances, losses, miners  # noqa: F401
    except ImportError as error:
        raise NotThere(f"pytorch-metric-learning is not installed: {error}") from error
    sized = (case.options.num_classes, case.d) if family.centres else ()
    made = family.baseline(package, *sized)
    function, miner = made if isinstance(made, tuple) else (made, None)
    ours = None
    if family.centres:
        ours = family.build("reference", *sized, seed=case.options.seed).weight.to(case.options.torch_dtype)
        function = function.to(case.options.device)
    return BaselineLoss(function, miner, ours)
