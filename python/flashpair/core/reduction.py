"""`Reduction`: one number for each anchor, reduced from its pairs."""

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
HINGES = ("hinge", "squared_hinge")  # zero for all pairs on one side of a corner
TRANSFORMS = list(BUILT_IN)  # register_transform appends to it
DISTANCES = ("dot", "euclidean", "squared_euclidean")


@dataclass(frozen=True, eq=False)
class Bound:
    """One end of a mining window: the row value of an earlier reduction of the same call, plus `shift`.

    Args:
        of: the `Reduction` whose row value bounds the window; it must not have an offset.
        shift: a number that is added to the row value.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> lowest = flashpair.Reduction("min", "positives", detach=True)
        >>> mined = flashpair.Reduction("count", "negatives", lower=flashpair.Bound(lowest, -0.1))
        >>> flashpair.row_reduce(x, labels, lowest, mined)[1].tolist()  # negatives above (lowest positive) - 0.1
        [0.0, 1.0, 1.0, 0.0]
    """

    of: Reduction
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Reduction:
    """One number for each anchor from its pairs, the building block of all losses (Wang et al., 2019, eq. 2-3).

    For anchor i, over the pairs j of one side and within a window:

        r_i = op { phi(t_ij) : j in side, lower_i < z_ij < upper_i },    t_ij = scale z_ij + offset_i

    z_ij is the pair's dot product (or Euclidean distance, or its square). Without references an anchor has no pair with
    itself. Over an empty set logsumexp and max are -inf, min is +inf, sum and count are 0. The gradient of a reduction
    is one weight for each pair, as in General Pair Weighting.

    Args:
        op: ``"logsumexp"``, ``"sum"``, ``"min"``, ``"max"`` or ``"count"``. The last three are of z itself.
        side: ``"positives"`` (same label, not itself), ``"negatives"`` (other label) or ``"all"``.
        transform: phi. All but ``"identity"`` only go with ``"sum"``, and (except ``"lifted"``) with ``"logsumexp"``,
            log sum e^phi(t), which then takes no window, and only numbers as scale and offset.

            - ``"identity"``: t.
            - ``"softplus"``: log(1 + e^t).
            - ``"hinge"``: max(0, t).
            - ``"squared_hinge"``: max(0, t)^2.
            - ``"triangle"``: max(0, 1 - |t|), a bin of a soft histogram (see `histogram`).
            - ``"lifted"``: max(0, scale z + logaddexp(offset_i, ref_offset_j))^2 (Oh Song et al., 2016, eq. 4).
            - a word given to `register_transform`.
        scale: a number or a tensor (); differentiable.
        offset: None, a number, or a tensor () or (N,); differentiable.
        ref_offset: a tensor (M,), for ``"lifted"`` only; differentiable.
        lower: the window's strict lower end: None, a number, a tensor () or (N,), or a `Bound`, by which one call runs
            in stages (Multi-Similarity: positives, all negatives, positives). It gets no gradient.
        upper: its strict upper end, likewise.
        detach: True if no gradient of this reduction is needed (mining statistics); it makes min and max cheaper.

    Raises:
        ValueError: an unknown word, or arguments that do not go together.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> positives = flashpair.Reduction("sum", "positives", "hinge", scale=-1.0, offset=0.9)  # max(0, 0.9 - s)
        >>> [round(value, 4) for value in flashpair.row_reduce(x, labels, positives)[0].tolist()]
        [0.3, 0.3, 0.3, 0.3]
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
        if self.transforms_terms and not (self.lower is self.upper is None):
            raise ValueError(f"logsumexp of transform {self.transform!r} takes no window")
        if self.transforms_terms and (isinstance(self.offset, Tensor) or isinstance(self.scale, Tensor)):
            raise ValueError(f"logsumexp of transform {self.transform!r} takes numbers as scale and offset")
        if isinstance(self.scale, Tensor) and self.scale.dim():
            raise ValueError(f"scale must be a number or a tensor of shape (), got shape {tuple(self.scale.shape)}")
        plain = self.offset is None and not isinstance(self.scale, Tensor) and self.scale == 1
        if self.op in ("min", "max", "count") and not plain:
            raise ValueError(f"op {self.op!r} reduces the similarity itself and takes no scale and no offset")
        if (self.transform == "lifted") != (self.ref_offset is not None):
            raise ValueError("ref_offset must be given with transform 'lifted', and with no other")
        if self.transform == "lifted" and not isinstance(self.offset, Tensor):
            raise ValueError("transform 'lifted' needs offset, a tensor of shape (N,)")

    @property
    def transforms_terms(self) -> bool:
        """The reduction is the logsumexp of a transform of t, not of t itself."""
        return self.op == "logsumexp" and self.transform != "identity"

    @property
    def offset_outside(self) -> bool:
        """The offset is added to the row's value, after the reduction. A logsumexp of t allows that."""
        return self.op == "logsumexp" and self.transform == "identity"


def bound_places(reductions: tuple[Reduction, ...]) -> list[tuple[int, int]]:
    """For each reduction the numbers of those that bound its window below and above; -1: none does.

    Raises:
        ValueError: a window is bound to a reduction that is not an earlier one of the call, or that has an offset.
    """
    bounds = []
    for k, r in enumerate(reductions):
        pair = []
        for name, bound in (("lower", r.lower), ("upper", r.upper)):
            place = place_of(bound.of, reductions[:k]) if isinstance(bound, Bound) else -1
            if place is None:
                raise ValueError(f"{name} of reductions[{k}] must be bound to an earlier reduction of the same call")
            if isinstance(bound, Bound) and bound.of.offset is not None:
                raise ValueError(
                    f"{name} of reductions[{k}] is bound to a reduction with an offset; use the Bound's shift instead"
                )
            pair.append(place)
        bounds.append((pair[0], pair[1]))
    return bounds


def check_number(value: Any, name: str, wanted: str) -> None:
    """Raises TypeError for what is no number, and ValueError for NaN.

    Args:
        value: what the caller gave.
        name: what it is called.
        wanted: what it must be, in words.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {wanted}, got {what(value)}")
    if value != value:
        raise ValueError(f"{name} must be {wanted}, got NaN")


def check_call(reductions: tuple[Any, ...], x: Tensor, n: int, m: int) -> None:
    """Checks the arguments of `PairReducer.reduce`.

    Args:
        reductions: what the caller gave.
        x: a tensor on the device of the pairs.
        n: the number of anchors.
        m: the number of references.

    Raises:
        TypeError: an argument is not a Reduction, or has a value of a wrong type.
        ValueError: there is no reduction, or a vector has another length or device.
    """
    if not reductions:
        raise ValueError("reductions must be at least one Reduction, got none")
    for k, r in enumerate(reductions):
        if not isinstance(r, Reduction):
            raise TypeError(f"reductions[{k}] must be a Reduction, got {what(r)}")
        for name, size in (("scale", 0), ("offset", n), ("lower", n), ("upper", n), ("ref_offset", m)):
            value = getattr(r, name)
            if isinstance(value, Bound):
                check_number(value.shift, f"the shift of {name} of reductions[{k}]", "a number")
            elif isinstance(value, Tensor):
                if value.shape not in ((), (size,)):
                    raise ValueError(f"{name} of reductions[{k}] must have shape () or ({size},), got {what(value)}")
                like(value, x, f"{name} of reductions[{k}]")
            elif value is not None or name == "scale":
                check_number(value, f"{name} of reductions[{k}]", "a number or a tensor")


def place_of(r: Reduction, among: tuple[Reduction, ...]) -> int | None:
    """The index of the object `r` in `among`; None: it is not there."""
    # Not a dictionary by `id`, which some versions of torch.compile cannot trace.
    for k, other in enumerate(among):
        if other is r:
            return k
    return None


def histogram(side: str, nodes: int, first: float, step: float) -> tuple[Reduction, ...]:
    """A soft histogram of z over a row's pairs, one `Reduction` for each node (Ustinova and Lempitsky, 2016).

    Node r stands at first + r step. A pair between two nodes counts for both, linearly. If the reductions stand side by
    side in one call, the CPU looks up each pair once for all of them.

    Args:
        side: ``"positives"``, ``"negatives"`` or ``"all"``.
        nodes: how many, at least 2.
        first: where the first node stands.
        step: the distance between neighbouring nodes, not 0.

    Returns:
        The reductions, in the order of the nodes.

    Raises:
        ValueError: fewer nodes, a step of 0, or an unknown side.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> bins = flashpair.row_reduce(x, labels, *flashpair.histogram("positives", 3, 0.0, 0.5))  # nodes 0, 0.5, 1
        >>> [round(row[0].item(), 4) for row in bins]  # 0.6 is between the second and the third
        [0.0, 0.8, 0.2]
    """
    if nodes < 2 or step == 0:
        raise ValueError(f"histogram needs at least 2 nodes and a step other than 0, got {nodes} and {step}")
    return (_nodes if torch.compiler.is_compiling() else _kept_nodes)(side, nodes, first, step)


def _nodes(side: str, nodes: int, first: float, step: float) -> tuple[Reduction, ...]:
    return tuple(Reduction("sum", side, "triangle", scale=1 / step, offset=-first / step - r) for r in range(nodes))


_kept_nodes = functools.lru_cache(maxsize=64)(_nodes)
