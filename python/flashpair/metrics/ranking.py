"""What ranked metrics share: checks, and the nearest references' labels, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.similarity import upcast
from ..engine import nearest

DISTANCES = {"cosine": ("dot", True), "dot": ("dot", False), "euclidean": ("euclidean", False)}


class Search(NamedTuple):
    """Queries and the gallery that they are ranked in, checked.

    Attributes:
        queries: (N, D).
        labels: (N,) int64.
        gallery: (M, D). None: the queries themselves; a query is never its own reference.
        gallery_labels: (M,) int64.
        relevant: (N,) int64, the number of references with the query's label.
        distance: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.
    """

    queries: Tensor
    labels: Tensor
    gallery: Tensor | None
    gallery_labels: Tensor
    relevant: Tensor
    distance: str
    impl: str

    @property
    def size(self) -> int:
        """How many references a query is ranked against."""
        return self.gallery_labels.shape[0] - (self.gallery is None)

    def ranked(self, depth: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of a block of queries, which ones, and what is nearest to them, best first: labels (B, depth) and scores,
        similarities or minus distances."""
        metric, unit = DISTANCES[self.distance]
        with torch.no_grad():
            x, y, screened = nearest.prepared(self.queries, depth, self.gallery, metric, unit, self.impl)
            for first, found in nearest.blocks(x, y, depth, metric, screened=screened):
                scores = -found.values if metric == "euclidean" else found.values
                yield slice(first, first + len(scores)), self.gallery_labels[found.indices], scores


def search(embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, distance: str, impl: str) -> Search:
    """Checks the arguments. Raises as a criterion's call does, and ValueError for overflow or an empty gallery."""
    x, labels, y, refs_labels = checks.batch(embeddings, labels, ref_emb, ref_labels)
    checks.word(distance, DISTANCES, "distance")
    for name, rows in (("embeddings", x), ("ref_emb", y)):
        wide = None if rows is None else upcast(rows.detach(), None)[0]
        if wide is not None and not (torch.linalg.vecdot(wide, wide) < torch.finfo(wide.dtype).max / 4).all():
            raise ValueError(f"{name} must be finite, and so must their squares, got NaN, infinity or overflow")
    of = labels if refs_labels is None else refs_labels
    if x.shape[0] == 0 or of.shape[0] <= (y is None):
        where = "embeddings must have two rows or more" if y is None else "embeddings and ref_emb must not be empty"
        raise ValueError(f"{where}, got {x.shape[0]} queries and {of.shape[0]} references")
    known, sizes = of.unique(return_counts=True)
    place = torch.searchsorted(known, labels).clamp(max=known.shape[0] - 1)
    relevant = torch.where(known[place] == labels, sizes[place], 0) - int(y is None)
    return Search(x.detach(), labels, None if y is None else y.detach(), of, relevant, distance, impl)
