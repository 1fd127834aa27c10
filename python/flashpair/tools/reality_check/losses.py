"""The losses that a comparison knows by name, and the search space of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ... import losses
from ...losses import ClassCriterion, Criterion
from ..import_target import criterion


class Range(NamedTuple):
    """The range in which a hyper-parameter is searched for.

    Attributes:
        low: the least value.
        high: the largest value.
        log: search on a logarithmic scale; then `low` is above 0.
    """

    low: float
    high: float
    log: bool = False


class Candidate(NamedTuple):
    """A loss to compare.

    Attributes:
        make: makes the criterion from values of `space`, and for a loss with class weights also from ``num_classes``
            and ``embedding_size``.
        space: the hyper-parameters that are searched for.
        of_classes: whether the loss has class weights or proxies.
    """

    make: Callable[..., Criterion]
    space: Mapping[str, Range]
    of_classes: bool = False


MARGIN, POSITIVE, SCALE = Range(0.0, 1.0), Range(0.01, 1.0, log=True), Range(1.0, 100.0, log=True)

LOSSES: dict[str, Candidate] = {
    "angular": Candidate(losses.AngularLoss, {"alpha": Range(10.0, 60.0)}),
    "arcface": Candidate(
        losses.ArcFaceLoss, {"margin": Range(0.0, 57.0), "scale": Range(1.0, 256.0, log=True)}, True
    ),
    "binomial_deviance": Candidate(
        losses.BinomialDevianceLoss, {"alpha": SCALE, "beta": SCALE, "base": MARGIN}
    ),
    "circle": Candidate(losses.CircleLoss, {"m": MARGIN, "gamma": Range(1.0, 256.0, log=True)}),
    "contrastive": Candidate(losses.ContrastiveLoss, {"pos_margin": MARGIN, "neg_margin": Range(0.2, 1.8)}),
    "cosface": Candidate(
        losses.CosFaceLoss, {"margin": MARGIN, "scale": Range(1.0, 256.0, log=True)}, True
    ),
    "fast_ap": Candidate(lambda num_bins: losses.FastAPLoss(round(num_bins)), {"num_bins": Range(4.0, 50.0)}),
    "generalized_lifted_structure": Candidate(
        lambda margin: losses.GeneralizedLiftedStructureLoss(margin, "euclidean"), {"margin": Range(0.0, 2.0)}
    ),
    "histogram": Candidate(lambda n_bins: losses.HistogramLoss(round(n_bins)), {"n_bins": Range(10.0, 200.0)}),
    "margin": Candidate(
        lambda margin, beta: losses.MarginLoss(margin, beta=beta, learn_beta=True),
        {"margin": Range(0.0, 0.6), "beta": Range(0.4, 1.6)},
    ),
    "multi_similarity": Candidate(
        losses.MultiSimilarityLoss,
        {"alpha": Range(0.5, 50.0, log=True), "beta": SCALE, "base": MARGIN, "epsilon": MARGIN},
    ),
    "multi_similarity_unmined": Candidate(
        lambda **given: losses.MultiSimilarityLoss(**given, epsilon=None),
        {"alpha": Range(0.5, 50.0, log=True), "beta": SCALE, "base": MARGIN},
    ),
    "n_pairs": Candidate(losses.NPairsLoss, {"l2_weight": Range(1e-4, 1.0, log=True)}),
    "nca": Candidate(losses.NCALoss, {"softmax_scale": SCALE}),
    "normalized_softmax": Candidate(losses.NormalizedSoftmaxLoss, {"temperature": POSITIVE}, True),
    "nt_xent": Candidate(losses.NTXentLoss, {"temperature": POSITIVE}),
    "proxy_anchor": Candidate(losses.ProxyAnchorLoss, {"margin": MARGIN, "alpha": SCALE}, True),
    "proxy_nca": Candidate(losses.ProxyNCALoss, {"softmax_scale": SCALE}, True),
    "snr_contrastive": Candidate(
        losses.SNRContrastiveLoss,
        {"pos_margin": Range(0.0, 0.5), "neg_margin": MARGIN, "regularizer_weight": Range(1e-3, 1.0, log=True)},
    ),
    "soft_triple": Candidate(
        lambda centers_per_class, **given: losses.SoftTripleLoss(
            centers_per_class=round(centers_per_class), **given
        ),
        {"centers_per_class": Range(1.0, 10.0), "la": SCALE, "gamma": POSITIVE, "margin": MARGIN},
        True,
    ),
    "sup_con": Candidate(losses.SupConLoss, {"temperature": POSITIVE}),
    "triplet": Candidate(losses.TripletMarginLoss, {"margin": Range(0.0, 1.0)}),
    "triplet_hard": Candidate(
        lambda margin: losses.TripletMarginLoss(margin, triplets="hard"), {"margin": Range(0.0, 1.0)}
    ),
    "tuplet_margin": Candidate(
        losses.TupletMarginLoss, {"margin": Range(0.0, 30.0), "scale": SCALE}
    ),
}  # fmt: skip


def candidate(name: str) -> Candidate:
    """A loss of `LOSSES` by its name, or your own `flashpair.Criterion` as FILE.py:Name or module:Name.

    Your own can have a class attribute ``search_space``, a dict from argument names to `Range`s (or tuples like them).
    Without it there is no search: a trial is a training with the defaults.

    Args:
        name: a key of `LOSSES`, FILE.py:Name or module:Name.

    Returns:
        A `Candidate`.

    Raises:
        ValueError: there is no such loss, or its search space is invalid.

    Examples:
        >>> from flashpair.tools.reality_check import candidate
        >>> candidate("nt_xent").space["temperature"]
        Range(low=0.01, high=1.0, log=True)
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise ValueError(f"a loss is FILE.py:Name, module:Name or one of {', '.join(LOSSES)}; got {name!r}")
    kind = criterion(name)
    try:
        space = {key: Range(*given) for key, given in getattr(kind, "search_space", {}).items()}
        if not all(0 * r.high == 0 and (0 if r.log else -float("inf")) < r.low < r.high for r in space.values()):
            raise TypeError("low must be below high, and above 0 where log is")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"search_space of {name} must map names to (low, high, log): {error}") from error
    return Candidate(kind, space, issubclass(kind, ClassCriterion))
