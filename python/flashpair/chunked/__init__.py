"""Reductions against references that are in memory one chunk at a time: from disk, a queue, or other processes."""
