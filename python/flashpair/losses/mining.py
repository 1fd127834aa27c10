"""The mining of Multi-Similarity (Wang et al., 2019, eq. 11-12), for all losses that use it."""

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
    """The logsumexp of -alpha z over each row's mined positives, and of beta z over its mined negatives, (N,) each.

    A negative is mined if z > (lowest positive) - epsilon, a positive if z < (highest negative) + epsilon. A row has
    mined pairs of both kinds, or of none; then both results are -inf.

    Args:
        pairs: the pairs.
        alpha: a number or a tensor ().
        beta: a number or a tensor ().
        epsilon: the width of the mining windows; None: all pairs are mined.
    """
    if epsilon is None:
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", scale=-alpha), Reduction("logsumexp", "negatives", scale=beta)
        )
        return pos, neg
    constant = not (isinstance(alpha, Tensor) or isinstance(beta, Tensor) or torch.compiler.is_compiling())
    _, neg, _, pos = pairs.reduce(*(_mined_constant if constant else _mined)(alpha, beta, epsilon))
    # A row without a mined negative has no mined positive. The reverse holds only without rounding, so it is enforced.
    return pos, neg.masked_fill(pos == -torch.inf, -torch.inf)


def _mined(alpha: float | Tensor, beta: float | Tensor, epsilon: float) -> tuple[Reduction, ...]:
    lowest = Reduction("min", "positives", detach=True)
    kept = Bound(lowest, -epsilon)
    # If the highest negative is outside of the window, there is nothing to mine: the maximum can have the window, too.
    highest = Reduction("max", "negatives", lower=kept, detach=True)
    negatives = Reduction("logsumexp", "negatives", scale=beta, lower=kept)
    return lowest, negatives, highest, Reduction("logsumexp", "positives", scale=-alpha, upper=Bound(highest, epsilon))


_mined_constant = functools.lru_cache(maxsize=64)(_mined)


def mined_sums(
    pairs: PairAccess, positives: dict[str, Any], negatives: dict[str, Any], epsilon: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over each row's mined positives and negatives, and the numbers of these, (N,) each.

    A row has mined pairs of both kinds, or of none; see `logsumexps`.

    Args:
        pairs: the pairs.
        positives: the other arguments of the positives' `Reduction`.
        negatives: the other arguments of the negatives' `Reduction`.
        epsilon: the width of the mining windows; None: all pairs are mined.
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
    mined = ~(torch.minimum(some_pos, some_neg) <= 0)  # true for NaN
    return tuple(torch.where(mined, row, 0.0) for row in (pos, neg, some_pos, some_neg))  # type: ignore[return-value]
