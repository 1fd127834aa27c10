"""What losses against class weights share: B embeddings against C classes, whose B x C logits are never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked.class_weights import class_pairs, proxy_pairs
from ..core import checks
from ..core.pairs import PairAccess
from ..core.similarity import nan_unless_finite
from .base import Criterion, RowLosses


class ClassCriterion(Criterion):
    """Base of the losses of embeddings (N, D) against learned class weights (C, D); the N x C logits are never stored.

    A subclass defines `row_losses`, as with `Criterion`; the row of a sample is its similarities to all classes, of
    which its own class is the one positive. With the class attribute ``anchors = "proxies"`` a row is a class instead,
    against all samples.

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        normalize: L2-normalise the embeddings first (the default). Class weights are always normalised.
        reduction: see `Criterion`.
        impl: see `Criterion`.

    Attributes:
        weight: Parameter (C, D), initialised from a normal distribution; its rows are normalised inside. Give it to the
            optimizer.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, or `normalize` not a bool.
        ValueError: a size is below 1; an unknown `reduction` or `impl`; in a call, labels outside of [0, C) (on a GPU
            the device asserts this), embeddings of another width, or `ref_emb`.

    Examples:
        >>> class Cosine(flashpair.ClassCriterion):  # 1 - the cosine with the own class
        ...     def row_losses(self, pairs):
        ...         (own,) = pairs.reduce(flashpair.Reduction("sum", "positives"))
        ...         return flashpair.RowLosses(1 - own, pairs.num_positives() > 0, own.shape[0])
        >>> criterion = Cosine(2, 2, normalize=True, reduction="mean", impl="auto")
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(torch.tensor([[0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 1])).item(), 4)
        0.2
    """

    takes_references = False
    shown: tuple[str, ...] = ("num_classes", "embedding_size")
    init_sets = "embedding_size"
    init_takes = "num_classes, embedding_size, normalize=..., reduction=..., impl=..."

    def __init__(self, num_classes: int, embedding_size: int, *, normalize: bool, reduction: str, impl: str) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.num_classes = checks.integer(num_classes, "num_classes", at_least=1)
        self.embedding_size = checks.integer(embedding_size, "embedding_size", at_least=1)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def check(
        self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, labels, y, ref_labels = super().check(embeddings, labels, ref_emb, ref_labels)
        checks.width(x, self.embedding_size)
        return x, checks.classes(labels, self.num_classes), y, ref_labels

    def pairs_of(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str) -> PairAccess:
        if self.anchors == "proxies":
            return proxy_pairs(self.weight, x, labels, self.normalize, impl)
        return class_pairs(x, labels, self.weight, self.normalize, impl)

    def not_finite(self, x: Tensor, y: Tensor | None) -> Tensor:
        return nan_unless_finite(x, self.weight)

    def refuses_parts(self) -> str | None:
        """Why the classes cannot be split over processes (`flashpair.distributed.shard_classes`); None: they can."""
        return None

    def rows_of_parts(
        self, x: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor], logsumexp: Callable[[Tensor], Tensor]
    ) -> RowLosses | None:
        """The row losses of all samples where classes are split over processes; for a class that overrides `rows`.

        Args:
            x: (N, D), the samples of all processes.
            labels: (N,), negative or at least the number of this process's classes for other processes' classes.
            total: the sum over processes of row values (N,).
            logsumexp: the log-sum-exp over processes of row values (N,).

        Returns:
            `RowLosses`, or None to compute them from `row_losses`.
        """
        return None
