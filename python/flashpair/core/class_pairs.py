"""One anchor and one positive of each class (N-pair batches)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import plain


class ClassPairs(NamedTuple):
    """One (anchor, positive) of each class in K places: as many as are taken where the host may ask for their number
    (on the CPU), else as many as there could be, so that nobody waits for a GPU and a compiled graph is one.

    Attributes:
        anchors: (K,) int64, of the rows.
        positives: (K,) int64, of the references.
        place: (K,) int64, 0, 1, ...
        taken: () int64, how many of the places are taken.
        source: what the source that chose them needs to know of its own to take them, or None.
    """

    anchors: Tensor
    positives: Tensor
    place: Tensor
    taken: Tensor
    source: Any = None


def pick_class_pairs(labels: Tensor, ref_labels: Tensor | None, padded: bool = True) -> ClassPairs:
    """The first two samples of each class as anchor and positive, or the first anchor and the first reference. Without
    `padded` the host asks how many there are on every device."""
    ordered, order = torch.sort(labels, stable=True)
    rank = torch.arange(labels.shape[0], device=labels.device)
    first = torch.searchsorted(ordered, ordered) == rank
    if ref_labels is None:
        most, refs = labels.shape[0] // 2, order
        at = rank + 1
        follows = torch.searchsorted(ordered, ordered, right=True) > at
    else:
        ref_ordered, refs = torch.sort(ref_labels, stable=True)
        most = min(labels.shape[0], ref_labels.shape[0])
        at = torch.searchsorted(ref_ordered, ordered)
        follows = torch.searchsorted(ref_ordered, ordered, right=True) > at
    if refs.shape[0]:
        refs = refs[at.clamp_max(refs.shape[0] - 1)]
    else:
        refs = torch.zeros_like(rank)
    return gather_class_pairs(order, refs, first & follows, most, padded)


def gather_class_pairs(anchors: Tensor, positives: Tensor, taken: Tensor, most: int, padded: bool = True) -> ClassPairs:
    """Those of anchors (N,) and their positives (N,) that are `taken` (N,), at most `most`. padded: see
    `pick_class_pairs`."""
    rank = torch.arange(taken.shape[0], device=taken.device)
    if not padded or (taken.device.type == "cpu" and plain(taken)):
        anchors = anchors[taken]
        return ClassPairs(anchors, positives[taken], rank[: anchors.shape[0]], taken.sum())
    place = torch.where(taken, taken.cumsum(0) - 1, most)  # rows that are no anchor go to one place past the last

    def gather(values: Tensor) -> Tensor:
        return values.new_zeros(most + 1).index_copy(0, place, values)[:most]

    return ClassPairs(gather(anchors), gather(positives), rank[:most], taken.sum())
