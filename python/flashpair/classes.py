"""Pairs of embeddings and class weights, in either role."""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import Pairs, checked_pairs
from .reference import ReferencePairs
from .similarity import normalize, upcast


def _sides(x: Tensor, weight: Tensor, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, normalised if `unit`, weights, which always are, and the weights' labels."""
    x, w = upcast(x, weight)
    assert w is not None
    return normalize(x) if unit else x, normalize(w), torch.arange(weight.shape[0], device=weight.device)


def class_pairs(x: Tensor, labels: Tensor, weight: Tensor, unit: bool, impl: str) -> Pairs | ReferencePairs:
    """Embeddings (B, D) as anchors, and the weights (C, D) as references, one positive an anchor."""
    x, w, classes = _sides(x, weight, unit)
    return checked_pairs(x, labels, w, classes, "dot", False, impl)


def proxy_pairs(weight: Tensor, x: Tensor, labels: Tensor, unit: bool, impl: str) -> Pairs | ReferencePairs:
    """The weights (C, D) as anchors, and embeddings (B, D) as references."""
    x, w, classes = _sides(x, weight, unit)
    return checked_pairs(w, classes, x, labels, "dot", False, impl)
