"""Clustering: how well k-means finds the classes. Needs scikit-learn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.extras import extra
from ..core.similarity import upcast


class Clustering(NamedTuple):
    """Scores of a clustering against the classes, each from 0 to 1; the result of `clustering`.

    All but `nmi` and `purity` count pairs of samples.

    Attributes:
        nmi: normalised mutual information, 2 I / (H + H) (arithmetic mean, as Oh Song et al., 2016).
        f1: harmonic mean of precision and recall (as Oh Song et al., 2016).
        precision: of the pairs put into one cluster, the share that are of one class.
        recall: of the pairs of one class, the share put into one cluster.
        rand_index: the share of pairs that are correctly in one cluster or correctly in two.
        purity: the share of samples that have the most frequent class of their cluster.
    """

    nmi: float
    f1: float
    precision: float
    recall: float
    rand_index: float
    purity: float


def clustering_scores(labels: Tensor, clusters: Tensor) -> Clustering:
    """Scores of given clusters against the classes.

    Args:
        labels: (N,), integers, the samples' classes.
        clusters: (N,), integers, the samples' clusters.

    Shape:
        - labels, clusters: (N,), integers, N at least 1.
        - output: `Clustering`, six numbers.

    Returns:
        A `Clustering`.

    Raises:
        TypeError: labels or clusters of a wrong type.
        ValueError: shapes that do not fit, or no samples.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> scores = flashpair.metrics.clustering_scores(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 5, 7]))
        >>> scores.purity, round(scores.f1, 4)
        (0.75, 0.4)
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
        raise ValueError("labels must not be empty")
    (apart, joined), (split, together) = pair_confusion_matrix(truth, found).tolist()

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 1.0  # without such pairs, none is wrong

    return Clustering(
        nmi=float(normalized_mutual_info_score(truth, found)),
        f1=share(2 * together, 2 * together + joined + split),
        precision=share(together, together + joined),
        recall=share(together, together + split),
        rand_index=share(apart + together, apart + together + joined + split),
        purity=float(contingency_matrix(truth, found, sparse=True).max(axis=0).sum() / len(truth)),
    )


def clustering(
    embeddings: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    seeds: int = 1,
    unit: bool | None = None,
    **kmeans: Any,
) -> Clustering:
    """Scores of scikit-learn's k-means with as many clusters as classes (Oh Song et al., 2016).

    Args:
        embeddings: (N, D), float16 to float64.
        labels: (N,), integers.
        normalize: L2-normalise the embeddings first (the default).
        seeds: average the scores over k-means with random states 0 to ``seeds - 1``.
        unit: the old name of `normalize`, deprecated.
        kmeans: further arguments of `sklearn.cluster.KMeans`, except ``n_clusters`` and ``random_state``. Thousands of
            clusters start faster with ``init="random"``.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers, N at least 1.
        - output: `Clustering`, six numbers.

    Returns:
        A `Clustering`.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: shapes that do not fit, no samples, or embeddings that are not finite.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> x, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
        >>> flashpair.metrics.clustering(x, labels).purity
        1.0
    """
    with extra("metrics", "clustering"):
        from sklearn.cluster import KMeans

    x, labels, _, _ = checks.batch(embeddings, labels, None, None)
    if x.shape[0] == 0:
        raise ValueError("embeddings must not be empty")
    normalize = checks.flag(checks.renamed("clustering", "unit", unit, "normalize", normalize), "normalize")
    seeds = checks.integer(seeds, "seeds", at_least=1)
    x = upcast(x.detach(), None)[0]
    samples = (torch.nn.functional.normalize(x, dim=1) if normalize else x).cpu().numpy()
    classes = labels.unique().shape[0]
    found = [
        clustering_scores(labels, torch.from_numpy(KMeans(classes, random_state=seed, **kmeans).fit_predict(samples)))
        for seed in range(seeds)
    ]
    return Clustering(*(sum(scores) / seeds for scores in zip(*found, strict=True)))
