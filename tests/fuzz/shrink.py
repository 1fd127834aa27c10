"""Makes a failing case small: fewer rows, references and columns, fewer changes, as long as it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .case import Case


def smaller(case: Case) -> Iterator[Case]:
    """Cases that are a little simpler, the simplest first."""
    for k in range(len(case.changes)):
        yield case.with_(changes=case.changes[:k] + case.changes[k + 1 :])
    for name, plain in (("layout", "plain"), ("threads", 1), ("need", [True, True]), ("dtype", "float32")):
        if getattr(case, name) != plain:
            yield case.with_(**{name: plain})
    for name, whole in (("rows", case.n), ("refs", case.m), ("cols", case.d)):
        kept = getattr(case, name)
        kept = list(range(max(whole, 0))) if kept is None else kept
        least = 1 if name == "cols" else 0
        size = (len(kept) + 1) // 2
        while size >= 1 and kept:
            for at in range(0, len(kept), size):
                rest = kept[:at] + kept[at + size :]
                if len(rest) >= least:
                    yield case.with_(**{name: rest})
            size //= 2


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    """The smallest case found in that time."""
    end = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for one in smaller(case):
            if time.monotonic() > end:
                return case
            if fails(one):
                case, again = one, True
                break
    return case
