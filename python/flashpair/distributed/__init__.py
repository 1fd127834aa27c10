"""Losses over the batch of many processes, with exact gradients, by torch.distributed."""

from .class_shards import ShardedClasses, shard_classes
from .global_loss import GlobalCriterion, gather

__all__ = ["GlobalCriterion", "ShardedClasses", "gather", "shard_classes"]
