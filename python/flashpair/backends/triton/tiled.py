"""`tiled` on the GPU, for wide embeddings: a vendor product, a fused Triton epilogue, and in backward a vendor product.

Computes: as `fused`. Where one kernel would run out of registers for the gradient (D of 512 and more), similarities of
BLOCK x BLOCK pairs are multiplied by cuBLAS into one buffer, added to the rows' state by the same kernels as `fused`,
and in backward turned into weights that cuBLAS multiplies with the embeddings. Of a square problem only the blocks on
and above the diagonal are computed: each serves the rows of both of its ends. Terms of positives alone go through
`fused`'s kernels, from the embeddings: their pairs are few.
Never materialises: more than one block of similarities and one of weights.
Keeps for backward: the row values, and the places of extremes.
Deterministic: blocks in a fixed order, no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.problem import NEGATIVES, POSITIVES, Gradients, Like, Operands, Problem, Terms, accumulator
from .forward_pass import ForwardPass, places_shape
from .gradients import GradientCollector
from .kernels.operands import Matrix
from .launch import padded
from .launcher import Launcher, PairBlock, Role
from .term_groups import launch_groups

BLOCK = 4096  # rows and columns: 64 MB of float32 similarities; a multiple of every tile
STRIP = 512  # rows at a time of what is transposed
Groups = list[tuple[int, ...]]


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), 0 or NaN (), and twice nothing."""
    nothing: Like = ((0,), torch.int8)
    return [(places_shape(x.shape[0], terms, keep), torch.int64), ((), accumulator(x.dtype)), nothing, nothing]


class _Block(NamedTuple):
    """Rows [row0, row1) of x against columns [col0, col1) of the references.

    mirror: in a square problem it serves the columns' anchors too.
    """

    row0: int
    row1: int
    col0: int
    col1: int
    mirror: bool

    def of_rows(self, s: Tensor) -> PairBlock:
        return PairBlock(self.row0, self.row1, self.col0, self.col1, Matrix(s, s.stride(0), 1))

    def of_columns(self, s: Tensor) -> PairBlock:
        """Its transpose: the columns own the rows of a launch."""
        return PairBlock(self.col0, self.col1, self.row0, self.row1, Matrix(s, 1, s.stride(0)))


def _blocks(n: int, m: int, square: bool) -> Iterator[_Block]:
    for i in range(0, n, BLOCK):
        for j in range(i if square else 0, m, BLOCK):
            yield _Block(i, min(i + BLOCK, n), j, min(j + BLOCK, m), square and j > i)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b into `out` (float32 or float64), 16-bit factors with float32 sums."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _mirror(s: Tensor) -> None:
    """s (n, n), its upper triangle over the lower: both ends of a pair see the same bits, whatever the product's do."""
    for k in range(0, s.shape[0], STRIP):
        corner = s[k : k + STRIP, k : k + STRIP]
        corner.copy_(torch.where(torch.ones_like(corner, dtype=torch.bool).triu(), corner, corner.T))
        s[k + STRIP :, k : k + STRIP] = s[k : k + STRIP, k + STRIP :].T


class _Buffers:
    """One block of similarities, and for backward one of weights in the embeddings' dtype, and one of gradients."""

    def __init__(self, launcher: Launcher, backward: bool) -> None:
        rows, cols = min(BLOCK, launcher.n), min(BLOCK, launcher.m)
        dtype, device = launcher.dtype, launcher.device
        self._similarities = torch.empty(rows, padded(cols), dtype=dtype, device=device)
        if backward:
            # float16 cannot hold small weights
            narrow = launcher.p.x.dtype if launcher.p.x.dtype != torch.float16 else dtype
            self._weights = torch.empty(rows, padded(cols), dtype=narrow, device=device)
            self._grads = torch.empty(max(rows, cols), launcher.d, dtype=dtype, device=device)

    def similarities(self, launcher: Launcher, block: _Block) -> Tensor:
        x, y = launcher.p.x[block.row0 : block.row1], launcher.p.refs[block.col0 : block.col1]
        s = _product(x, y.T, self._similarities[: block.row1 - block.row0, : block.col1 - block.col0])
        if launcher.square and block.row0 == block.col0:
            _mirror(s)
        return s

    def weights(self, s: Tensor) -> Tensor:
        return self._weights[: s.shape[0], : s.shape[1]]

    def add_product(self, weights: Tensor, of: Tensor, to: Tensor) -> None:
        """to += weights of."""
        if weights.dtype == to.dtype:
            to.addmm_(weights, of.to(weights.dtype))
        else:
            to += _product(weights, of, self._grads[: to.shape[0]])


def _compares_sides(terms: Terms) -> bool:
    """Whether a window sets positives against an extreme of the same pairs, or of pairs that may be equal: then all
    similarities come from one kind of product, because two may differ in the last bit."""
    for t in terms:
        for of, shift in ((t.lower_of, t.lower_shift), (t.upper_of, t.upper_shift)):
            sides = {t.side, terms[of].side} if of >= 0 else set()
            if len(sides) == 2 and POSITIVES in sides and (NEGATIVES not in sides or shift == 0):
                return True
    return False


def _split_groups(terms: Terms, chosen: Sequence[int]) -> tuple[Groups, Groups]:
    """Launches of the chosen terms over all pairs, block by block, and of those of positives, from the embeddings."""
    together = _compares_sides(terms)
    positives = [k for k in chosen if terms[k].side == POSITIVES and not together]
    others = [k for k in chosen if k not in positives]
    return launch_groups(terms, others), launch_groups(terms, positives)


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (K, N), sorted; `keep`: and what backward needs."""
    f = ForwardPass(p, terms, operands, keep)
    buffers = None
    for stage in f.stages():
        all_pairs, positives = _split_groups(terms, stage)
        for group in positives:
            f.reduce_all_pairs(group)
        if all_pairs:
            buffers = buffers or _Buffers(f.launcher, False)
            _reduce_blocks(f, all_pairs, buffers)
    nothing = torch.empty(0, dtype=torch.int8, device=p.x.device)
    return f.values, (f.places(), f.nonfinite, nothing, nothing.clone())


def _reduce_blocks(f: ForwardPass, groups: Groups, buffers: _Buffers) -> None:
    """The values of some groups of terms, from one product of each block."""
    launcher = f.launcher
    launches = [(group, [f.state(k, 1) for k in group]) for group in groups]
    for state in (state for _, states in launches for state in states):
        launcher.clear(state)
    for block in _blocks(launcher.n, launcher.m, launcher.square):
        s = buffers.similarities(launcher, block)
        for group, states in launches:
            launcher.reduce(group, states, f.anchors, block.of_rows(s), 1, carry=True)
            if block.mirror:
                launcher.reduce(group, states, f.anchors, block.of_columns(s), 1, carry=True)
    for group, states in launches:
        f.merge(group, states)


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, nonfinite, *_ = kept
    g = GradientCollector(p, terms, operands, values, grads, need, nonfinite)
    all_pairs, positives = _split_groups(terms, g.weighted)
    of_positives = [k for group in positives for k in group]
    dx, dy = g.each_side(lambda role, want: g.row_grads(role, of_positives, want, added_to=True))
    launcher = g.launcher
    rows = _Target(launcher.anchors(), dx, _norm_grad(launcher, launcher.n))
    cols = rows if launcher.square else _Target(launcher.references(), dy, _norm_grad(launcher, launcher.m))
    if all_pairs:
        buffers = _Buffers(launcher, True)
        for group in all_pairs:
            _backward_blocks(g, group, buffers, rows, cols)
    for target in (rows,) if launcher.square else (rows, cols):
        if target.grad is not None:
            if target.norm_grad is not None:
                target.grad.addcmul_(target.norm_grad[:, None], target.role.rows.x.to(launcher.dtype))
            target.grad.add_(nonfinite)
    return g.finish(dx, dy, places)


class _Target(NamedTuple):
    """Who owns rows, their gradient (rows, D) if it is wanted, and of Euclidean distances what the rows themselves are
    multiplied by before they are added to it, (rows,)."""

    role: Role
    grad: Tensor | None
    norm_grad: Tensor | None


def _norm_grad(launcher: Launcher, rows: int) -> Tensor | None:
    return torch.zeros(rows, dtype=launcher.dtype, device=launcher.device) if launcher.euclidean else None


def _backward_blocks(
    g: GradientCollector, group: Sequence[int], buffers: _Buffers, rows: _Target, cols: _Target
) -> None:  # fmt: skip
    """Adds the gradients through one or two terms, block by block; of a square problem rows and cols are one."""
    launcher, p = g.launcher, g.launcher.p
    reductions = g.operands(group, rows.role, 1)
    col_reductions = reductions if launcher.square else g.operands(group, cols.role, 1)
    # Whether a launch leaves anything beside weights, so that the columns need one of their own as rows.
    sums = rows.norm_grad is not None or any(r.d_scale is not None or r.d_offset is not None for r in reductions)
    col_sums = cols.norm_grad is not None or any(r.d_ref_offset is not None for r in col_reductions)
    for block in _blocks(launcher.n, launcher.m, launcher.square):
        s = buffers.similarities(launcher, block)
        w = buffers.weights(s)
        if p.end is not None or launcher.positives_only(group):
            w.zero_()  # columns past the end, or without positives, are not visited
        launcher.backward(
            group, reductions, rows.role, block.of_rows(s), g.nonfinite, carry=True, norm_grad=rows.norm_grad,
            weights=Matrix(w, w.stride(0), 1), close_dx=None if rows.norm_grad is None else rows.grad,
        )  # fmt: skip
        if (block.mirror and (sums or col_sums)) or (not launcher.square and col_sums):
            launcher.backward(
                group, col_reductions, cols.role, block.of_columns(s), g.nonfinite, carry=True,
                norm_grad=cols.norm_grad, close_dx=None if cols.norm_grad is None else cols.grad,
            )  # fmt: skip
        if rows.grad is not None:
            buffers.add_product(w, p.refs[block.col0 : block.col1], rows.grad[block.row0 : block.row1])
        if cols.grad is not None and (block.mirror or not launcher.square):
            buffers.add_product(w.T, p.x[block.row0 : block.row1], cols.grad[block.col0 : block.col1])
    g.add_parts()
