"""Multi-Similarity's mining, once for the losses that use it (Wang et al., 2019, eq. 11-12)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..core.pairs import PairAccess
from ..core.reduction import Bound, Reduction


def logsumexps(
    pairs: PairAccess, alpha: float | Tensor, beta: float | Tensor, epsilon: float | None
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


def mined_sums(
    pairs: PairAccess, positives: dict[str, Any], negatives: dict[str, Any], epsilon: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over each row's mined positives and negatives, and how many these are, (N,) each.

    positives, negatives: what `Reduction` is told of the two sums. Of a mined row both sets are empty or neither is.
    """
    if epsilon is None:
        pos, neg = pairs.reduce(Reduction("sum", "positives", **positives), Reduction("sum", "negatives", **negatives))
        return pos, neg, pairs.num_positives(), pairs.num_negatives()
    lowest = Reduction("min", "positives", detach=True)
    kept = Bound(lowest, -epsilon)
    highest = Reduction("max", "negatives", lower=kept, detach=True)
    below = Bound(highest, epsilon)
    _, neg, some_neg, _, pos, some_pos = pairs.reduce(
        lowest,
        Reduction("sum", "negatives", lower=kept, **negatives),
        Reduction("count", "negatives", lower=kept),
        highest,
        Reduction("sum", "positives", upper=below, **positives),
        Reduction("count", "positives", upper=below),
    )
    mined = ~(torch.minimum(some_pos, some_neg) <= 0)  # NaN among them
    return tuple(torch.where(mined, row, 0.0) for row in (pos, neg, some_pos, some_neg))  # type: ignore[return-value]
