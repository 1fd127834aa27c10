"""Retrieval: Recall@K, P@1, R-Precision, MAP@R, and the accuracy of a vote among the nearest neighbours.

Every query ranks its gallery, by default all other embeddings. A query is left out of its own gallery by its index, and
equal similarities rank by the gallery's order. No N x M matrix is stored: a block of queries at a time keeps the labels
of as many nearest references as the metrics need.
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
    """Averages over queries (or classes), each from 0 to 1; the result of `retrieval`.

    Attributes:
        recall: for each K, the share of queries with a reference of their class among the K nearest (Recall@K; Oh Song
            et al., 2016).
        precision_at_1: the share of queries whose nearest reference is of their class.
        r_precision: r / R, where R references have the query's class and r of its R nearest do.
        map_at_r: 1/R times the sum of the precision at i, over the ranks i <= R whose reference has the query's class
            (Musgrave et al., 2020, eq. 3-4).
        queries: how many queries were averaged.
        lone: how many queries have no reference of their class.
    """

    recall: dict[int, float]
    precision_at_1: float
    r_precision: float
    map_at_r: float
    queries: int
    lone: int


class QueryScores(NamedTuple):
    """The scores of each query, (N,) tensors on the embeddings' device; the result of `query_scores`.

    Attributes:
        first_hit: int64, the rank of the nearest reference of its class, from 1 on; 0 if it is not among the `depth`
            nearest.
        r_precision: float64; 0 where there is no reference of the class.
        map_at_r: float64; 0 where there is no reference of the class.
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
    """Recall@K, P@1, R-Precision and MAP@R: how well the nearest references match the query's class (Musgrave et al.,
    2020).

    With R references of the query's class, and P(i) the share of its i nearest that are of its class:

        R-Precision = P(R)
        MAP@R = 1/R sum_{i <= R, the i-th is of the class} P(i)

    The time goes into finding the max(R, K) nearest references of each query (`flashpair.nearest`). Memory beside the
    embeddings is bounded, except for a few numbers for each query.

    Args:
        embeddings: (N, D) queries, float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), the gallery, a tensor or `References`; None: the other embeddings.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        recall_at: one K of Recall@K, or several. A K above the gallery's size means the whole gallery.
        lone: what to do with queries that have no reference of their class. ``"skip"``, the default, leaves them out,
            as in pytorch-metric-learning; ``"miss"`` counts them as 0, as in Oh Song et al., 2016.
        average: ``"micro"`` (the default) over queries, ``"macro"`` over the averages of the queries' classes.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. labels: (N,), ref_labels: (M,), integers.
        - output: `Retrieval`.

    Returns:
        A `Retrieval`.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, embeddings that are not finite, or no query to average.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> found = flashpair.metrics.retrieval(x, labels, recall_at=(1, 2))
        >>> found.recall, found.map_at_r
        ({1: 0.5, 2: 1.0}, 0.5)
    """
    counts = [checks.integer(k, "recall_at", at_least=1) for k in several(recall_at, "recall_at", "ints")]
    checks.word(lone, ("skip", "miss"), "lone")
    checks.word(average, ("micro", "macro"), "average")
    found = search(embeddings, labels, ref_emb, ref_labels, distance, impl)
    scores = _scores(found, max(counts, default=1))
    known = found.relevant > 0
    kept = known if lone == "skip" else torch.ones_like(known)
    if not kept.any():
        raise ValueError(
            f"labels must have a reference of some query's class, got none for {len(kept)} queries (lone='skip')"
        )

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
    """The scores of each query that `retrieval` averages.

    Args:
        embeddings: (N, D) queries, float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), the gallery, a tensor or `References`; None: the other embeddings.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        depth: how many ranks to search for `first_hit`, at least 1. The other scores use R ranks, whatever `depth` is.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. labels: (N,), ref_labels: (M,), integers.
        - output: `QueryScores`, tensors (N,).

    Returns:
        A `QueryScores`.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or embeddings that are not finite.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> flashpair.metrics.query_scores(x, labels, depth=3).first_hit.tolist()
        [1, 2, 2, 1]
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
        hits: (Q, K) bool, nearest first: whether the reference has the query's class.
        relevant: (Q,) int64, at most K: R, the number of references of the query's class.
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
    """The majority class among the k nearest references. Of equally frequent classes, the nearest reference's wins.

    Args:
        embeddings: (N, D), float16 to float64.
        ref_emb: (M, D), of known classes, a tensor or `References`.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        k: how many references vote, 1 to M.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. ref_labels: (M,), integers.
        - output: (N,) int64.

    Returns:
        (N,) int64.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or embeddings that are not finite.

    Examples:
        >>> flashpair.metrics.knn_labels(torch.tensor([[0.8, 0.6]]), torch.eye(2), torch.tensor([7, 9])).tolist()
        [7]
    """
    if ref_emb is None:
        raise ValueError("ref_emb must be the embeddings of known classes, got None")
    nobody = torch.zeros(checks.embeddings(embeddings).shape[0], dtype=torch.int64, device=embeddings.device)
    return _votes(search(embeddings, nobody, ref_emb, ref_labels, distance, impl), k)


def knn_accuracy(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None, ref_labels: Tensor | None = None,
    *, k: int = 1, distance: str = "cosine", impl: str = "auto",
) -> float:  # fmt: skip
    """The share of embeddings that have the majority class of their k nearest references (`knn_labels`).

    All embeddings count, also those whose class no reference has.

    Args:
        embeddings: (N, D) queries, float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), the gallery, a tensor or `References`; None: the other embeddings.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        k: how many references vote, 1 to M.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``.
        impl: of `flashpair.nearest`.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. labels: (N,), ref_labels: (M,), integers.
        - output: a float.

    Returns:
        A float from 0 to 1.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or embeddings that are not finite.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> flashpair.metrics.knn_accuracy(x, labels)
        0.5
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
            chosen.append(labels.gather(1, votes.argmax(1, keepdim=True))[:, 0])  # the first one is the nearest
    return torch.cat(chosen)
