"""Retrieval by cosine similarity: P@1, R-Precision and MAP@R.

As in A Metric Learning Reality Check (Musgrave et al., ECCV 2020). Every item is a query against all
others: removed from its own gallery by index, ties going to the lowest index. Queries whose class has no
other item are left out of the averages. The N x N similarities are made in chunks of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Retrieval(NamedTuple):
    """Averages over the queries, each between 0 and 1."""

    precision_at_1: float
    r_precision: float
    map_at_r: float


def retrieval(embeddings: Tensor, labels: Tensor, *, chunk: int = 512) -> Retrieval:
    """The metrics of embeddings (N, D), of any float type and any length, with integer labels (N,).

    Raises:
        ValueError: an embedding that is not finite, or no two labels alike.
    """
    scores = per_query(embeddings, labels, chunk=chunk)
    scores = scores[~scores.isnan().any(1)]
    if not len(scores):
        raise ValueError(f"labels must hold some class twice, got {len(labels)} that all differ")
    return Retrieval(*scores.mean(0).tolist())


def per_query(embeddings: Tensor, labels: Tensor, *, chunk: int = 512) -> Tensor:
    """The three metrics of each query, (N, 3) float64: NaN where no other item shares the label."""
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, got NaN or infinity")
    x = torch.nn.functional.normalize(embeddings.detach().double(), dim=1)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    relevant = sizes[classes] - 1
    depth = max(int(relevant.max()), 1)
    scores = []
    for rows in torch.arange(len(x), device=x.device).split(chunk):
        similarity = x[rows] @ x.T
        similarity.scatter_(1, rows[:, None], -torch.inf)
        ranking = torch.sort(similarity, dim=1, descending=True, stable=True).indices[:, :depth]
        scores.append(rank_scores(labels[ranking] == labels[rows, None], relevant[rows]))
    return torch.cat(scores)


def rank_scores(hits: Tensor, relevant: Tensor) -> Tensor:
    """The three metrics (Q, 3) float64 of rankings cut at K.

    Args:
        hits: (Q, K) bool, nearest first: does the reference share the query's label?
        relevant: (Q,) int64, at most K: R, how many references do.
    """
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (ranks <= relevant[:, None])
    precision = hits.cumsum(1).double() / ranks
    columns = hits[:, 0].double(), hits.sum(1).double() / relevant, (precision * hits).sum(1) / relevant
    return torch.stack(columns, dim=1).masked_fill(relevant[:, None] == 0, torch.nan)
