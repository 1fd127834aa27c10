"""Sort once, and every mask is an interval: row i's positives are the sorted references [lo_i, hi_i)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LabelOrder(NamedTuple):
    """Anchors and references in label order, and each anchor's interval of positives. No host sync makes it.

    Args:
        order: (N,) int64, the caller's index of each sorted anchor; `ref_order` (M,): of each reference.
        labels: (N,) int64, sorted; `ref_labels` (M,).
        lo, hi: (N,) int64: positives of sorted row i are sorted references [lo_i, hi_i), itself among them if square.
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
    """The label_order of labels (N,) against `ref_labels` (M,), or against themselves. int64.

    ref_order: given where `ref_labels` are sorted already, and these are their indices for the caller.
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
    """Row k against reference k alone as positive, labels (K,) = 0, 1, ..., and only the first `count` take part."""
    k = torch.arange(labels.shape[0], device=labels.device)
    lo = torch.minimum(k, count)
    return LabelOrder(k, k, labels, labels, lo, torch.minimum(k + 1, count), count, False)
