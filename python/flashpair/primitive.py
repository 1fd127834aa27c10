"""The public row-reduction primitive, in the caller's order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from . import checks
from .pairs import Pairs, checked_pairs
from .reduction import DISTANCES, Bound, Reduction


def row_reduce(
    embeddings: Tensor,
    labels: Tensor,
    *reductions: Reduction,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    distance: str = "dot",
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Row reductions of all pairs of embeddings (N, D), or of embeddings against `ref_emb` (M, D), never stored.

    Differentiable in the embeddings, the references, and each reduction's scale and offsets (twice, through a dense
    path). Reductions of one call share their passes; see `Reduction` for what they can be. A loss of your own is some
    reductions and ordinary PyTorch on (N,) tensors; write it as a `Criterion` to have it sort only once.

    Args:
        embeddings, labels, ref_emb, ref_labels: as `Criterion` takes them; nothing is normalised here.
        reductions: `Reduction`s whose vectors stand in the caller's order.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        impl: as `Criterion` takes it.

    Returns:
        One tensor (N,) for each reduction, in the caller's order, float32 or float64.

    Raises:
        TypeError, ValueError: bad arguments, named. RuntimeError: an `impl` that cannot run here.
    """
    x, labels, y, ref_labels = checks.batch(embeddings, labels, ref_emb, ref_labels)
    for k, r in enumerate(reductions):
        if not isinstance(r, Reduction):
            raise TypeError(f"reductions[{k}] must be a Reduction, got {type(r).__name__}")
        n, m = x.shape[0], (x if y is None else y).shape[0]
        for name, size in (("offset", n), ("lower", n), ("upper", n), ("ref_offset", m)):
            value = getattr(r, name)
            if isinstance(value, Tensor) and tuple(value.shape) not in ((), (size,)):
                raise ValueError(f"{name} of reductions[{k}] must have shape () or ({size},), got {tuple(value.shape)}")
    checks.word(distance, DISTANCES, "distance")
    pairs = checked_pairs(x, labels, y, ref_labels, distance, False, impl)
    if isinstance(pairs, Pairs):
        reductions = _sorted(reductions, pairs)
    return tuple(pairs.restore(row) for row in pairs.reduce(*reductions))


def _sorted(reductions: tuple[Reduction, ...], pairs: Pairs) -> tuple[Reduction, ...]:
    """The same reductions with their vectors in the order of `pairs`, and bounds on each other kept."""
    found: dict[int, Reduction] = {}

    def ordered(value: Any, order: Tensor) -> Any:
        if isinstance(value, Bound):
            return Bound(found.get(id(value.of), value.of), value.shift)
        return value.index_select(0, order) if isinstance(value, Tensor) and value.dim() else value

    plan = pairs.plan
    for r in reductions:
        found[id(r)] = replace(
            r,
            offset=ordered(r.offset, plan.order),
            ref_offset=ordered(r.ref_offset, plan.ref_order),
            lower=ordered(r.lower, plan.order),
            upper=ordered(r.upper, plan.order),
        )
    return tuple(found[id(r)] for r in reductions)
