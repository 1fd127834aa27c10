"""The choice of one anchor and one positive of each class (N-pair batches)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import plain


class ClassPairs(NamedTuple):
    """One (anchor, positive) of each class that has both.

    On the CPU K is the number of chosen pairs. On a GPU, and in a compiled graph, K is the largest number that there
    could be, so that the host need not wait for the true number; only the first `taken` pairs count.

    Attributes:
        anchors: (K,) int64, row numbers.
        positives: (K,) int64, the references, by the index that `take_pairs` of the same source reads.
        place: (K,) int64, 0, 1, ..., K - 1.
        taken: () int64, how many pairs count.
        source: what the `class_pairs` that made the choice tells its own `take_pairs`, or None.
    """

    anchors: Tensor
    positives: Tensor
    place: Tensor
    taken: Tensor
    source: Any = None


def pick_class_pairs(labels: Tensor, ref_labels: Tensor | None, padded: bool = True) -> ClassPairs:
    """The first two samples of each class, or the first anchor and the first reference of each class.

    Args:
        labels: (N,) int64, of the anchors.
        ref_labels: (M,) int64, of the references; None: the anchors are the references.
        padded: False: K is the number of pairs on a GPU, too, for which the host waits.
    """
    ordered, order = torch.sort(labels, stable=True)
    rank = torch.arange(labels.shape[0], device=labels.device)
    first = torch.searchsorted(ordered, ordered) == rank
    if ref_labels is None:
        most, refs = labels.shape[0] // 2, order
        partner = rank + 1
        has_partner = torch.searchsorted(ordered, ordered, right=True) > partner
    else:
        ref_ordered, refs = torch.sort(ref_labels, stable=True)
        most = min(labels.shape[0], ref_labels.shape[0])
        partner = torch.searchsorted(ref_ordered, ordered)
        has_partner = torch.searchsorted(ref_ordered, ordered, right=True) > partner
    if refs.shape[0]:
        refs = refs[partner.clamp_max(refs.shape[0] - 1)]
    else:
        refs = torch.zeros_like(rank)
    return gather_class_pairs(order, refs, first & has_partner, most, padded)


def gather_class_pairs(anchors: Tensor, positives: Tensor, taken: Tensor, most: int, padded: bool = True) -> ClassPairs:
    """The `ClassPairs` of those candidates that are `taken`.

    Args:
        anchors: (N,) int64, the candidates' anchors.
        positives: (N,) int64, their positives.
        taken: (N,) bool.
        most: the largest number that can be taken.
        padded: see `pick_class_pairs`.
    """
    rank = torch.arange(taken.shape[0], device=taken.device)
    if not padded or (taken.device.type == "cpu" and plain(taken)):
        anchors = anchors[taken]
        return ClassPairs(anchors, positives[taken], rank[: anchors.shape[0]], taken.sum())
    place = torch.where(taken, taken.cumsum(0) - 1, most)  # all others go to one place past the last

    def gather(values: Tensor) -> Tensor:
        return values.new_zeros(most + 1).index_copy(0, place, values)[:most]

    return ClassPairs(gather(anchors), gather(positives), rank[:most], taken.sum())
