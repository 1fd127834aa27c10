"""Retrieval: Recall@K, P@1, R-Precision, MAP@R, and the accuracy of a vote among the nearest neighbours.

Every query ranks its gallery, by default all the other embeddings: itself is left out by its index, and equal
similarities rank by the gallery's order. Nothing of N x M is stored: a block of queries at a time keeps the labels of
its nearest, as many as the metrics look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..engine.cached_references import References
from .arguments import several
from .ranking import Search, search

VOTE_BYTES = 2**24  # of comparisons among the neighbours of a block of queries


class Retrieval(NamedTuple):
    """Averages over queries (or over classes), each from 0 to 1.

    Attributes:
        recall: of each K, how many queries have one of their class among the K nearest (Recall@K; Song et al., 2016).
        precision_at_1: how many have one of their class as the nearest.
        r_precision: r / R, where R is how many references have the query's class and r how many of the R nearest do.
        map_at_r: 1 / R times the sum of the precision at i over those ranks i up to R that are of the query's class
            (Musgrave et al., A Metric Learning Reality Check, ECCV 2020, eq. 3-4).
        queries: how many were averaged. lone: how many have no reference of their class.
    """

    recall: dict[int, float]
    precision_at_1: float
    r_precision: float
    map_at_r: float
    queries: int
    lone: int


class QueryScores(NamedTuple):
    """Of each query: (N,) tensors on the embeddings' device.

    Attributes:
        first_hit: int64, the rank of the nearest of its class, from 1 on; 0 if none is among the ranks looked at.
        r_precision, map_at_r: float64; 0 where there is no reference of the class.
        relevant: int64, how many references have its class.
    """

    first_hit: Tensor
    r_precision: Tensor
    map_at_r: Tensor
    relevant: Tensor


def retrieval(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None, ref_labels: Tensor | None = None,
    *, recall_at: int | Sequence[int] = (1, 2, 4, 8), lone: str = "skip", average: str = "micro",
    distance: str = "cosine", impl: str = "auto",
) -> Retrieval:  # fmt: skip
    """How well nearest references are of the query's class.

    Time is that of the nearest max(R, K) references of each query (`flashpair.nearest`); memory beside the embeddings
    is bounded, but for some numbers a query.

    Args:
        embeddings: (N, D) queries, float16 to float64.
        labels: (N,), integers.
        ref_emb, ref_labels: (M, D), (M,) the gallery, a tensor or `References`; None: the other embeddings.
        recall_at: the Ks of Recall@K, or one; one that is larger than the gallery means all of it.
        lone: queries without a reference of their class are ``"skip"``, not averaged (as in pytorch-metric-learning),
            or ``"miss"``, of score 0 (as Song et al. count them).
        average: ``"micro"`` over queries, ``"macro"`` over the averages of the queries' classes.
        distance: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.

    Raises:
        TypeError, ValueError: bad arguments, named; embeddings that are not finite; no query to average.
    """
    counts = [checks.integer(k, "recall_at", at_least=1) for k in several(recall_at, "recall_at", "ints")]
    checks.word(lone, ("skip", "miss"), "lone")
    checks.word(average, ("micro", "macro"), "average")
    found = search(embeddings, labels, ref_emb, ref_labels, distance, impl)
    scores = _scores(found, max(counts, default=1))
    known = found.relevant > 0
    kept = known if lone == "skip" else torch.ones_like(known)
    if not kept.any():
        raise ValueError(f"labels must be some reference's, got {len(kept)} queries without one (lone='skip')")

    def mean(values: Tensor) -> float:
        values, of = values[kept].double(), found.labels[kept]
        if average == "macro":
            classes, place = of.unique(return_inverse=True)
            sums = values.new_zeros(2, len(classes)).index_add_(
                1, place, torch.stack([values, torch.ones_like(values)])
            )
            values = sums[0] / sums[1]
        return values.mean().item()

    hit, rank = scores.first_hit > 0, scores.first_hit
    recall = {k: mean(hit & (rank <= k)) for k in counts}
    return Retrieval(
        recall, mean(rank == 1), mean(scores.r_precision), mean(scores.map_at_r), int(kept.sum()), int((~known).sum())
    )


def query_scores(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None, ref_labels: Tensor | None = None,
    *, depth: int = 1, distance: str = "cosine", impl: str = "auto",
) -> QueryScores:  # fmt: skip
    """The scores of each query that `retrieval` averages; arguments and errors as there.

    Args:
        depth: ranks to look at for `first_hit`, at least; as many as there are references of a class are anyway.
    """
    depth = checks.integer(depth, "depth", at_least=1)
    return _scores(search(embeddings, labels, ref_emb, ref_labels, distance, impl), depth)


def _scores(found: Search, depth: int) -> QueryScores:
    relevant = found.relevant
    first_hit = torch.zeros_like(relevant)
    scores = torch.zeros(2, *relevant.shape, dtype=torch.float64, device=relevant.device)
    for rows, labels, _ in found.ranked(min(found.size, max(depth, int(relevant.max())))):
        hits = labels == found.labels[rows, None]
        first_hit[rows] = torch.where(hits.any(1), hits.byte().argmax(1) + 1, 0)
        scores[:, rows] = rank_scores(hits, relevant[rows])
    return QueryScores(first_hit, scores[0], scores[1], relevant)


def rank_scores(hits: Tensor, relevant: Tensor) -> Tensor:
    """R-Precision and MAP@R (2, Q) float64 of rankings cut at K; 0 where R is.

    Args:
        hits: (Q, K) bool, nearest first: is the reference of the query's class?
        relevant: (Q,) int64, at most K: R, how many references are.
    """
    hits = hits[:, : max(1, int(relevant.max()))]
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (ranks <= relevant[:, None])
    precision = hits.cumsum(1).double() / ranks
    return torch.stack([hits.sum(1).double(), (precision * hits).sum(1)]) / relevant.clamp(min=1)


def knn_labels(
    embeddings: Tensor, ref_emb: Tensor | References, ref_labels: Tensor | None = None, *, k: int = 1,
    distance: str = "cosine", impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The class that most of the k nearest references have, (N,) int64; of equally frequent ones the nearest's.

    Args:
        embeddings: (N, D). ref_emb, ref_labels: (M, D), (M,), of known classes.
        k: how many vote, at most M.
        distance, impl: as of `retrieval`.

    Raises:
        TypeError, ValueError: bad arguments, named; embeddings that are not finite.
    """
    if ref_emb is None:
        raise ValueError("ref_emb must be the embeddings of known classes, got None")
    nobody = torch.zeros(checks.embeddings(embeddings).shape[0], dtype=torch.int64, device=embeddings.device)
    return _votes(search(embeddings, nobody, ref_emb, ref_labels, distance, impl), k)


def knn_accuracy(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None, ref_labels: Tensor | None = None,
    *, k: int = 1, distance: str = "cosine", impl: str = "auto",
) -> float:  # fmt: skip
    """How many embeddings have the class that most of their k nearest references have (`knn_labels`), from 0 to 1.

    All are counted, also those whose class no reference has. Arguments and errors as of `retrieval`.
    """
    found = search(embeddings, labels, ref_emb, ref_labels, distance, impl)
    return (_votes(found, k) == found.labels).double().mean().item()


def _votes(found: Search, k: Any) -> Tensor:
    k = checks.integer(k, "k", at_least=1)
    if k > found.size:
        raise ValueError(f"k must be at most {found.size}, the number of references, got {k}")
    chosen = []
    for _, nearest, _ in found.ranked(k):
        for labels in nearest.split(VOTE_BYTES // k**2 + 1):
            votes = (labels[:, :, None] == labels[:, None, :]).sum(2)
            chosen.append(labels.gather(1, votes.argmax(1, keepdim=True))[:, 0])  # the first, so the nearest
    return torch.cat(chosen)
