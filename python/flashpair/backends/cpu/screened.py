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
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.problem import LOGSUMEXP, MAX, MIN, POSITIVES, SUM, Like, Operands, Problem, Terms, address, stages
from ...core.reduction import HINGES, OPS, TRANSFORMS
from ...core.tensor_cache import TensorCache
from .. import extension
from . import tiled

backward = tiled.backward
# From where on `auto` screens: fewer pairs, or coordinates of a pair, and the products are not what costs.
WORTH_PAIRS, WORTH_DEPTH = 1024**2, 32
_rounded: TensorCache[dict[Any, Any]] = TensorCache()  # the int8 forms of references that keep them
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


def worthwhile(x: Tensor, refs: int) -> bool:
    """Whether `auto`, which has chosen `tiled`, is to screen pairs of x (N, D) and `refs` references where it can."""
    n, d = x.shape
    if x.device.type != "cpu" or n * refs < WORTH_PAIRS or not WORTH_DEPTH <= d <= MOST_DEPTH:
        return False
    return _quick_products()


def _quick_products() -> bool:
    return extension.instruction_set() != "baseline"


# What torch.compiler.assume_constant_result sets, as in dispatch.py: the processor does not change.
_quick_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported_reasons(terms: Terms, d: int) -> tuple[str, ...]:
    """Why pairs of a call of these terms, of D coordinates, cannot be screened; empty if they can."""
    return (_unsupported_reasons if torch.compiler.is_compiling() else _cached_reasons)(terms, d)


def _unsupported_reasons(terms: Terms, d: int) -> tuple[str, ...]:
    off_band = [(k, t) for k, t in enumerate(terms) if t.side != POSITIVES]
    reasons = [f"screened takes D up to {MOST_DEPTH:,}, got {d:,}"] if d > MOST_DEPTH else []
    if not off_band:
        return ("screened needs a reduction over the negatives or all pairs",)
    if len({t.side for _, t in off_band}) > 1:
        reasons.append("screened takes reductions over the negatives or over all pairs, not both in one call")
    if {MIN, MAX} <= {t.op for _, t in off_band}:
        reasons.append("screened takes minima or maxima, not both in one call")
    for k, t in off_band:
        hinged = t.op == SUM and TRANSFORMS[t.transform] in HINGES
        if not t.window and not hinged and t.op not in (MIN, MAX):
            reasons.append(f"screened needs a mining window or a hinge, and reductions[{k}] ({OPS[t.op]}) has none")
        if any(of >= 0 and terms[of].side != POSITIVES for of in (t.lower_of, t.upper_of)):
            # which pair attains an extreme may hang on the last bit, and lists and whole blocks add in their own order
            reasons.append(f"screened takes no window bound to reductions of the same pairs, as reductions[{k}] has")
    of_sums = {k for k, t in off_band if t.op in (LOGSUMEXP, SUM)}
    if sum(any(k in of_sums for k in stage) for stage in stages(terms)) > 1:
        reasons.append("screened needs all windows' bounds off the positives at the same stage")
    return tuple(reasons)


_cached_reasons = functools.lru_cache(maxsize=256)(_unsupported_reasons)


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    return tiled.kept_like(x, y, terms, keep, screen=True)


def keep_rounded(rows: Tensor) -> None:
    """From now on int8 forms of `rows`, which must not change, are kept with them."""
    _rounded[rows] = {}


def rounded(rows: Tensor | None) -> dict[Any, Any] | None:
    """Where int8 forms of `rows` are kept (`keep_rounded`); None for others."""
    return _rounded.get(rows)


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
