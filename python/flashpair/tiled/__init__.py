"""`tiled` on the CPU: torch.mm into a tile that stays in cache, one fused C++ epilogue over it, tiles shared by threads.

Computes: the row reductions of an N x M problem and their gradients (csrc/cpu holds the epilogues).
Never materialises: more than one tile of similarities or weights a thread.
Keeps for backward: the row values; of a tile in which a mining window leaves few pairs, those pairs, so that backward
skips the tile (`Grid.live_capacity` bounds them to a fixed number a row).
Deterministic: the tiles' order is fixed by the shapes, and tiles that touch the same rows run in that order.
"""

from .backward import Gradients, backward
from .engine import Kept, Problem, Term, decode, kept_sizes
from .forward import forward

__all__ = ["Gradients", "Kept", "Problem", "Term", "backward", "decode", "forward", "kept_sizes"]
