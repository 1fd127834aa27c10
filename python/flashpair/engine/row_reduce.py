"""`row_reduce`, the public function for row reductions, with values in the caller's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core import checks
from ..core.pairs import PairReducer
from ..core.reduction import DISTANCES, Bound, Reduction, check_number, place_of
from .pairs import checked_pairs


def row_reduce(
    embeddings: Tensor,
    labels: Tensor,
    *reductions: Reduction,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    distance: str = "dot",
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Row reductions of all pairs of embeddings, or of embeddings and references; the N x M matrix is never stored.

    It is differentiable in the embeddings, the references, and each reduction's scale and offsets; second derivatives
    use the dense matrix. Reductions of one call share their passes; `Reduction` says what they can be. A loss of your
    own is some reductions and ordinary PyTorch on (N,) tensors; written as a `Criterion` it sorts only once.

    Args:
        embeddings: (N, D), float16 to float64; nothing is normalised here.
        labels: (N,), integers.
        reductions: one or more `Reduction`s; vectors in them are in the caller's order.
        ref_emb: (M, D), or None: the embeddings themselves, without self pairs.
        ref_labels: (M,), integers, with `ref_emb`.
        distance: ``"dot"`` (the default), ``"euclidean"`` or ``"squared_euclidean"``.
        impl: as `Criterion` takes it.

    Returns:
        One tensor (N,) for each reduction, in the caller's order, float32 or float64.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: no reduction, an unknown word, or shapes and devices that do not fit.
        RuntimeError: a named `impl` that cannot run here, with every reason.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> lowest, number = flashpair.row_reduce(
        ...     x, labels, flashpair.Reduction("min", "positives"), flashpair.Reduction("count", "negatives", lower=0.5)
        ... )
        >>> [round(value, 4) for value in lowest.tolist()], number.tolist()
        ([0.6, 0.6, 0.6, 0.6], [0.0, 1.0, 1.0, 0.0])
    """
    x, labels, y, ref_labels = checks.batch(embeddings, labels, ref_emb, ref_labels)
    for k, r in enumerate(reductions):
        if not isinstance(r, Reduction):
            raise TypeError(f"reductions[{k}] must be a Reduction, got {type(r).__name__}")
        n, m = x.shape[0], (x if y is None else y).shape[0]
        for name, size in (("scale", None), ("offset", n), ("lower", n), ("upper", n), ("ref_offset", m)):
            _check(f"{name} of reductions[{k}]", getattr(r, name), size, x)
    if not reductions:
        raise ValueError("reductions must be at least one Reduction, got none")
    checks.word(distance, DISTANCES, "distance")
    pairs = checked_pairs(x, labels, y, ref_labels, distance, False, impl)
    return tuple(pairs.restore(row) for row in pairs.reduce(*_arranged(reductions, pairs)))


def _check(name: str, value: Any, size: int | None, x: Tensor) -> None:
    """Checks an argument of a `Reduction`.

    Args:
        name: what it is called.
        value: a number, a real tensor () or (size,) on the device of `x`, a `Bound` whose shift is a number, or None.
        size: the length of a vector; None: only () is right.
        x: (N, D), the embeddings.
    """
    if isinstance(value, Bound):
        if not isinstance(value.of, Reduction):
            raise TypeError(f"{name} must be bound to a Reduction, got {checks.what(value.of)}")
        check_number(value.shift, f"the shift of {name}", "a number")
        return
    if value is None:
        return
    shape = "()" if size is None else f"() or ({size},)"
    if not isinstance(value, Tensor):
        check_number(value, name, f"a number or a tensor of shape {shape}")
        return
    if value.dtype not in checks.FLOATS + checks.INTEGERS:
        raise TypeError(f"{name} must be a real tensor of shape {shape}, got {checks.what(value)}")
    checks.memory(value, name)
    if tuple(value.shape) not in ((), (size,)):
        raise ValueError(f"{name} must have shape {shape}, got {checks.what(value)}")
    checks.like(value, x, name)


def _arranged(reductions: tuple[Reduction, ...], pairs: PairReducer) -> tuple[Reduction, ...]:
    """The same reductions, with vectors in the order of `pairs`, and with bounds on the new reductions."""
    arranged_reductions: list[Reduction] = []

    def arranged(value: Any, by: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, Bound):
            k = place_of(value.of, reductions[: len(arranged_reductions)])
            return Bound(value.of if k is None else arranged_reductions[k], value.shift)
        return by(value) if isinstance(value, Tensor) and value.dim() else value

    for r in reductions:
        arranged_reductions.append(
            replace(
                r,
                offset=arranged(r.offset, pairs.arrange),
                ref_offset=arranged(r.ref_offset, pairs.arrange_refs),
                lower=arranged(r.lower, pairs.arrange),
                upper=arranged(r.upper, pairs.arrange),
            )
        )
    return tuple(arranged_reductions)
