"""How a list of positives is gone through a block at a time."""

from __future__ import annotations

PLACES = 64  # of the list of positives at a time; losses keep some twenty numbers for each
STEPS = 8  # of `Pairs.sums` at a time; each has N rows of its own


def cut(places: range, size: int) -> list[range]:
    """In blocks of `size`; the last may be shorter."""
    return [places[k : k + size] for k in range(0, len(places), size)]
