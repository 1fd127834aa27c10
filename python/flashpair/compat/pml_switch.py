"""How a loss of pytorch-metric-learning 2.9 is made into a criterion; `pml_losses` has the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..losses.base import Criterion
from .pml_margin import MarginLossWithPenalty
from .pml_parts import Similarity

ROWS = {"mean": "mean", "nonzero": "nonzero", "sum": "sum", "none": "none"}  # one element a row of the batch
VALID = {"mean": "mean_valid", "nonzero": "nonzero", "sum": "sum"}  # one element a row that has a loss
POSITIVES = {"mean": "mean", "sum": "sum"}  # one element a positive pair
REFERENCES = ("same references",)
PAIR_LOSS = ("one pair", *REFERENCES)
OF_KIND = {"euclidean": ("euclidean duplicates",), "snr": ("snr without variance",)}


@dataclass
class Asked:
    """A request: the loss, its parts in flashpair's words, and the divergences that come with them."""

    loss: Any
    similarity: Similarity
    reduction: str
    impl: str
    epsilon: float | None = None
    triplets: str = "all"

    @property
    def common(self) -> dict[str, Any]:
        return {"normalize": self.similarity.unit, "reduction": self.reduction, "impl": self.impl}

    @property
    def word(self) -> str:
        """The criteria's word for the similarity."""
        return "cosine" if self.similarity.kind == "dot" else self.similarity.kind


@dataclass(frozen=True)
class Switch:
    """How a loss is switched.

    Args:
        make: the criterion, from what is asked and the `numbers`.
        numbers: attributes of the loss.
        kinds: similarities that the criterion has; `raw`: also without normalised embeddings.
        reductions: from words of reducers to flashpair's.
        divergences: where the numbers are not the same, see `divergence.REASONS`, whatever the similarity is;
            `watched`: numbers of the loss that these depend on and the criterion does not know.
        weight: the parameter that is copied into ``criterion.weight``, and `layout`: to its shape, (C, D) or (C, K, D).
        fixed: required values of some attributes of the loss.
        refusals: further reasons to refuse a loss, by the word of its reducer.
    """

    make: Callable[..., Criterion]
    numbers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("dot",)
    raw: bool = True
    reductions: dict[str, str] = field(default_factory=lambda: ROWS)
    divergences: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    weight: str | None = None
    layout: Callable[[Any, Tensor], Tensor] = lambda loss, w: w
    fixed: dict[str, Any] = field(default_factory=dict)
    refusals: Callable[[Any, str | None], list[str]] = lambda loss, word: []

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the loss's parameters that are taken over."""
        return ("beta",) if self.weight is None else (self.weight,)


def lifted(a: Asked, neg: float, pos: float) -> Criterion:
    margin = pos - neg if a.similarity.kind == "dot" else neg - pos
    return losses.GeneralizedLiftedStructureLoss(margin, a.word, **a.common)


def contrastive(a: Asked, pos: float, neg: float) -> Criterion:
    if a.similarity.kind == "snr":
        return losses.SNRContrastiveLoss(pos, neg, **a.common)
    return losses.ContrastiveLoss(pos, neg, a.word, **a.common)


def triplet(a: Asked, margin: float, smooth: bool) -> Criterion:
    squared = a.similarity.kind == "squared_euclidean"
    distance = "euclidean" if squared else a.word
    return losses.TripletMarginLoss(margin, distance, a.triplets, smooth, 2 if squared else 1, **a.common)


def margin(a: Asked, margin: float, nu: float) -> Criterion:
    """A boundary that is not learned has no penalty; a single learned boundary has the penalty once."""
    beta, learn = a.loss.beta.detach().clone(), a.loss.learn_beta
    if len(beta) > 1:
        return losses.MarginLoss(margin, nu if learn else 0.0, beta, "triplets", learn, len(beta), **a.common)
    if not (learn and nu):
        return losses.MarginLoss(margin, 0.0, beta[0], "triplets", learn, **a.common)
    return MarginLossWithPenalty(margin, beta[0], nu, normalize=a.similarity.unit, impl=a.impl)


def margin_refusals(loss: Any, word: str | None) -> list[str]:
    if not (loss.learn_beta and loss.nu):
        return []
    found = [f"nu must be at least 0, got {loss.nu!r}"] if loss.nu < 0 else []
    once = len(loss.beta) == 1 and word == "sum"
    return [*found, *(["nu of one learned beta goes with DivisorReducer, got SumReducer"] if once else [])]


def histogram(a: Asked, delta: float) -> Criterion:
    return losses.HistogramLoss(round(2 / delta), **a.common)


def histogram_refusals(loss: Any, word: str | None) -> list[str]:
    whole = loss.delta > 0 and math.isclose(round(2 / loss.delta) * loss.delta, 2, rel_tol=1e-12)
    return [] if whole else [f"delta must be 2 / n_bins, n_bins an int, got {loss.delta!r}"]


def classes(name: str, *options: str) -> Callable[..., Criterion]:
    """A loss with class weights (C, D); its options in this order."""

    def make(a: Asked, *values: Any) -> Criterion:
        told = dict(zip(options, values, strict=True))
        if name == "ArcFaceLoss":
            told["margin"] = math.degrees(told["margin"])
        if name == "ProxyNCALoss":  # 2 - 2 s is what is scaled there, and s here
            told["softmax_scale"] = told["softmax_scale"] * (0.5 if a.similarity.kind == "dot" else 1.0)
            told["include_positive"] = True
        if name == "SphereFaceLoss":  # of cosines, times the norm
            told["normalize"] = False
        made: Criterion = getattr(losses, name)(*_sizes(a.loss), **{**a.common, **told})
        return made

    return make


def _sizes(loss: Any) -> tuple[int, int]:
    """C and D of a weight D x C or C x D."""
    if hasattr(loss, "W"):
        return loss.W.shape[1], loss.W.shape[0]
    return loss.proxies.shape[0], loss.proxies.shape[1]


def soft_triple(a: Asked, la: float, gamma: float, margin: float) -> Criterion:
    sizes = a.loss.num_classes, a.loss.fc.shape[0], a.loss.centers_per_class
    return losses.SoftTripleLoss(*sizes, la, 1 / gamma, margin, **a.common)


def transposed(loss: Any, w: Tensor) -> Tensor:
    return w.t()


def centres(loss: Any, w: Tensor) -> Tensor:
    """(D, C K), a class's centres side by side, to (C, K, D)."""
    return w.t().unflatten(0, (loss.num_classes, loss.centers_per_class))


def copied(loss: Any, switch: Switch) -> nn.Parameter | None:
    if switch.weight is None:
        return None
    old = getattr(loss, switch.weight)
    new = switch.layout(loss, old.detach()).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(new, requires_grad=old.requires_grad)
