"""The criteria as functions: the same names, arguments and defaults, for code that keeps its own hyper-parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import criteria


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """`MultiSimilarityLoss(**hyperparameters)` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.MultiSimilarityLoss(**hyperparameters)
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def n_pairs_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """`NPairsLoss(**hyperparameters)` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.NPairsLoss(**hyperparameters)
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def lifted_structure_loss(embeddings: Tensor, labels: Tensor, **hyperparameters: Any) -> Tensor:
    """`LiftedStructureLoss(**hyperparameters)` of embeddings (N, D) and labels (N,)."""
    return criteria.LiftedStructureLoss(**hyperparameters)(embeddings, labels)


def generalized_lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """`GeneralizedLiftedStructureLoss(**hyperparameters)` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.GeneralizedLiftedStructureLoss(**hyperparameters)
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def lifted_structure_star_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """`LiftedStructureStarLoss(**hyperparameters)` of embeddings (N, D) and labels (N,)."""
    criterion = criteria.LiftedStructureStarLoss(**hyperparameters)
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
