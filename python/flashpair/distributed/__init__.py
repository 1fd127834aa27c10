"""Losses over the batch of many processes, with exact gradients, on torch.distributed."""

from .classes import ShardedClasses, shard_classes
from .loss import GlobalCriterion, gather

__all__ = ["GlobalCriterion", "ShardedClasses", "gather", "shard_classes"]
