"""Identification: which subject of a gallery a probe shows, and whether it is in the gallery at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..engine.cached_references import References
from .arguments import several
from .ranking import search


class OpenSet(NamedTuple):
    """The rates at one false alarm rate; a part of the result of `identification`.

    Attributes:
        threshold: the value that a score has to exceed.
        false_alarm_rate: the rate that this threshold gives.
        detection_rate: the share of genuine probes that are detected and identified.
    """

    threshold: float
    false_alarm_rate: float
    detection_rate: float


class Identification(NamedTuple):
    """Rates, each from 0 to 1; the result of `identification`.

    Attributes:
        rank1: of the probes whose subject is in the gallery, the share that have it as their nearest (closed set).
        open_set: the `OpenSet` of each false alarm rate asked for.
        genuine: how many probes' subjects are in the gallery.
        impostors: how many probes' subjects are not in the gallery.
    """

    rank1: float
    open_set: dict[float, OpenSet]
    genuine: int
    impostors: int


def identification(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References, ref_labels: Tensor | None = None, *,
    false_alarm_rates: float | Sequence[float] = (), distance: str = "cosine", impl: str = "auto",
) -> Identification:  # fmt: skip
    """Closed-set rank-1 rate and open-set detection and identification rate (Best-Rowden et al., 2014).

    Probes whose label no reference has are impostors. At false alarm rate x the threshold is the smallest that at most
    a share x of the impostors' best scores exceed; with fewer than 1 / x impostors, their highest score. A genuine
    probe counts if its best score exceeds the threshold and its nearest reference is of its class. Equal references
    rank by index.

    Args:
        embeddings: (N, D), the probes, float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), the gallery, a tensor or `References`.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        false_alarm_rates: one or several rates, each from 0 to below 1; they need impostors.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``. Scores are similarities or minus distances.
        impl: of `flashpair.nearest`.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. labels: (N,), ref_labels: (M,), integers.
        - output: `Identification`.

    Returns:
        An `Identification`.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, embeddings that are not finite, no genuine probe, or false alarm rates
            without impostors.

    Examples:
        >>> gallery, subjects = torch.eye(2), torch.tensor([0, 1])
        >>> probes = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
        >>> found = flashpair.metrics.identification(probes, torch.tensor([0, 0, 5]), gallery, subjects)
        >>> found.rank1, found.genuine, found.impostors
        (0.5, 2, 1)
    """
    given = several(false_alarm_rates, "false_alarm_rates", "numbers")
    rates = [checks.plain_number(x, "false_alarm_rates", at_least=0.0) for x in given]
    if max(rates, default=0.0) >= 1:
        raise ValueError(f"false_alarm_rates must be below 1, got {max(rates)}")
    if ref_emb is None:
        raise ValueError("ref_emb must be the gallery, got None")
    found = search(embeddings, labels, ref_emb, ref_labels, distance, impl)
    nearest, best = zip(*((labels[:, 0], scores[:, 0]) for _, labels, scores in found.ranked(1)), strict=True)
    right, score = torch.cat(nearest) == found.labels, torch.cat(best)
    genuine = found.relevant > 0
    if not genuine.any():
        raise ValueError("labels must have a reference of some probe's class in the gallery, got only impostors")
    alarms = score[~genuine].sort(descending=True).values
    if rates and not len(alarms):
        raise ValueError("false_alarm_rates need impostors, probes whose label no reference has; got none")

    def at(rate: float) -> OpenSet:
        accepted = min(int(rate * len(alarms)) + 1, len(alarms))
        while accepted / len(alarms) > rate:  # the rounded product is at most two too large
            accepted -= 1
        threshold = alarms[accepted] if accepted < len(alarms) else alarms.new_tensor(-torch.inf)
        detected = (right & (score > threshold))[genuine]
        return OpenSet(threshold.item(), (alarms > threshold).double().mean().item(), detected.double().mean().item())

    rank1 = right[genuine].double().mean().item()
    return Identification(rank1, {rate: at(rate) for rate in rates}, int(genuine.sum()), len(alarms))
