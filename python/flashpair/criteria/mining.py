"""Multi-Similarity's mining, once for the losses that use it (Wang et al., 2019, eq. 11-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reduction import Reduction
from .base import AnyPairs


def logsumexps(
    pairs: AnyPairs, alpha: float | Tensor, beta: float | Tensor, epsilon: float | None
) -> tuple[Tensor, Tensor]:
    """logsumexp of -alpha z over each row's positives and of beta z over its negatives, (N,) each, mined.

    A negative is kept if z > (lowest positive) - epsilon, a positive if z < (highest negative) + epsilon; epsilon None
    keeps all. Both sets of a row are empty (-inf) or neither is, which one decision a row makes sure of.
    Three passes: positives, all negatives, positives.
    """
    if epsilon is None:
        (pos,) = pairs.reduce(Reduction("logsumexp", "positives", scale=-alpha))
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=beta))
        return pos, neg
    (lowest,) = pairs.reduce(Reduction("min", "positives", detach=True))
    lower = lowest - epsilon
    # A highest negative outside the window leaves nothing to mine, so that the window serves the maximum too.
    neg, highest = pairs.reduce(
        Reduction("logsumexp", "negatives", scale=beta, lower=lower),
        Reduction("max", "negatives", lower=lower, detach=True),
    )
    upper = highest + epsilon
    (pos,) = pairs.reduce(Reduction("logsumexp", "positives", scale=-alpha, upper=upper))
    unmined = ~((highest > lower) & (lowest < upper))
    keep_nan = unmined & ~highest.isnan() & ~lowest.isnan()
    return pos.masked_fill(keep_nan, -torch.inf), neg.masked_fill(keep_nan, -torch.inf)
