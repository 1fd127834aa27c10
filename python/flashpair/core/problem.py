"""The contract between the engine and a backend: a problem, the terms to reduce, their values, their gradients.

A backend that computes row reductions is a module with three functions:

- ``forward(problem, terms, operands, keep) -> (values, kept)``: the row values, and with `keep` the tensors that
  backward needs;
- ``backward(problem, terms, operands, values, kept, grads, need) -> Gradients``;
- ``kept_like(x, y, terms, keep)``: the shapes and dtypes of the kept tensors, for tracing.

A backend that computes a whole loss in one call has ``run_small_batch(call) -> Results`` (engine/small_batch.py).

`values` is one tensor of rows (N,). The first K rows are the terms' values. Behind them stand two rows for each
logsumexp, in the order of the terms (see `tops`):

- the top: z of the largest term of the sum; where the term has a transform, phi of it;
- the rest: the logarithm of the sum relative to its largest term.

Backward computes a softmax weight as exp((z - top) * scale - rest), not as exp(scale * z - value). For a large
scale * z the value has no digits left for the sum, and a compiler that fuses a multiplication with an addition rounds
scale * z differently. An empty set has the top 0 and the rest inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reduction import BUILT_IN, OPS, SIDES

LOGSUMEXP, SUM, MIN, MAX, COUNT = range(len(OPS))
POSITIVES, NEGATIVES = SIDES.index("positives"), SIDES.index("negatives")
IDENTITY = BUILT_IN.index("identity")
Like = tuple[tuple[int, ...], torch.dtype]  # the shape and the dtype of a tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which embeddings of `dtype` are accumulated, which is also the dtype of row values."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Anchors and references in label order.

    A problem without `y` is square: the anchors are the references, and no row is a pair with itself.

    A two-sided problem has a `split` other than 0, and neither `y` nor `end`. Rows [0, split) and rows [split, N) are
    two groups of anchors, each sorted by label, and the references of a row are the rows of the other group. If one
    group is empty, whichever it is, `split` is N. Only `tiled` on the CPU takes two-sided problems.

    Attributes:
        x: (N, D), the anchors, sorted by label.
        y: (M, D), the references, sorted by label; None: x.
        lo: (N,) int64. The positives of row i are references [lo_i, hi_i); in a two-sided problem these are row numbers
            of x.
        hi: (N,) int64, see `lo`.
        end: () int64: references [end, M) take no part; None: all take part.
        order: (M,) int64, the caller's index of each reference. Of equal extremes the one of the lowest index counts.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        split: see above; 0 for a problem that is not two-sided.
    """

    x: Tensor
    y: Tensor | None
    lo: Tensor
    hi: Tensor
    end: Tensor | None
    order: Tensor
    distance: str
    split: int = 0

    @property
    def refs(self) -> Tensor:
        """(M, D), the references."""
        return self.x if self.y is None else self.y

    @property
    def pairs(self) -> int:
        """The number of pairs. Where anchors are references, a pair counts twice, once from each end."""
        n = self.x.shape[0]
        return 2 * self.split * (n - self.split) if self.split else n * self.refs.shape[0]

    def refuse_groups(self, who: str) -> None:
        """Raises NotImplementedError for a two-sided problem. `who` begins the message."""
        if self.split:
            raise NotImplementedError(f"{who} no two-sided problem, got split={self.split}")

    def row_and_ref_squares(self) -> tuple[Tensor | None, Tensor | None]:
        """The squared norms of the anchors (N,) and of the references (M,); None for dot products, which need none."""
        if self.distance == "dot":
            return None, None
        x = self.x.to(accumulator(self.x.dtype))
        rows = (x * x).sum(1)
        if self.y is None:
            return rows, rows
        y = self.y.to(x.dtype)
        return rows, (y * y).sum(1)


class Term(NamedTuple):
    """The constants of one reduction of a `Call` (call.py).

    Attributes:
        op: its number in `OPS`.
        side: its number in `SIDES`.
        transform: its number in `TRANSFORMS`.
        detach: no gradient is needed.
        lower_of: the number of the term whose value bounds the window below; -1: no term does.
        upper_of: the same above.
        lower_shift: is added to the value of term `lower_of`.
        upper_shift: is added to the value of term `upper_of`.
        shift: the offset where it is a number, else 0.
        slots: where the term's offset, ref_offset, lower and upper stand in `Operands.vectors`; -1: it has none there.
    """

    op: int
    side: int
    transform: int
    detach: bool
    lower_of: int
    upper_of: int
    lower_shift: float
    upper_shift: float
    shift: float
    slots: tuple[int, ...]

    @property
    def window(self) -> bool:
        """The term has a mining window."""
        return max(self.lower_of, self.upper_of, *self.slots[2:]) >= 0

    @property
    def transformed(self) -> bool:
        """The term is a logsumexp of a transform."""
        return self.op == LOGSUMEXP and self.transform != IDENTITY

    @property
    def weighted(self) -> bool:
        """The gradient has a weight for every pair of the term."""
        return self.op in (LOGSUMEXP, SUM) and not self.detach

    @property
    def indexed(self) -> bool:
        """The gradient goes to one reference of each row, which attains the extreme."""
        return self.op in (MIN, MAX) and not self.detach


Terms = tuple[Term, ...]


class Operands(NamedTuple):
    """The scales and the vectors of K terms.

    Attributes:
        scale: (K,), the scales, if at least one of them is a tensor; else None.
        scales: K numbers, the scales where `scale` is None.
        vectors: tensors (N,), or (M,) for a ref_offset; `Term.slots` says which is which.
    """

    scale: Tensor | None
    scales: Sequence[float]
    vectors: Sequence[Tensor]

    def vector(self, slot: int) -> Tensor | None:
        """The vector in a place that `Term.slots` names; None for -1."""
        return None if slot < 0 else self.vectors[slot]


class Gradients(NamedTuple):
    """Gradients of x (N, D), y (M, D), scale (K,), offset (K, N) and ref_offset (K, M); None where not needed."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    ref_offset: Tensor | None


def stages(terms: Terms) -> list[list[int]]:
    """The terms' numbers by stage: a term whose window is bound to other terms' values runs in a later stage than they.

    A backend goes through all pairs once for each stage.
    """
    depth: list[int] = []
    for t in terms:
        depth.append(1 + max(depth[bound] if bound >= 0 else -1 for bound in (t.lower_of, t.upper_of)))
    return [[k for k in range(len(terms)) if depth[k] == stage] for stage in range(max(depth, default=-1) + 1)]


def tops(terms: Sequence[Term]) -> tuple[int, ...]:
    """For each term the row of `values` that holds its top; the next row holds its rest. -1: it is no logsumexp."""
    rows, following = [], len(terms)
    for t in terms:
        rows.append(following if t.op == LOGSUMEXP else -1)
        following += 2 * (t.op == LOGSUMEXP)
    return tuple(rows)


def merge_logsumexp(first: Tensor, second: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logsumexp of the union of two sets: its value (N,), top (N,) and rest (N,).

    Args:
        first: (3, N), value, top and rest of the first set.
        second: (3, N), those of the second set.
        scale: the term's scale, a number or a tensor (); 1 for a transform.
    """
    (_, top, rest), (_, second_top, second_rest) = first, second
    empty = rest == torch.inf
    lead = (second_top - top) * scale  # how far the second set's largest exponent is above the first set's
    swap = (second_rest != torch.inf) & (empty | (lead > 0))
    high_top = torch.where(swap, second_top, top)
    low_lead = torch.where(swap, -lead, lead)  # at most 0 where both have terms
    high_rest, low_rest = torch.where(swap, second_rest, rest), torch.where(swap, rest, second_rest)
    alone = low_rest == torch.inf
    merged = torch.logaddexp(high_rest, torch.where(alone, -torch.inf, low_rest + low_lead))
    merged_rest = torch.where(alone, high_rest, merged)
    value = torch.where(merged_rest == torch.inf, -torch.inf, high_top * scale + merged_rest)
    return value, high_top, merged_rest


def num_rows(terms: Sequence[Term]) -> int:
    """The number of rows of `values`: one for each term, and two more for each logsumexp."""
    return len(terms) + 2 * sum(t.op == LOGSUMEXP for t in terms)


NUMBERS = {dtype: k for k, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16))}
AVERAGINGS = ("mean", "sum", "none", "mean_valid", "nonzero", "mean_pairs")
Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The loss () or (N,), the share of valid rows (), dL/dx (N, D) and dL/dy (M, D), float32 or float64, or None."""


class SmallBatchCode(NamedTuple):
    """The integers that describe a whole loss, in the order of csrc/small_batch/spec.h."""

    block_rows: int  # how many anchors a thread block of `onchip` holds; 0 on the CPU
    formula: int  # its number in row_formula.FORMULAS
    averaging: int  # its number in AVERAGINGS
    normalize: int
    euclidean: int
    one_pair: int
    mined: int


class SmallBatch(NamedTuple):
    """A whole loss to compute, in the caller's order.

    Attributes:
        x: (N, D), the anchors.
        labels: (N,) int64.
        y: (M, D), the references, in the dtype of `x`; None: x.
        ref_labels: (M,) int64, with `y`.
        upstream: (N,), the gradient of each row's loss; None where the loss is one number.
        code: what the loss is, made by `Plan` of engine/small_batch.py.
        numbers: the two scales, the two shifts and epsilon.
        want_loss: the loss is a result.
        want_share: the share of valid rows is a result.
        want_dx: dL/dx is a result.
        want_dy: dL/dy is a result.
    """

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None
    upstream: Tensor | None
    code: SmallBatchCode
    numbers: tuple[float, ...]
    want_loss: bool
    want_share: bool
    want_dx: bool
    want_dy: bool

    @property
    def shape(self) -> tuple[int, int, int, int, bool]:
        """N, M, D, the number of the dtype in `NUMBERS`, and whether the anchors are the references."""
        (n, d), m = self.x.shape, (self.x if self.y is None else self.y).shape[0]
        return n, m, d, NUMBERS[self.x.dtype], self.y is None

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, D), labels (N,), references (M, D) and their labels (M,), contiguous; without `y`, x and its labels."""
        x, labels = solid(self.x), solid(self.labels)
        if self.y is None or self.ref_labels is None:
            return x, labels, x, labels
        return x, labels, solid(self.y), solid(self.ref_labels)

    def empty_results(self, dtype: torch.dtype) -> Results:
        """Memory of that dtype for the results that are asked for."""
        x, y = self.x, self.x if self.y is None else self.y
        rows = x.shape[:1] if self.code.averaging == AVERAGINGS.index("none") else ()
        return (
            torch.empty(rows, dtype=dtype, device=x.device) if self.want_loss else None,
            torch.empty((), dtype=dtype, device=x.device) if self.want_share else None,
            torch.empty(x.shape, dtype=dtype, device=x.device) if self.want_dx else None,
            torch.empty(y.shape, dtype=dtype, device=x.device) if self.want_dy else None,
        )


def plain(x: Tensor) -> bool:
    """Whether a kernel may read `x` by its address: it is an ordinary tensor, and nobody is tracing."""
    ordinary = type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda")
    return ordinary and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def solid(t: Tensor) -> Tensor:
    """`t`, contiguous and without torch's negative bit (a sign that torch keeps beside the memory)."""
    return t.contiguous().resolve_neg()


def address(t: Tensor | None, kind: str = "cpu") -> int:
    """The address of a tensor's first entry, 0 for None. The caller keeps the tensor alive.

    Raises:
        RuntimeError: a tensor on another kind of device, one that is not `solid`, or one without memory (a FakeTensor).
            A kernel would read memory that is not the tensor's.
    """
    if t is None:
        return 0
    if t.device.type != kind:
        raise RuntimeError(f"a kernel for {kind} tensors must not read a tensor on {t.device}, {tuple(t.shape)}")
    if t.is_neg() or not t.is_contiguous():
        sign = " and a negative bit" if t.is_neg() else ""
        raise RuntimeError(
            "a kernel needs a contiguous tensor without a negative bit, got shape "
            f"{tuple(t.shape)} with strides {t.stride()}{sign}"
        )
    pointer = t.data_ptr() if type(t).__name__ != "FakeTensor" else 0
    if not pointer and t.numel():
        raise RuntimeError(f"a kernel needs a tensor with memory, got a {type(t).__name__} {tuple(t.shape)}")
    return pointer
