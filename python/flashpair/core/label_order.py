"""The label order: once references are sorted by label, the positives of row i are the interval [lo_i, hi_i)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LabelOrder(NamedTuple):
    """Anchors and references in label order, and each anchor's interval of positives.

    It is computed on the device without a wait of the host.

    Attributes:
        order: (N,) int64, the caller's index of each sorted anchor.
        ref_order: (M,) int64, the caller's index of each sorted reference.
        labels: (N,) int64, of the anchors, sorted.
        ref_labels: (M,) int64, of the references, sorted.
        lo: (N,) int64. The positives of sorted row i are sorted references [lo_i, hi_i); if `square`, row i is one of
            them.
        hi: (N,) int64, see `lo`.
        end: () int64: references [end, M) take no part; None: all take part.
        square: the references are the anchors.
    """

    order: Tensor
    ref_order: Tensor
    labels: Tensor
    ref_labels: Tensor
    lo: Tensor
    hi: Tensor
    end: Tensor | None
    square: bool


def make_label_order(labels: Tensor, ref_labels: Tensor | None = None, ref_order: Tensor | None = None) -> LabelOrder:
    """The label order of anchors and references.

    Args:
        labels: (N,) int64, of the anchors.
        ref_labels: (M,) int64, of the references; None: the anchors are the references.
        ref_order: (M,) int64, the caller's index of each reference, if `ref_labels` are sorted already.
    """
    ordered, order = torch.sort(labels, stable=True)
    if ref_labels is None:
        refs, ref_order = ordered, order
    elif ref_order is None:
        refs, ref_order = torch.sort(ref_labels, stable=True)
    else:
        refs = ref_labels
    lo = torch.searchsorted(refs, ordered)
    hi = torch.searchsorted(refs, ordered, right=True)
    return LabelOrder(order, ref_order, ordered, refs, lo, hi, None, ref_labels is None)


def one_to_one(labels: Tensor, count: Tensor) -> LabelOrder:
    """The label order in which reference k is the only positive of row k.

    Args:
        labels: (K,) int64, 0, 1, ..., K - 1.
        count: () int64; only the first `count` rows and references take part.
    """
    k = torch.arange(labels.shape[0], device=labels.device)
    lo = torch.minimum(k, count)
    return LabelOrder(k, k, labels, labels, lo, torch.minimum(k + 1, count), count, False)
