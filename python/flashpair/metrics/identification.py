"""Identification: who of a gallery is it, and is it anybody of the gallery at all?"""

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
    """At a false alarm rate: the threshold that a score has to exceed, the rate that it comes to, and the detection
    and identification rate of the probes that are of the gallery."""

    threshold: float
    false_alarm_rate: float
    detection_rate: float


class Identification(NamedTuple):
    """Rates, each from 0 to 1.

    Attributes:
        rank1: how many of the probes whose subject is in the gallery have it as their nearest (closed set).
        open_set: of each false alarm rate asked for.
        genuine, impostors: how many probes' subjects are in the gallery, and how many are not.
    """

    rank1: float
    open_set: dict[float, OpenSet]
    genuine: int
    impostors: int


def identification(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References, ref_labels: Tensor | None = None, *,
    false_alarm_rates: float | Sequence[float] = (), distance: str = "cosine", impl: str = "auto",
) -> Identification:  # fmt: skip
    """Closed-set rank-1 and open-set DIR@FAR (Best-Rowden et al., Unconstrained Face Recognition, 2014).

    Probes whose label no reference has are impostors. At false alarm rate x the threshold is the least that at most a
    share x of the impostors' best scores exceed: with fewer than 1 / x impostors, their highest. A genuine probe counts
    if its score exceeds it and its nearest reference is right. Equal references rank by index.

    Args:
        embeddings, labels: (N, D), (N,) probes. ref_emb, ref_labels: (M, D), (M,) the gallery.
        false_alarm_rates: from 0 to below 1, each, or one; need impostors.
        distance: ``"cosine"``, ``"dot"`` or ``"euclidean"``; scores are similarities or minus distances.
        impl: of `flashpair.nearest`.

    Raises:
        TypeError, ValueError: bad arguments, named; embeddings that are not finite; no genuine probe, or no impostor.
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
        raise ValueError("labels must be some reference's, got probes without a subject of the gallery alone")
    alarms = score[~genuine].sort(descending=True).values
    if rates and not len(alarms):
        raise ValueError("false_alarm_rates need impostors, probes whose label no reference has; got none")

    def at(rate: float) -> OpenSet:
        accepted = min(int(rate * len(alarms)) + 1, len(alarms))
        while accepted / len(alarms) > rate:  # of the rounded product at most two too many
            accepted -= 1
        threshold = alarms[accepted] if accepted < len(alarms) else alarms.new_tensor(-torch.inf)
        detected = (right & (score > threshold))[genuine]
        return OpenSet(threshold.item(), (alarms > threshold).double().mean().item(), detected.double().mean().item())

    rank1 = right[genuine].double().mean().item()
    return Identification(rank1, {rate: at(rate) for rate in rates}, int(genuine.sum()), len(alarms))
