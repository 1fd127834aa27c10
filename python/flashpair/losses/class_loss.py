"""What losses against class weights share: B embeddings against C classes, whose B x C logits are never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked.class_weights import class_pairs, proxy_pairs
from ..core import checks
from ..core.similarity import poison
from .base import AnyPairs, Criterion, RowLosses


class ClassCriterion(Criterion):
    """A loss of embeddings (B, D) with labels in [0, C) against learned weights, one row a class, of unit norm.

    Attributes:
        weight: Parameter (C, D), normal; its rows are normalised inside. Give it to the optimizer.

    Raises:
        ValueError: labels outside of [0, C) (on a GPU the device asserts), embeddings of another width, or `ref_emb`.
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

    def pairs_of(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str) -> AnyPairs:
        if self.anchors == "proxies":
            return proxy_pairs(self.weight, x, labels, self.normalize, impl)
        return class_pairs(x, labels, self.weight, self.normalize, impl)

    def not_finite(self, x: Tensor, y: Tensor | None) -> Tensor:
        return poison(x, self.weight)

    def refuses_parts(self) -> str | None:
        """Why processes cannot share the classes out (`flashpair.distributed.shard_classes`); None: they can."""
        return None

    def rows_of_parts(
        self, x: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor], logsumexp: Callable[[Tensor], Tensor]
    ) -> RowLosses | None:
        """Of a class with `rows` of its own: those of all samples (B, D), `weight` being one process's part and
        `labels` outside of it for other processes' classes. total, logsumexp: over the parts, of row values (B,).
        None: as `row_losses` has them."""
        return None
