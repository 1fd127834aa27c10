"""The losses of pairs as functions, with the arguments and defaults of their classes, for code that keeps
its own hyper-parameters. Their docstrings are made from the classes'. Made by tests/support/generated.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import losses
from .losses.function_docstrings import describe as _describe
from .losses.function_docstrings import old_name as _old_name


def angular_loss(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float = 40.0,
    form: str = "logsumexp",
    max_positives: int | None = None,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`AngularLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.AngularLoss(alpha, form, max_positives, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels)
    return loss


def bin_lifted_loss(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 50.0,
    base: float | Tensor = 0.5,
    normalized: bool = False,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`BinLiftedLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.BinLiftedLoss(alpha, beta, base, normalized, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def binomial_deviance_loss(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 50.0,
    base: float | Tensor = 0.5,
    epsilon: float | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`BinomialDevianceLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.BinomialDevianceLoss(
        alpha, beta, base, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def circle_loss(
    embeddings: Tensor,
    labels: Tensor,
    m: float = 0.4,
    gamma: float = 80.0,
    over: str = "anchors",
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean_valid",
    impl: str = "auto",
) -> Tensor:
    """`CircleLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.CircleLoss(m, gamma, over, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    pos_margin: float | Tensor | None = 0.0,
    neg_margin: float | Tensor = 1.0,
    distance: str = "euclidean",
    power: int = 1,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "nonzero",
    impl: str = "auto",
) -> Tensor:
    """`ContrastiveLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.ContrastiveLoss(
        pos_margin, neg_margin, distance, power, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def fast_ap_loss(
    embeddings: Tensor,
    labels: Tensor,
    num_bins: int = 10,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean_valid",
    impl: str = "auto",
) -> Tensor:
    """`FastAPLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.FastAPLoss(num_bins, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


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
    criterion = losses.GeneralizedLiftedStructureLoss(
        margin, distance, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def histogram_loss(
    embeddings: Tensor,
    labels: Tensor,
    n_bins: int = 100,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`HistogramLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.HistogramLoss(n_bins, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def intra_pair_variance_loss(
    embeddings: Tensor,
    labels: Tensor,
    pos_eps: float = 0.01,
    neg_eps: float = 0.01,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`IntraPairVarianceLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.IntraPairVarianceLoss(pos_eps, neg_eps, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


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
    criterion = losses.LiftedStructureLoss(margin, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels)
    return loss


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
    criterion = losses.LiftedStructureStarLoss(
        alpha, beta, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.2,
    nu: float = 0.0,
    beta: float | Tensor = 1.2,
    mode: str = "pairs",
    learn_beta: bool = False,
    num_classes: int | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "nonzero",
    impl: str = "auto",
) -> Tensor:
    """`MarginLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.MarginLoss(
        margin, nu, beta, mode, learn_beta, num_classes, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def mined_pair_loss(
    embeddings: Tensor,
    labels: Tensor,
    epsilon: float = 0.1,
    weights: str = "unit",
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`MinedPairLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.MinedPairLoss(epsilon, weights, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


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
    criterion = losses.MultiSimilarityLoss(
        alpha, beta, base, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def nca_loss(
    embeddings: Tensor,
    labels: Tensor,
    softmax_scale: float | Tensor = 1.0,
    distance: str = "squared_euclidean",
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean_valid",
    impl: str = "auto",
) -> Tensor:
    """`NCALoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.NCALoss(softmax_scale, distance, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


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
    criterion = losses.NPairsLoss(variant, l2_weight, l2_kind, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`NTXentLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.NTXentLoss(temperature, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def snr_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    regularizer_weight: float = 0.0,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "nonzero",
    impl: str = "auto",
) -> Tensor:
    """`SNRContrastiveLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.SNRContrastiveLoss(
        pos_margin, neg_margin, regularizer_weight, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def sup_con_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean_valid",
    impl: str = "auto",
) -> Tensor:
    """`SupConLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.SupConLoss(temperature, base_temperature, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.2,
    distance: str = "euclidean",
    triplets: str = "all",
    smooth: bool = False,
    power: int = 1,
    max_positives: int | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "nonzero",
    impl: str = "auto",
) -> Tensor:
    """`TripletMarginLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.TripletMarginLoss(
        margin, distance, triplets, smooth, power, max_positives, normalize=normalize, reduction=reduction, impl=impl
    )
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


def tuplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 5.73,
    scale: float = 64.0,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """`TupletMarginLoss` of embeddings (N, D) and labels (N,)."""
    criterion = losses.TupletMarginLoss(margin, scale, normalize=normalize, reduction=reduction, impl=impl)
    loss: Tensor = criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
    return loss


_KINDS: dict[Callable[..., Tensor], type[losses.Criterion]] = {
    angular_loss: losses.AngularLoss,
    bin_lifted_loss: losses.BinLiftedLoss,
    binomial_deviance_loss: losses.BinomialDevianceLoss,
    circle_loss: losses.CircleLoss,
    contrastive_loss: losses.ContrastiveLoss,
    fast_ap_loss: losses.FastAPLoss,
    generalized_lifted_structure_loss: losses.GeneralizedLiftedStructureLoss,
    histogram_loss: losses.HistogramLoss,
    intra_pair_variance_loss: losses.IntraPairVarianceLoss,
    lifted_structure_loss: losses.LiftedStructureLoss,
    lifted_structure_star_loss: losses.LiftedStructureStarLoss,
    margin_loss: losses.MarginLoss,
    mined_pair_loss: losses.MinedPairLoss,
    multi_similarity_loss: losses.MultiSimilarityLoss,
    nca_loss: losses.NCALoss,
    n_pairs_loss: losses.NPairsLoss,
    nt_xent_loss: losses.NTXentLoss,
    snr_contrastive_loss: losses.SNRContrastiveLoss,
    sup_con_loss: losses.SupConLoss,
    triplet_margin_loss: losses.TripletMarginLoss,
    tuplet_margin_loss: losses.TupletMarginLoss,
}
for _function, _kind in _KINDS.items():
    _describe(_function, _kind)


def __getattr__(name: str) -> Any:
    return globals()[_old_name(name)]
