"""What every schedule is given and gives back: a problem, the terms to reduce, values, gradients.

A schedule is a module with `forward(problem, terms, operands, keep) -> (values, kept)`, `backward(problem, terms,
operands, values, kept, grads, need) -> Gradients`, and `kept_like`, the shapes and dtypes of the tensors it keeps, for
tracing.
One that can compute a whole loss at once has `run_small_batch(call) -> Results` (engine/small_batch.py).

`values` holds the K terms' values (N,) and, behind them, two rows for each logsumexp, in the terms' order (`tops`): its
largest term's z (of a transform: phi), and the log of its sum relative to that term. Backward takes a softmax as
exp((z - top) * scale - rest): scale * z itself may be so large that the value has no digits left for the sum, and
rounds differently wherever a compiler multiplies and adds at once. An empty set has top 0 and rest inf.
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
Like = tuple[tuple[int, ...], torch.dtype]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What embeddings of that dtype are accumulated in, and row values come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Sorted embeddings x (N, D), y (M, D) or None for x itself, intervals lo, hi (N,), and the caller's order (M,).

    end: () int64 or None, references from there on take no part.
    split: 0, or of a problem without y and end, two groups of anchors, rows [0, split) and [split, N), each sorted by
        itself. Its pairs are those of one group with the other: a row's references are the other group, in which its
        interval lies, in the rows' numbers. Where the first group is empty, split is N, as where the last one is.
        `tiled` on the CPU takes it; others refuse.
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
        return self.x if self.y is None else self.y

    @property
    def pairs(self) -> int:
        """How many there are, counted from both ends in a square problem."""
        n = self.x.shape[0]
        return 2 * self.split * (n - self.split) if self.split else n * self.refs.shape[0]

    def refuse_groups(self, who: str) -> None:
        if self.split:
            raise NotImplementedError(f"{who} no problem of two groups, got split={self.split}")

    def row_and_ref_squares(self) -> tuple[Tensor | None, Tensor | None]:
        """Squared norms (N,), (M,) for Euclidean distances, None for dot products."""
        if self.distance == "dot":
            return None, None
        x = self.x.to(accumulator(self.x.dtype))
        rows = (x * x).sum(1)
        if self.y is None:
            return rows, rows
        y = self.y.to(x.dtype)
        return rows, (y * y).sum(1)


class Term(NamedTuple):
    """The constants of one reduction of a `Call` (call.py)."""

    op: int
    side: int
    transform: int
    detach: bool
    lower_of: int
    upper_of: int
    lower_shift: float
    upper_shift: float
    shift: float  # its offset where that is a number
    slots: tuple[int, ...]  # where its offset, ref_offset, lower and upper stand among the vectors, or -1

    @property
    def window(self) -> bool:
        return max(self.lower_of, self.upper_of, *self.slots[2:]) >= 0

    @property
    def transformed(self) -> bool:
        """A logsumexp of a transform."""
        return self.op == LOGSUMEXP and self.transform != IDENTITY

    @property
    def weighted(self) -> bool:
        return self.op in (LOGSUMEXP, SUM) and not self.detach

    @property
    def indexed(self) -> bool:
        return self.op in (MIN, MAX) and not self.detach


Terms = tuple[Term, ...]


class Operands(NamedTuple):
    """The terms' operands: scale (K,) if any is a tensor, else scales; vectors (N,) or (M,), see `Term.slots`."""

    scale: Tensor | None
    scales: Sequence[float]
    vectors: Sequence[Tensor]

    def vector(self, slot: int) -> Tensor | None:
        return None if slot < 0 else self.vectors[slot]


class Gradients(NamedTuple):
    """Of x (N, D), y (M, D), scale (K,), offset (K, N) and ref_offset (K, M); None where not wanted."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    ref_offset: Tensor | None


def stages(terms: Terms) -> list[list[int]]:
    """The terms in the order in which their windows' bounds become known."""
    depth: list[int] = []
    for t in terms:
        depth.append(1 + max((depth[of] for of in (t.lower_of, t.upper_of) if of >= 0), default=-1))
    return [[k for k in range(len(terms)) if depth[k] == stage] for stage in range(max(depth, default=-1) + 1)]


def tops(terms: Sequence[Term]) -> tuple[int, ...]:
    """Which row of `values` is each logsumexp's top, the next one being its rest; -1 for other terms."""
    rows, following = [], len(terms)
    for t in terms:
        rows.append(following if t.op == LOGSUMEXP else -1)
        following += 2 * (t.op == LOGSUMEXP)
    return tuple(rows)


def merge_logsumexp(one: Tensor, other: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, top and rest of two sets' union from their own (3, N); scale: of the term, 1 of a transform."""
    (_, top, rest), (_, other_top, other_rest) = one, other
    empty = rest == torch.inf
    ahead = (other_top - top) * scale  # of exponents
    swap = (other_rest != torch.inf) & (empty | (ahead > 0))
    high = torch.where(swap, other_top, top)
    behind = torch.where(swap, -ahead, ahead)
    own, added = torch.where(swap, other_rest, rest), torch.where(swap, rest, other_rest)
    alone = added == torch.inf
    total = torch.where(alone, own, torch.logaddexp(own, torch.where(alone, -torch.inf, added + behind)))
    value = torch.where(total == torch.inf, -torch.inf, high * scale + total)
    return value, high, total


def num_rows(terms: Sequence[Term]) -> int:
    """Of `values`."""
    return len(terms) + 2 * sum(t.op == LOGSUMEXP for t in terms)


NUMBERS = {dtype: k for k, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16))}
AVERAGINGS = ("mean", "sum", "none", "mean_valid", "nonzero", "mean_pairs")
Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Loss () or (N,), the share of valid rows (), dL/dx (N, D) and dL/dy (M, D), float32 or float64; None not wanted."""


class SmallBatchCode(NamedTuple):
    """The integers of a whole loss, in the order of csrc/small_batch/spec.h."""

    block_rows: int  # of the anchors that a block of `onchip` holds; 0 elsewhere
    formula: int  # in row_formula.FORMULAS
    averaging: int  # in AVERAGINGS
    normalize: int
    euclidean: int
    one_pair: int
    mined: int


class SmallBatch(NamedTuple):
    """A whole loss to compute: x (N, D) and y (M, D) of one dtype or None for x itself, with labels, as they came;
    upstream (N,): dL/d(row's loss), None where the loss is one number; the constants of its plan, as
    engine/small_batch.py makes it."""

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None
    upstream: Tensor | None
    code: SmallBatchCode
    numbers: tuple[float, ...]  # the two scales, the two shifts, epsilon
    want_loss: bool
    want_share: bool
    want_dx: bool
    want_dy: bool

    @property
    def shape(self) -> tuple[int, int, int, int, bool]:
        """N, M, D, the dtype's number in csrc/small_batch/spec.h, and whether the problem is square."""
        (n, d), m = self.x.shape, (self.x if self.y is None else self.y).shape[0]
        return n, m, d, NUMBERS[self.x.dtype], self.y is None

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, labels, and references with theirs (x's own in a square problem), contiguous."""
        x, labels = solid(self.x), solid(self.labels)
        if self.y is None or self.ref_labels is None:
            return x, labels, x, labels
        return x, labels, solid(self.y), solid(self.ref_labels)

    def room(self, dtype: torch.dtype) -> Results:
        """Memory for what is wanted."""
        x, y = self.x, self.x if self.y is None else self.y
        rows = x.shape[:1] if self.code.averaging == AVERAGINGS.index("none") else ()
        return (
            torch.empty(rows, dtype=dtype, device=x.device) if self.want_loss else None,
            torch.empty((), dtype=dtype, device=x.device) if self.want_share else None,
            torch.empty(x.shape, dtype=dtype, device=x.device) if self.want_dx else None,
            torch.empty(y.shape, dtype=dtype, device=x.device) if self.want_dy else None,
        )


def plain(x: Tensor) -> bool:
    """Whether `x` may be handed to a kernel by its address: an ordinary tensor, and nobody is tracing."""
    ordinary = type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda")
    return ordinary and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def solid(t: Tensor) -> Tensor:
    """`t` as its memory reads: contiguous, and without torch's negative bit, a sign that is kept beside the memory."""
    return t.contiguous().resolve_neg()


def address(t: Tensor | None, kind: str = "cpu") -> int:
    """Of its first entry, 0 for None; the caller holds the memory.

    Raises:
        RuntimeError: a tensor that is not on a device of that `kind`, not `solid`, or without memory (a FakeTensor): a
            kernel would read what is none of its own.
    """
    if t is None:
        return 0
    if t.device.type != kind:
        raise RuntimeError(f"a kernel for {kind} tensors must not read a tensor on {t.device}, {tuple(t.shape)}")
    if t.is_neg() or not t.is_contiguous():
        raise RuntimeError(f"a kernel reads memory as it lies, not a tensor {tuple(t.shape)} of strides {t.stride()}")
    pointer = t.data_ptr() if type(t).__name__ != "FakeTensor" else 0
    if not pointer and t.numel():
        raise RuntimeError(f"a kernel reads memory, and a {type(t).__name__} {tuple(t.shape)} has none")
    return pointer
