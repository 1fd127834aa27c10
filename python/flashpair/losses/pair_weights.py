"""General Pair Weighting: the weight that a loss gives to each pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.pairs import DensePairs
from .averages import reduce_losses
from .base import Criterion
from .output_checks import refuse_own


def pair_weights(
    criterion: Criterion,
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    """The weight that a loss gives to each pair, W_ij = dL/dz_ij, by the dense reference (Wang et al., 2019, eq. 3).

    z is the criterion's similarity, or its distance for Euclidean losses. Every ordered entry counts as independent, so
    that dL/dx = (W + W^T) x for a square problem of dot products. General Pair Weighting's w_ij is ``W.abs()``: for
    similarities W is at most 0 on positives and at least 0 on negatives, for distances the other way round. Exceptions
    are some pairs of SupCon, soft-label N-pair, tuplet margin, intra-pair variance and FastAP.

    Args:
        criterion: any loss of this package except SoftTripleLoss. With ``reduction="none"`` the row losses are summed.
            For class weights W is (N, C), embeddings by classes; for ProxyAnchorLoss (C, N), proxies by embeddings.
        embeddings: (N, D), as the criterion takes them.
        labels: (N,), integers.
        ref_emb: (M, D) or None.
        ref_labels: (M,) or None.

    Returns:
        (N, M), float32 or float64, in the caller's order, 0 for pairs that take no part.

    Raises:
        TypeError: a criterion of your own with a `forward` or `rows`, whose weights `row_losses` does not determine.
        ValueError: as a call of the criterion.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> weights = flashpair.pair_weights(flashpair.ContrastiveLoss(None, 0.5, "cosine", reduction="sum"), x, labels)
        >>> weights.int().tolist()  # -1 on positives, 1 on negatives whose cosine is above 0.5
        [[0, -1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1], [0, 0, -1, 0]]
    """
    refuse_own(criterion, ("forward", "_loss", "_by_rows", "rows"), "pair_weights")
    x, labels, y, ref_labels = criterion.check(embeddings, labels, ref_emb, ref_labels)
    with torch.no_grad():
        pairs = criterion.pairs_of(x, labels, y, ref_labels, "reference")
    assert isinstance(pairs, DensePairs)
    with torch.enable_grad():
        pairs.z.requires_grad_()
        loss = reduce_losses(criterion.checked_row_losses(pairs), criterion.reduction, pairs).sum()
        return torch.autograd.grad(loss, pairs.z)[0]
