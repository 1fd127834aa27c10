"""Where pytorch-metric-learning 2.9 gives a number that flashpair does not reproduce: said once a process."""

from __future__ import annotations

import warnings

REASONS = {
    "one pair": "pytorch-metric-learning gives 0 for at most one positive and one negative pair (an anchor against two "
    "references, or what a miner leaves); the fused criterion gives their loss",
    "same references": "pytorch-metric-learning leaves self-pairs out if embeddings and labels are passed again as "
    "ref_emb and ref_labels, by the identity of these tensors; the fused criterion takes references as they are, and "
    "leaves self-pairs out of a call without them",
    "euclidean duplicates": "pytorch-metric-learning has torch.cdist's rounding (5e-4 in float32) for the distance of "
    "equal embeddings in batches of more than 25, and counts it where terms above 0 are averaged; the fused criterion "
    "has 0",
    "lifted structure without a side": "pytorch-metric-learning gives GeneralizedLiftedStructureLoss of an anchor "
    "without positives or without negatives as if that side's logsumexp were 0; the fused criterion gives 0",
    "nt-xent clip": "pytorch-metric-learning clips each pair of NTXentLoss at -log(smallest normal number), 87.3 in "
    "float32 and 9.7 in float16, without gradient past it; the fused criterion does not",
    "supcon without negatives": "pytorch-metric-learning gives SupConLoss of a batch without any negative pair as 0; "
    "the fused criterion gives the loss, whose denominator then has the positives",
    "nca underflow": "pytorch-metric-learning drops anchors of NCALoss and ProxyNCALoss whose probability underflows "
    "to 0, the hardest ones, and gives NaN where none is left; the fused criterion keeps them, and gives 0 for none",
    "tuplet duplicates": "pytorch-metric-learning gives TupletMarginLoss a gradient of NaN (or a value of NaN) where a "
    "positive is its anchor's duplicate; the fused criterion gives this pair's cosine the gradient without its sine",
    "angular negatives": "pytorch-metric-learning does not normalise the negatives of AngularLoss; the fused criterion "
    "does. They are the same for embeddings that are normalised before",
    "arcface aligned": "pytorch-metric-learning gives ArcFaceLoss a gradient of inf or NaN where an embedding points "
    "along its class's weight, or against it; the fused criterion gives that cosine the gradient without its sine",
    "snr without variance": "pytorch-metric-learning gives signal-to-noise ratios of an embedding without variance as "
    "inf or NaN; the fused criterion gives it no pairs",
    "histogram pairs": "pytorch-metric-learning leaves negative pairs of two samples that have no positive out of "
    "HistogramLoss; the fused criterion takes all negative pairs (eq. 2 of the paper)",
    "histogram end": "pytorch-metric-learning raises an error for HistogramLoss of a batch with a cosine of 1; the "
    "fused criterion counts it at the last node",
}
_said: set[str] = set()


class Divergence(UserWarning):
    """The fused criterion gives another number than the loss that it was made from, where that number is wrong."""


def announce(*reasons: str) -> None:
    """Warns of each reason that was not yet given in this process."""
    for reason in reasons:
        if reason not in _said:
            _said.add(reason)
            warnings.warn(REASONS[reason], Divergence, stacklevel=3)
