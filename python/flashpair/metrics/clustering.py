"""Clustering: how well k-means finds the classes. Needs scikit-learn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.extras import extra
from ..core.similarity import upcast


class Clustering(NamedTuple):
    """Scores of a partition against the classes, each from 0 to 1; over pairs of samples but for the first and last.

    Attributes:
        nmi: normalised mutual information, 2 I / (H + H) (the arithmetic mean, as Song et al., 2016).
        f1, precision, recall: of the pairs put together, against those of one class. f1 as Song et al., 2016.
        rand_index: how many pairs are rightly together or apart.
        purity: how many samples have the commonest class of their cluster.
    """

    nmi: float
    f1: float
    precision: float
    recall: float
    rand_index: float
    purity: float


def clustering_scores(labels: Tensor, clusters: Tensor) -> Clustering:
    """Of samples' clusters (N,) against their classes (N,), both integers.

    Raises:
        TypeError, ValueError: bad arguments, named. ImportError: without scikit-learn.
    """
    with extra("metrics", "clustering_scores"):
        from sklearn.metrics import normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix

    if checks.labels_dtype(labels).dim() != 1:
        raise TypeError(f"labels must be an integer tensor of shape (N,), got {checks.what(labels)}")
    samples = torch.empty(labels.shape[0], 1, device="cpu")
    truth, found = (
        checks.labels(checks.labels_dtype(t, name).cpu(), samples, name, whose="labels").numpy()
        for t, name in ((labels, "labels"), (clusters, "clusters"))
    )
    if not len(truth):
        raise ValueError("labels must be of some samples, got none")
    (apart, joined), (split, together) = pair_confusion_matrix(truth, found).tolist()

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 1.0  # where there are no such pairs, none is wrong

    return Clustering(
        nmi=float(normalized_mutual_info_score(truth, found)),
        f1=share(2 * together, 2 * together + joined + split),
        precision=share(together, together + joined),
        recall=share(together, together + split),
        rand_index=share(apart + together, apart + together + joined + split),
        purity=float(contingency_matrix(truth, found, sparse=True).max(axis=0).sum() / len(truth)),
    )


def clustering(embeddings: Tensor, labels: Tensor, *, unit: bool = True, seeds: int = 1, **kmeans: Any) -> Clustering:
    """Scores of scikit-learn's k-means with as many clusters as classes.

    Args:
        embeddings, labels: (N, D), (N,).
        unit: L2-normalise embeddings first.
        seeds: the scores are the means of k-means from random states 0 to ``seeds - 1``.
        kmeans: what `sklearn.cluster.KMeans` takes, but for ``n_clusters`` and ``random_state``. Thousands of clusters
            begin faster with ``init="random"``.

    Raises:
        TypeError, ValueError: bad arguments, named; embeddings that are not finite. ImportError: without scikit-learn.
    """
    with extra("metrics", "clustering"):
        from sklearn.cluster import KMeans

    x, labels, _, _ = checks.batch(embeddings, labels, None, None)
    if x.shape[0] == 0:
        raise ValueError("embeddings must be of some samples, got none")
    checks.flag(unit, "unit")
    seeds = checks.integer(seeds, "seeds", at_least=1)
    x = upcast(x.detach(), None)[0]
    samples = (torch.nn.functional.normalize(x, dim=1) if unit else x).cpu().numpy()
    classes = labels.unique().shape[0]
    found = [
        clustering_scores(labels, torch.from_numpy(KMeans(classes, random_state=seed, **kmeans).fit_predict(samples)))
        for seed in range(seeds)
    ]
    return Clustering(*(sum(scores) / seeds for scores in zip(*found, strict=True)))
