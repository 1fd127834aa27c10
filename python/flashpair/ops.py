"""The registered operators and the one autograd.Function over them.

torch.ops.flashpair.row_reduce and row_reduce_backward are opaque to torch.compile (each has a fake), so a criterion
stays one graph. They take sorted embeddings and encode a reduction as six codes (op, side, transform, detach, and the
places of the reductions that bound its window, -1 for none), two shifts of those bounds, and four optional vectors
(offset, ref_offset, lower, upper).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reduction import OPS, SIDES, TRANSFORMS, Bound, Reduction
from .reference import reduce_rows
from .similarity import dense_pairs, poison
from .tiled import CODES, Kept, Problem, backward, decode, forward, kept_sizes

_library = torch.library.Library("flashpair", "DEF")
_problem = "Tensor x, Tensor? y, Tensor lo, Tensor hi, Tensor? end, Tensor order, Tensor scale, Tensor?[] vectors, "
_library.define(
    f"row_reduce({_problem}int[] code, float[] shifts, str distance, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"row_reduce_backward({_problem}int[] code, float[] shifts, str distance, Tensor values, Tensor index, Tensor live_count, "
    "Tensor live_entry, Tensor live_z, Tensor?[] grads, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _row_reduce(x, y, lo, hi, end, order, scale, vectors, code, shifts, distance, keep):  # type: ignore[no-untyped-def]
    problem = Problem(x, y, lo, hi, end, order, distance)
    values, kept = forward(problem, decode(code, shifts, scale, vectors), keep)
    return values.add_(poison(x) if y is None else poison(x, y)), *kept


def _row_reduce_backward(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, code, shifts, distance, values, index, live_count, live_entry, live_z, grads, need
):
    problem = Problem(x, y, lo, hi, end, order, distance)
    kept = Kept(index, live_count, live_entry, live_z)
    found = backward(problem, decode(code, shifts, scale, vectors), values, kept, grads, need)
    bad = poison(x) if y is None else poison(x, y)
    return tuple(x.new_empty(0) if g is None else g.add_(bad) for g in found)


def _row_reduce_fake(x, y, lo, hi, end, order, scale, vectors, code, shifts, distance, keep):  # type: ignore[no-untyped-def]
    n, m, k = x.shape[0], (x if y is None else y).shape[0], len(code) // CODES
    index, count, entry, z = kept_sizes(n, m, y is None, decode(code, shifts, None, vectors), keep)
    integers = {"device": x.device}
    return (
        x.new_empty(k, n),
        torch.empty(index, dtype=torch.int64, **integers),
        torch.empty(count, dtype=torch.int32, **integers),
        torch.empty(entry, dtype=torch.int32, **integers),
        x.new_empty(z),
    )


def _row_reduce_backward_fake(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, code, shifts, distance, values, index, live_count, live_entry, live_z, grads, need
):
    n, m, k = x.shape[0], (x if y is None else y).shape[0], len(code) // CODES
    shapes = (x.shape, (m, x.shape[1]), (k,), (k, n), (k, m))
    wanted = (need[0], need[1] and y is not None, *need[2:])
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted))


_library.impl("row_reduce", _row_reduce, "CPU")
_library.impl("row_reduce_backward", _row_reduce_backward, "CPU")
torch.library.register_fake("flashpair::row_reduce", _row_reduce_fake, lib=_library)
torch.library.register_fake("flashpair::row_reduce_backward", _row_reduce_backward_fake, lib=_library)


class Spec(NamedTuple):
    """The constants of a call."""

    code: tuple[int, ...]
    shifts: tuple[float, ...]
    distance: str


def encode(reductions: tuple[Reduction, ...], distance: str) -> Spec:
    place = {id(r): k for k, r in enumerate(reductions)}
    code: list[int] = []
    shifts: list[float] = []
    for k, r in enumerate(reductions):
        code += [OPS.index(r.op), SIDES.index(r.side), TRANSFORMS.index(r.transform), int(r.detach)]
        for name in ("lower", "upper"):
            bound = getattr(r, name)
            of = place.get(id(bound.of), k) if isinstance(bound, Bound) else -1
            if of >= k:
                raise ValueError(f"{name} of reductions[{k}] is bound to a reduction that does not stand before it")
            code.append(of)
            shifts.append(bound.shift if isinstance(bound, Bound) else 0.0)
    return Spec(tuple(code), tuple(shifts), distance)


class RowReduce(torch.autograd.Function):
    """Row reductions (K tensors (N,)) with General Pair Weighting's gradient; differentiable twice through a dense path."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, spec: Spec, lo: Tensor, hi: Tensor, end: Tensor | None, order: Tensor, x: Tensor, y: Tensor | None,
        scale: Tensor, *vectors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        values, *kept = torch.ops.flashpair.row_reduce(
            x, y, lo, hi, end, order, scale, list(vectors), list(spec.code), list(spec.shifts), spec.distance, keep
        )
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(lo, hi, end, order, x, y, scale, *vectors, values, *kept)
        rows = tuple(v.clone() for v in values.unbind(0))
        codes = spec.code
        ctx.mark_non_differentiable(
            *(r for i, r in enumerate(rows) if codes[CODES * i + 3] or codes[CODES * i] == OPS.index("count"))
        )
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        lo, hi, end, order, x, y, scale, *rest = ctx.saved_tensors
        vectors, (values, *kept) = rest[:-5], rest[-5:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grads, lo, hi, end, x, y, scale, vectors, values)
        needs = ctx.needs_input_grad
        need = [needs[5], needs[6], needs[7], any(needs[8::4]), any(needs[9::4])]
        dx, dy, dscale, doffset, dref_offset = torch.ops.flashpair.row_reduce_backward(
            x, y, lo, hi, end, order, scale, vectors, list(ctx.spec.code), list(ctx.spec.shifts), ctx.spec.distance, values, *kept,
            [None if g is None else g.contiguous() for g in grads], need,
        )  # fmt: skip
        by_vector: list[Tensor | None] = []
        for i in range(len(grads)):
            by_vector += [
                doffset[i] if needs[8 + 4 * i] else None,
                dref_offset[i] if needs[9 + 4 * i] else None,
                None,
                None,
            ]
        return (
            None, None, None, None, None,
            dx if needs[5] else None, dy if needs[6] else None, dscale if needs[7] else None, *by_vector,
        )  # fmt: skip


def _differentiable_backward(ctx, grads, lo, hi, end, x, y, scale, vectors, values):  # type: ignore[no-untyped-def]
    """The same gradient as a differentiable function of its inputs, over the dense matrix: second derivatives are exact."""
    column = torch.arange((x if y is None else y).shape[0], device=x.device)
    positive = (column >= lo[:, None]) & (column < hi[:, None])
    pair = torch.ones_like(positive) if end is None else (column < end).expand_as(positive)
    if y is None:
        pair = pair & (column != column[:, None])
    masks = {"positives": positive & pair, "negatives": ~positive & pair, "all": pair}
    with torch.enable_grad():
        z = dense_pairs(x, x if y is None else y, ctx.spec.distance)
        rows, upstream = [], []
        for i, g in enumerate(grads):
            op, side, transform, _, *bounds = ctx.spec.code[CODES * i : CODES * (i + 1)]
            if g is None:
                continue
            offset, ref_offset, lower, upper = vectors[4 * i : 4 * i + 4]
            if bounds[0] >= 0:
                lower = values[bounds[0]] + ctx.spec.shifts[2 * i]
            if bounds[1] >= 0:
                upper = values[bounds[1]] + ctx.spec.shifts[2 * i + 1]
            plain = OPS[op] in ("min", "max", "count")
            r = Reduction(
                OPS[op], SIDES[side], TRANSFORMS[transform], 1.0 if plain else scale[i], offset, ref_offset, lower, upper
            )
            rows.append(reduce_rows(z, masks[r.side], r))
            upstream.append(g)
        inputs = (x, y, scale, *vectors)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[5:]) if need]
        found = torch.autograd.grad(rows, [inputs[i] for i in wanted], upstream, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, found))
    return (None,) * 5 + tuple(by_place.get(i) for i in range(len(inputs)))


