"""Block sizes of loops over lists of positives."""

from __future__ import annotations

PLACES = 64  # positives of each row at a time; losses keep about twenty numbers for each
STEPS = 8  # steps of `PairAccess.pair_sums` at a time; each has N rows of its own


def cut(places: range, size: int) -> list[range]:
    """`places` in blocks of `size`; the last one may be shorter."""
    return [places[k : k + size] for k in range(0, len(places), size)]
