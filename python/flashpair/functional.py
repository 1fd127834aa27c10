"""The losses of pairs as functions, with their classes' arguments and defaults, for code that keeps its own
hyper-parameters. Each function's docstring is made from its class's."""

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


def _docstring(name: str, kind: type[losses.Criterion]) -> str | None:
    """The class's docstring with the arguments of a call and an example; None where Python runs without docstrings."""
    if kind.__doc__ is None:
        return None
    text, *parts = re.split(r"^(Args|Shape|Raises|Examples):\n", inspect.cleandoc(kind.__doc__), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    references = REFERENCES if kind.takes_references else ""
    example = EXAMPLE.format(name=name, kind=kind.__name__)
    return (
        f"{text}It is `{kind.__name__}` as a function.\n\nArgs:\n{CALL}{references}{sections['Args']}"
        f"Shape:\n{sections['Shape']}Returns:\n    The loss.\n\nRaises:\n{sections['Raises']}Examples:\n{example}"
    )


CALL = """\
    embeddings: (N, D), float16 to float64.
    labels: (N,), integers.
"""
REFERENCES = """\
    ref_emb: (M, D), `References` or `StreamedReferences`; None (the default): the batch itself.
    ref_labels: (M,), integers, with a tensor as `ref_emb`.
"""
EXAMPLE = """\
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> loss = flashpair.functional.{name}(x, labels)
    >>> torch.equal(loss, flashpair.{kind}()(x, labels))
    True
"""


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
    function.__doc__ = _docstring(function.__name__, kind)
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

for _written, _kind in (
    (multi_similarity_loss, losses.MultiSimilarityLoss),
    (n_pairs_loss, losses.NPairsLoss),
    (lifted_structure_loss, losses.LiftedStructureLoss),
    (generalized_lifted_structure_loss, losses.GeneralizedLiftedStructureLoss),
    (lifted_structure_star_loss, losses.LiftedStructureStarLoss),
):
    _written.__doc__ = _docstring(_written.__name__, _kind)
