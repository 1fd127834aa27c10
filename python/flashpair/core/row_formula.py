"""Row formulas: the losses that a kernel can compute as a whole, and their hyper-parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FORMULAS = ("multi_similarity", "lifted_star", "lifted", "n_pair", "one_vs_one", "all_pairs")


class RowFormula(NamedTuple):
    """The formula of a row's loss, which has two parts.

    P is logsumexp(scales[0] z) over the row's positives, and N is logsumexp(scales[1] z) over its negatives.

    Attributes:
        name: ``"multi_similarity"``: softplus(P + shifts[0]) / |scales[0]| + softplus(N + shifts[1]) / |scales[1]|;
            ``"lifted_star"``: P / |scales[0]| + N / |scales[1]|; ``"lifted"``: max(0, P + N + shifts[0]);
            ``"n_pair"``: softplus(P + N); ``"one_vs_one"``: the sum of softplus(scales[1] z + P) over the negatives;
            ``"all_pairs"``: the sum of softplus(scales[0] z + N) over the positives. See csrc/small_batch/losses.h.
        scales: of the positives and of the negatives; tensors () where they are learned.
        shifts: of the positives and of the negatives; tensors () where they are learned.
        epsilon: the width of Multi-Similarity's mining windows; None: no mining.
        one_pair: each class takes part with one anchor and one positive only, the first of the batch (Sohn, 2016).
    """

    name: str
    scales: tuple[float | Tensor, float | Tensor]
    shifts: tuple[float | Tensor, float | Tensor] = (0.0, 0.0)
    epsilon: float | None = None
    one_pair: bool = False
