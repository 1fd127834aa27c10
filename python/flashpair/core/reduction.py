"""The vocabulary of the engine: what one row reduction is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import like, what

OPS = ("logsumexp", "sum", "min", "max", "count")
SIDES = ("positives", "negatives", "all")
BUILT_IN = ("identity", "softplus", "hinge", "squared_hinge", "triangle", "lifted")
HINGES = ("hinge", "squared_hinge")  # which have no use for pairs on one side of a corner
TRANSFORMS = list(BUILT_IN)  # register_transform adds to it
DISTANCES = ("dot", "euclidean", "squared_euclidean")


@dataclass(frozen=True, eq=False)
class Bound:
    """A side of a mining window: another reduction's row value plus `shift`. It must stand earlier in the same call."""

    of: Reduction
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Reduction:
    """One number for each anchor i from its pairs: ``r_i = op { phi(t_ij) : j in side, lower_i < z_ij < upper_i }``.

    ``z_ij`` is the pair's dot product (or Euclidean distance, or its square), ``t_ij = scale * z_ij + offset_i``. Self
    pairs are never part of a square problem. Over an empty set logsumexp and max are -inf, min is +inf, sum and count
    are 0.
    The family is General Pair Weighting's (Wang et al., 2019, eq. 2-3): a reduction's gradient is a weight a pair.

    Args:
        op: ``"logsumexp"``, ``"sum"``, ``"min"``, ``"max"`` or ``"count"``. The last three are of ``z`` itself.
        side: ``"positives"`` (same label, not itself), ``"negatives"`` (other label) or ``"all"``.
        transform: phi. ``"identity"``; ``"softplus"``: log(1 + e^t); ``"hinge"``: max(0, t); ``"squared_hinge"``:
            max(0, t)^2; ``"triangle"``: max(0, 1 - |t|), a bin of a soft histogram (see `histogram`); ``"lifted"``:
            max(0, scale * z + logaddexp(offset_i, ref_offset_j))^2 (Oh Song et al., 2016, eq. 4); or a word given to
            `register_transform`. Other than ``"identity"`` only for ``"sum"`` and, but for ``"lifted"``, for
            ``"logsumexp"``: log sum e^phi(t), which then takes no window, and numbers as scale and offset.
        scale: a float or a tensor of no dimensions; differentiable.
        offset: None, a float, or a tensor () or (N,); differentiable.
        ref_offset: a tensor (M,), for ``"lifted"`` alone; differentiable.
        lower, upper: the mining window, strict, and constants to autograd: None, a float, a tensor () or (N,), or a
            `Bound`, with which one call runs in stages (Multi-Similarity: positives, all negatives, positives).
        detach: no gradient is wanted of this reduction (mining statistics), which makes min and max cheaper.

    Raises:
        ValueError: a word outside these sets, or a combination that has no meaning.
    """

    op: str
    side: str
    transform: str = "identity"
    scale: float | Tensor = 1.0
    offset: float | Tensor | None = None
    ref_offset: Tensor | None = None
    lower: float | Tensor | Bound | None = None
    upper: float | Tensor | Bound | None = None
    detach: bool = False

    def __post_init__(self) -> None:
        for name, words in (("op", OPS), ("side", SIDES), ("transform", TRANSFORMS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.transform != "identity" and self.op != "sum" and (self.op != "logsumexp" or self.transform == "lifted"):
            takers = "op 'sum'" if self.transform == "lifted" else "op 'sum' or 'logsumexp'"
            raise ValueError(f"transform {self.transform!r} goes with {takers}, got op {self.op!r}")
        if self.mapped and not (self.lower is self.upper is None):
            raise ValueError(f"logsumexp of transform {self.transform!r} takes no window")
        if self.mapped and (isinstance(self.offset, Tensor) or isinstance(self.scale, Tensor)):
            raise ValueError(f"logsumexp of transform {self.transform!r} takes numbers as scale and offset")
        if isinstance(self.scale, Tensor) and self.scale.dim():
            raise ValueError(f"scale must be a number or a tensor of shape (), got shape {tuple(self.scale.shape)}")
        plain = self.offset is None and not isinstance(self.scale, Tensor) and self.scale == 1
        if self.op in ("min", "max", "count") and not plain:
            raise ValueError(f"op {self.op!r} is of the similarity itself and takes no scale and no offset")
        if (self.transform == "lifted") != (self.ref_offset is not None):
            raise ValueError("ref_offset goes with transform 'lifted', and that transform needs it")
        if self.transform == "lifted" and not isinstance(self.offset, Tensor):
            raise ValueError("transform 'lifted' needs offset, a tensor of shape (N,)")

    @property
    def mapped(self) -> bool:
        """A logsumexp of phi(t), t not being what is added up itself."""
        return self.op == "logsumexp" and self.transform != "identity"

    @property
    def offset_outside(self) -> bool:
        """The offset is a summand of the row's value, as it is of a plain logsumexp."""
        return self.op == "logsumexp" and self.transform == "identity"


def bound_places(reductions: tuple[Reduction, ...]) -> list[tuple[int, int]]:
    """For each reduction the places of those that bound its window below and above, -1 for none.

    Raises:
        ValueError: a bound on a reduction that does not stand before it, or that has an offset of its own.
    """
    found = []
    for k, r in enumerate(reductions):
        pair = []
        for name, bound in (("lower", r.lower), ("upper", r.upper)):
            of = place_of(bound.of, reductions[:k]) if isinstance(bound, Bound) else -1
            if of is None:
                raise ValueError(f"{name} of reductions[{k}] is bound to a reduction that does not stand before it")
            if isinstance(bound, Bound) and bound.of.offset is not None:
                raise ValueError(f"{name} of reductions[{k}] is bound to a reduction with an offset; shift it")
            pair.append(of)
        found.append((pair[0], pair[1]))
    return found


def check_call(reductions: tuple[Any, ...], x: Tensor, n: int, m: int) -> None:
    """TypeError, ValueError: what `Pairs.reduce` does not take, of n rows and m references on the device of `x`."""
    if not reductions:
        raise ValueError("reductions must be at least one Reduction, got none")
    for k, r in enumerate(reductions):
        if not isinstance(r, Reduction):
            raise TypeError(f"reductions[{k}] must be a Reduction, got {what(r)}")
        for name, size in (("scale", 0), ("offset", n), ("lower", n), ("upper", n), ("ref_offset", m)):
            value = getattr(r, name)
            if isinstance(value, Tensor):
                if value.shape not in ((), (size,)):
                    raise ValueError(f"{name} of reductions[{k}] must have shape () or ({size},), got {what(value)}")
                like(value, x, f"{name} of reductions[{k}]")
            elif not isinstance(value, (float, int, Bound)) and (value is not None or name == "scale"):
                raise TypeError(f"{name} of reductions[{k}] must be a number or a tensor, got {what(value)}")


def place_of(r: Reduction, among: tuple[Reduction, ...]) -> int | None:
    """Where `r` itself stands. (No table by `id`, which not every torch.compile can trace.)"""
    for k, other in enumerate(among):
        if other is r:
            return k
    return None


def histogram(side: str, nodes: int, first: float, step: float) -> tuple[Reduction, ...]:
    """A soft histogram of z over a row's pairs, one reduction a node: node r stands at first + r * step, and a pair
    between two nodes counts for both, linearly (Ustinova and Lempitsky, 2016).

    Args:
        side: as `Reduction` takes it. nodes: at least 2. step: the distance of neighbouring nodes, not 0.

    Returns:
        The reductions, in the order of the nodes; side by side in one call they are one look-up a pair on the CPU.

    Raises:
        ValueError: fewer nodes, or a step of 0.
    """
    if nodes < 2 or step == 0:
        raise ValueError(f"histogram needs at least 2 nodes and a step other than 0, got {nodes} and {step}")
    return (_nodes if torch.compiler.is_compiling() else _kept_nodes)(side, nodes, first, step)


def _nodes(side: str, nodes: int, first: float, step: float) -> tuple[Reduction, ...]:
    return tuple(Reduction("sum", side, "triangle", scale=1 / step, offset=-first / step - r) for r in range(nodes))


_kept_nodes = functools.lru_cache(maxsize=64)(_nodes)
