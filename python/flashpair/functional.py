"""Some criteria as functions, N-pair, the lifted structures and Multi-Similarity: the same arguments and defaults, for
code that keeps its own hyper-parameters."""

from __future__ import annotations

from torch import Tensor

from . import criteria


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 50.0,
    base: float | Tensor = 0.5,
    epsilon: float | None = 0.1,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`MultiSimilarityLoss` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.MultiSimilarityLoss(
        alpha, beta, base, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def n_pairs_loss(
    embeddings: Tensor,
    labels: Tensor,
    variant: str = "mc",
    l2_weight: float | Tensor = 0.0,
    l2_kind: str = "mean_sq",
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`NPairsLoss` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.NPairsLoss(variant, l2_weight, l2_kind, normalize=normalize, reduction=reduction, impl=impl)
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Tensor = 1.0,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`LiftedStructureLoss` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.LiftedStructureLoss(margin, normalize=normalize, reduction=reduction, impl=impl)
    return criterion(embeddings, labels)


def generalized_lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Tensor = 1.0,
    distance: str = "cosine",
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`GeneralizedLiftedStructureLoss` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.GeneralizedLiftedStructureLoss(
        margin, distance, normalize=normalize, reduction=reduction, impl=impl
    )
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def lifted_structure_star_loss(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 50.0,
    epsilon: float | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`LiftedStructureStarLoss` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.LiftedStructureStarLoss(
        alpha, beta, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
