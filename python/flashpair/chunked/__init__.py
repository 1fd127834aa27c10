"""Reductions against references of which only a chunk is there at a time: on disk, in a memory, in other processes."""
