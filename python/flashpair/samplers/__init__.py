"""Batches by class, for `torch.utils.data.DataLoader`, seeded and shared among processes."""

from .base import ClassSampler, Flat
from .hard_classes import HardClassSampler
from .per_class import MPerClassSampler, NPairsSampler

__all__ = ["ClassSampler", "Flat", "HardClassSampler", "MPerClassSampler", "NPairsSampler"]
