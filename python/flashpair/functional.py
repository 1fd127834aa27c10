"""Some criteria as functions, N-pair, the lifted structures and Multi-Similarity: the same arguments and defaults, for
code that keeps its own hyper-parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import losses


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
    criterion = losses.NPairsLoss(variant, l2_weight, l2_kind, normalize=normalize, reduction=reduction, impl=impl)
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
    criterion = losses.LiftedStructureLoss(margin, normalize=normalize, reduction=reduction, impl=impl)
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
    criterion = losses.GeneralizedLiftedStructureLoss(
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
    criterion = losses.LiftedStructureStarLoss(
        alpha, beta, epsilon, normalize=normalize, reduction=reduction, impl=impl
    )
    return criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def _function(kind: type[losses.Criterion]) -> Callable[..., Tensor]:
    """A criterion of pairs as a function: its own arguments and defaults, after the embeddings and labels of a call."""
    of_class = inspect.signature(kind)
    keyword = inspect.Parameter.KEYWORD_ONLY
    call = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("embeddings", "labels")
    ]
    refs = [
        inspect.Parameter(name, keyword, default=None, annotation="Tensor | None") for name in ("ref_emb", "ref_labels")
    ]
    own = list(of_class.parameters.values())
    first = [p for p in own if p.kind is not keyword]
    last = [p for p in own if p.kind is keyword]
    signature = inspect.Signature(
        [*call, *first, *(refs if kind.takes_references else ()), *last], return_annotation="Tensor"
    )

    def function(*arguments: Any, **options: Any) -> Tensor:
        bound = signature.bind(*arguments, **options).arguments
        of_call = {name: bound.pop(name) for name in ("embeddings", "labels", "ref_emb", "ref_labels") if name in bound}
        loss: Tensor = kind(**bound)(**of_call)
        return loss

    name = kind.__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    function.__name__ = function.__qualname__ = NAMES.get(name, words)
    function.__doc__ = f"`{name}` of embeddings (N, D) and labels (N,); its arguments are the class's."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


NAMES = {
    "NTXentLoss": "ntxent_loss", "NCALoss": "nca_loss", "SNRContrastiveLoss": "snr_contrastive_loss",
    "FastAPLoss": "fastap_loss", "SupConLoss": "supcon_loss",
}  # fmt: skip

contrastive_loss = _function(losses.ContrastiveLoss)
snr_contrastive_loss = _function(losses.SNRContrastiveLoss)
triplet_margin_loss = _function(losses.TripletMarginLoss)
binomial_deviance_loss = _function(losses.BinomialDevianceLoss)
bin_lifted_loss = _function(losses.BinLiftedLoss)
mined_pair_loss = _function(losses.MinedPairLoss)
nca_loss = _function(losses.NCALoss)
ntxent_loss = _function(losses.NTXentLoss)
supcon_loss = _function(losses.SupConLoss)
circle_loss = _function(losses.CircleLoss)
tuplet_margin_loss = _function(losses.TupletMarginLoss)
intra_pair_variance_loss = _function(losses.IntraPairVarianceLoss)
margin_loss = _function(losses.MarginLoss)
angular_loss = _function(losses.AngularLoss)
histogram_loss = _function(losses.HistogramLoss)
fastap_loss = _function(losses.FastAPLoss)
