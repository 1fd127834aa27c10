"""`screened` on the CPU: int8 products prove nearly all pairs dead; the survivors alone are computed
(docs/screened-mining.md).

Computes: what `tiled` does, of calls all of whose reductions off the positives' band have no use for most pairs (mining
windows, hinges, extremes). csrc/cpu/screen/int8.h has the bound and its products, screen.h what each anchor wants.
Never materialises: similarities, beside the survivors'.
Keeps for backward: what `tiled` keeps, with the live pairs of every tile that has few; the others go on as in `tiled`.
Deterministic: same inputs, same bits, with any number of threads.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.problem import Like, Operands, Problem, Terms, address
from ...core.reduction import HINGES, Bound, Reduction, bound_places
from .. import extension
from . import tiled

backward = tiled.backward
# From where on `auto` screens: fewer pairs, or coordinates of a pair, and the products are not what costs.
WORTH_PAIRS, WORTH_DEPTH = 1024**2, 32
_ROUNDED = "_flashpair_rounded"  # an attribute of references that keep their int8 form
MOST_DEPTH = 2**17  # coordinates whose products fit 32 bits


@dataclass
class Screening:
    """Counts of what the screens of some calls did; `screening` gives it.

    Attributes:
        tiles: blocks of pairs that were screened.
        whole: of these, blocks that were computed in full because too many of their pairs survived.
        candidates: pairs of the other blocks that were not proved irrelevant.
        pairs: in calls that need gradients, all pairs of the other blocks.
        live: of these pairs, those inside the windows.
    """

    tiles: int = 0
    whole: int = 0
    pairs: int = 0
    candidates: int = 0
    live: int = 0

    @property
    def live_share(self) -> float:
        """Live pairs among `pairs`; NaN without any."""
        return self.live / self.pairs if self.pairs else float("nan")


_watching: contextvars.ContextVar[tuple[Screening, ...]] = contextvars.ContextVar("flashpair_screening", default=())


@contextlib.contextmanager
def screening() -> Iterator[Screening]:
    """A context that counts what this thread screens on the CPU: ``with screening() as seen: criterion(x, labels)``.

    Yields:
        A `Screening`, which is filled as calls run.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> with flashpair.screening() as seen:
        ...     loss = flashpair.MultiSimilarityLoss()(x, labels)
        >>> seen.tiles  # so small a batch is not screened
        0
    """
    seen = Screening()
    token = _watching.set((*_watching.get(), seen))
    try:
        yield seen
    finally:
        _watching.reset(token)


def worthwhile(impl: str, x: Tensor, refs: Tensor) -> bool:
    """Whether `auto`, which has chosen `impl`, is to screen pairs of x (N, D) and refs (M, D) where it can."""
    (n, d), m = x.shape, refs.shape[0]
    if impl != "tiled" or x.device.type != "cpu" or n * m < WORTH_PAIRS or not WORTH_DEPTH <= d <= MOST_DEPTH:
        return False
    return _quick_products()


def _quick_products() -> bool:
    return extension.instruction_set() != "baseline"


# What torch.compiler.assume_constant_result sets, as in dispatch.py: the processor does not change.
_quick_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported_reasons(reductions: tuple[Reduction, ...], d: int) -> list[str]:
    """Why pairs of such a call, of D coordinates, cannot be screened; empty if they can."""
    off_band = [(k, r) for k, r in enumerate(reductions) if r.side != "positives"]
    found = [f"screened takes D up to {MOST_DEPTH:,}, got {d:,}"] if d > MOST_DEPTH else []
    if not off_band:
        return ["screened needs a reduction over the negatives or all pairs"]
    if len({r.side for _, r in off_band}) > 1:
        found.append("screened takes reductions over the negatives or over all pairs, not both in one call")
    if {"min", "max"} <= {r.op for _, r in off_band}:
        found.append("screened takes minima or maxima, not both in one call")
    for k, r in off_band:
        hinged = r.op == "sum" and r.transform in HINGES
        if r.lower is None and r.upper is None and not hinged and r.op not in ("min", "max"):
            found.append(f"screened needs a mining window or a hinge, and reductions[{k}] ({r.op}) has none")
        bounds = [b.of for b in (r.lower, r.upper) if isinstance(b, Bound)]
        if any(of.side != "positives" for of in bounds):
            # which pair attains an extreme may hang on the last bit, and lists and whole blocks add in their own order
            found.append(f"screened takes no window bound to reductions of the same pairs, as reductions[{k}] has")
    depth: list[int] = []
    for places in bound_places(reductions):
        depth.append(1 + max(depth[of] if of >= 0 else -1 for of in places))
    if len({depth[k] for k, r in off_band if r.op in ("logsumexp", "sum")}) > 1:
        found.append("screened needs all windows' bounds off the positives at the same stage")
    return found


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    return tiled.kept_like(x, y, terms, keep, screen=True)


def keep_rounded(rows: Tensor) -> None:
    """From now on int8 forms of `rows`, which must not change, are kept with them."""
    rows.__dict__[_ROUNDED] = {}


def rounded(rows: Tensor | None) -> dict[Any, Any] | None:
    """Where int8 forms of `rows` are kept (`keep_rounded`); None for others."""
    return None if rows is None else rows.__dict__.get(_ROUNDED)


def _int8_references(p: Problem) -> Any:
    """The references in int8, where they are `References`, which keep them; else None."""
    kept = rounded(p.y)
    if kept is None or p.y is None:
        return None
    key = extension.instruction_set(), p.distance
    if key not in kept:
        (m, d), square = p.y.shape, p.row_and_ref_squares()[1]
        kept[key] = extension.require().round_rows(
            key[0], p.y.dtype == torch.float64, address(p.y), m, d, address(square), torch.get_num_threads()
        )
    return kept[key]


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tiled.Kept]:
    values, kept, tally = tiled.run(p, terms, operands, keep, extension.instruction_set(), _int8_references(p))
    for seen in _watching.get():
        for name, count in zip(("tiles", "whole", "pairs", "candidates", "live"), tally, strict=True):
            setattr(seen, name, getattr(seen, name) + count)
    return values, kept
