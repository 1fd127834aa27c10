"""Multi-Similarity's mining, once for the losses that use it (Wang et al., 2019, eq. 11-12)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..reduction import Bound, Reduction
from .base import AnyPairs


def logsumexps(
    pairs: AnyPairs, alpha: float | Tensor, beta: float | Tensor, epsilon: float | None
) -> tuple[Tensor, Tensor]:
    """logsumexp of -alpha z over each row's positives and of beta z over its negatives, (N,) each, mined.

    A negative is kept if z > (lowest positive) - epsilon, a positive if z < (highest negative) + epsilon; epsilon None
    keeps all. Of a mined row both sets are empty (-inf) or neither is: one comparison a row makes sure of it.
    """
    if epsilon is None:
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", scale=-alpha), Reduction("logsumexp", "negatives", scale=beta)
        )
        return pos, neg
    constant = not (isinstance(alpha, Tensor) or isinstance(beta, Tensor) or torch.compiler.is_compiling())
    _, neg, _, pos = pairs.reduce(*(_mined_constant if constant else _mined)(alpha, beta, epsilon))
    # Without a mined negative there is no mined positive; in exact arithmetic nor the other way round.
    return pos, neg.masked_fill(pos == -torch.inf, -torch.inf)


def _mined(alpha: float | Tensor, beta: float | Tensor, epsilon: float) -> tuple[Reduction, ...]:
    lowest = Reduction("min", "positives", detach=True)
    kept = Bound(lowest, -epsilon)
    # A highest negative outside the window leaves nothing to mine, so that the window serves the maximum too.
    highest = Reduction("max", "negatives", lower=kept, detach=True)
    negatives = Reduction("logsumexp", "negatives", scale=beta, lower=kept)
    return lowest, negatives, highest, Reduction("logsumexp", "positives", scale=-alpha, upper=Bound(highest, epsilon))


_mined_constant = functools.lru_cache(maxsize=64)(_mined)
