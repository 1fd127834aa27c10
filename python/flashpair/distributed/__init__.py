"""Losses over the batch of many processes, with exact gradients, on torch.distributed."""

from .loss import GlobalCriterion, gather

__all__ = ["GlobalCriterion", "gather"]
