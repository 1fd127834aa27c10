"""General Pair Weighting made visible: what a loss gives to each pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference import ReferencePairs
from .base import Criterion, reduce_losses
from .output_checks import refuse_own


def pair_weights(
    criterion: Criterion,
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    """The weights W_ij = dL/dz_ij (N, M) of every ordered pair, by the dense reference, in the caller's order.

    z is the criterion's similarity (for Euclidean losses the distance); each entry is taken as independent, so that
    dL/dx = (W + W^T) x for a square problem of dot products. GPW's w_ij (Wang et al., 2019, eq. 3) is ``W.abs()``:
    W is at most 0 on positives and at least 0 on negatives for similarities, the other way round for distances, but
    for some pairs of a few losses (SupCon, soft-label N-pair, tuplet margin, intra-pair variance, FastAP).

    Args:
        criterion: any of this package's but SoftTripleLoss; with ``reduction="none"`` the rows' losses are summed.
            Of class weights W is of embeddings and classes (B, C), of ProxyAnchorLoss of proxies and embeddings (C, B).
        embeddings, labels, ref_emb, ref_labels: as the criterion takes them.

    Returns:
        (N, M), float32 or float64, 0 for pairs that take no part.

    Raises:
        TypeError: a criterion of your own with a `forward` or `rows`, whose weights `row_losses` does not say.
    """
    refuse_own(criterion, ("forward", "_loss", "_by_rows", "rows"), "pair_weights")
    x, labels, y, ref_labels = criterion.check(embeddings, labels, ref_emb, ref_labels)
    with torch.no_grad():
        pairs = criterion.pairs_of(x, labels, y, ref_labels, "reference")
    assert isinstance(pairs, ReferencePairs)
    with torch.enable_grad():
        pairs.z.requires_grad_()
        loss = reduce_losses(criterion.checked_row_losses(pairs), criterion.reduction, pairs).sum()
        return torch.autograd.grad(loss, pairs.z)[0]
