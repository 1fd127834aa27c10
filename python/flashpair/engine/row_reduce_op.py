"""The registered operators of row reductions, and the autograd.Function `RowReduce` that uses them.

torch.compile does not look into torch.ops.flashpair.row_reduce and row_reduce_backward: each has a fake, which gives
only the shapes of its results. So a criterion is compiled to one graph. The operators take sorted embeddings, and the
constants of a call in the form of `encode` (core/call.py). Where nobody traces, `forward` and `backward` below call the
backend directly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import screened, tiled
from ..backends.reference import reduce_rows
from ..core.call import OFFSET, REF_OFFSET, Call, decode, encode
from ..core.problem import COUNT, LOGSUMEXP, MAX, MIN, Gradients, Operands, Problem, accumulator, num_rows, plain, solid
from ..core.reduction import OPS, SIDES, TRANSFORMS, Reduction
from ..core.similarity import no_autocast
from .positive_pairs import dense_similarities

_library = torch.library.Library("flashpair", "DEF")
_arguments = (
    "Tensor x, Tensor? y, Tensor lo, Tensor hi, Tensor? end, Tensor order, Tensor? scale, Tensor[] vectors, "
    "int[] vector_roles, int[] codes, float[] shifts, float[] scales, str distance, str backend, "
)
_library.define(f"row_reduce({_arguments}bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"row_reduce_backward({_arguments}Tensor values, Tensor kept_a, Tensor kept_b, Tensor kept_c, Tensor kept_d, "
    "Tensor?[] grads, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
PROBLEM, CALL = 6, 6  # how many arguments of an operator are the problem's tensors, and how many the call's constants


def backend_module(backend: str, device: torch.device) -> Any:
    """The backend's module for a device. Triton's are imported at first use, as Triton reads its settings on import."""
    if backend in ("tiled", "screened") and device.type == "cpu":
        return tiled if backend == "tiled" else screened
    return triton_backend(backend)


def triton_backend(backend: str) -> Any:
    """The module of a Triton backend, by the backend's name."""
    return importlib.import_module(f"..backends.triton.{backend}", __package__)


def forward(p: Problem, call: Call, operands: Operands, keep: bool) -> tuple[Tensor, ...]:
    """The values (R, N), with rows as in core/problem.py, and the four tensors that the backend keeps for backward.

    Args:
        p: the problem.
        call: the constants of the K reductions.
        operands: their tensors.
        keep: a backward pass may follow.
    """
    if plain(p.x):
        return _forward(p, call, operands, keep)
    values_and_kept: tuple[Tensor, ...] = torch.ops.flashpair.row_reduce(*_flat(p, call, operands), keep)
    return values_and_kept


def backward(
    p: Problem, call: Call, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The gradients of the problem's tensors and the operands.

    Args:
        p: the problem.
        call: the constants of the K reductions.
        operands: their tensors.
        values: (R, N), from `forward`.
        kept: four tensors, from `forward`.
        grads: K tensors (N,) or None, the gradients of the terms' values.
        need: whether gradients of x, y, scale, offset and ref_offset are needed.
    """
    if plain(p.x):
        return _backward(p, call, operands, values, kept, grads, need)
    gradients = torch.ops.flashpair.row_reduce_backward(*_flat(p, call, operands), values, *kept, grads, need)
    return Gradients(*gradients)


def _flat(p: Problem, call: Call, operands: Operands) -> tuple[Any, ...]:
    """The arguments that both operators share, in their order."""
    return p.x, p.y, p.lo, p.hi, p.end, p.order, operands.scale, operands.vectors, *encode(call)


def _unflat(arguments: Sequence[Any]) -> tuple[Problem, Call, Operands, Sequence[Any]]:
    """The problem, the call and the operands that `_flat` took, and the operator's other arguments."""
    (x, y, lo, hi, end, order), (scale, vectors) = arguments[:PROBLEM], arguments[PROBLEM : PROBLEM + 2]
    call = decode(*arguments[PROBLEM + 2 : PROBLEM + 2 + CALL])
    p = Problem(x, y, lo, hi, end, order, call.distance)
    return p, call, Operands(scale, call.scales, vectors), arguments[PROBLEM + 2 + CALL :]


def _forward(p: Problem, call: Call, operands: Operands, keep: bool) -> tuple[Tensor, ...]:
    """`forward` by the backend itself."""
    p = p._replace(x=solid(p.x), y=None if p.y is None else solid(p.y))
    values, kept = backend_module(call.backend, p.x.device).forward(p, call.terms, operands, keep)
    return values, *kept


def _backward(
    p: Problem, call: Call, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """`backward` by the backend itself."""
    p = p._replace(x=solid(p.x), y=None if p.y is None else solid(p.y))
    module = backend_module(call.backend, p.x.device)
    gradients: Gradients = module.backward(p, call.terms, operands, values, tuple(kept), grads, need)
    return gradients


def _row_reduce(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator row_reduce."""
    p, call, operands, (keep,) = _unflat(arguments)
    return _forward(p, call, operands, keep)


def _row_reduce_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator row_reduce_backward. It returns an empty tensor for a gradient that is not needed."""
    p, call, operands, (values, *kept, grads, need) = _unflat(arguments)
    gradients = _backward(p, call, operands, values, kept, grads, need)
    return tuple(p.x.new_empty(0) if g is None else g for g in gradients)


def _row_reduce_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes of row_reduce's results."""
    p, call, _, (keep,) = _unflat(arguments)
    likes = backend_module(call.backend, p.x.device).kept_like(p.x, p.y, call.terms, keep)
    values = p.x.new_empty(num_rows(call.terms), p.x.shape[0], dtype=accumulator(p.x.dtype))
    return values, *(p.x.new_empty(shape, dtype=dtype) for shape, dtype in likes)


def _row_reduce_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes of row_reduce_backward's results."""
    p, call, _, (values, *_, need) = _unflat(arguments)
    n, m, k = p.x.shape[0], p.refs.shape[0], len(call.terms)
    need_x, need_y, need_scale, need_offset, need_ref_offset = need

    def empty(like: Tensor, needed: bool, *shape: int) -> Tensor:
        return like.new_empty(shape if needed else 0)

    return (
        empty(p.x, need_x, *p.x.shape), empty(p.x, need_y and p.y is not None, m, p.x.shape[1]),
        empty(values, need_scale, k), empty(values, need_offset, k, n), empty(values, need_ref_offset, k, m),
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    _library.impl("row_reduce", _row_reduce, _key)
    _library.impl("row_reduce_backward", _row_reduce_backward, _key)
torch.library.register_fake("flashpair::row_reduce", _row_reduce_fake, lib=_library)
torch.library.register_fake("flashpair::row_reduce_backward", _row_reduce_backward_fake, lib=_library)

_rows: Callable[[Tensor], tuple[Tensor, ...]] = torch.unbind_copy  # type: ignore[assignment]


class RowReduce(torch.autograd.Function):
    """K row reductions, each (N,), with their gradients. Second derivatives go through the dense matrix."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, lo: Tensor, hi: Tensor, end: Tensor | None, order: Tensor, x: Tensor, y: Tensor | None,
        scale: Tensor | None, *padded: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """padded: the call's vectors, after which a None may stand (see `Pairs._rows`)."""
        keep = any(ctx.needs_input_grad)
        vectors = [v for v in padded if v is not None]
        p = Problem(x, y, lo, hi, end, order, call.distance)
        values, *kept = forward(p, call, Operands(scale, call.scales, vectors), keep)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.padding = call, (None,) * (len(padded) - len(vectors))
        if keep:
            ctx.save_for_backward(lo, hi, end, order, x, y, scale, *vectors, values, *kept)
        rows = _rows(values[: len(call.terms)])
        constant = (row for row, t in zip(rows, call.terms, strict=True) if t.detach or t.op == COUNT)
        ctx.mark_non_differentiable(*constant)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        call: Call = ctx.call
        lo, hi, end, order, x, y, scale, *rest = ctx.saved_tensors
        vectors, (values, *kept) = rest[: len(call.vectors)], rest[len(call.vectors) :]
        p, operands = Problem(x, y, lo, hi, end, order, call.distance), Operands(scale, call.scales, vectors)
        needs = ctx.needs_input_grad[5:]  # x, y, scale and the vectors; the five arguments before them have no gradient
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(p, call, operands, values, grads, needs)
        else:
            gradients = _gradients(p, call, operands, values, kept, grads, needs)
        return (None,) * 5 + gradients + ctx.padding


def _gradients(
    p: Problem, call: Call, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, y, scale and each vector, from the backend; None where not needed.

    Args:
        p: the problem.
        call: the constants of the K reductions.
        operands: their tensors.
        values: (R, N), from `forward`.
        kept: four tensors, from `forward`.
        grads: K tensors (N,) or None, the gradients of the terms' values.
        needs: whether gradients of x, y, scale and each vector are needed.
    """
    need_x, need_y, need_scale, *need_vectors = needs
    needed_roles = [role if need else None for (_, role), need in zip(call.vector_roles, need_vectors, strict=False)]
    gradients = backward(
        p, call, operands, values, kept, [None if g is None else solid(g) for g in grads],
        [need_x, need_y, need_scale, OFFSET in needed_roles, REF_OFFSET in needed_roles],
    )  # fmt: skip
    of_role = {OFFSET: gradients.offset, REF_OFFSET: gradients.ref_offset}
    by_vector = [
        None if role is None or (rows := of_role.get(role)) is None else rows[k]
        for (k, _), role in zip(call.vector_roles, needed_roles, strict=True)
    ]
    return (
        gradients.x if need_x else None, gradients.y if need_y else None, gradients.scale if need_scale else None,
        *by_vector,
    )  # fmt: skip


def _differentiable_backward(
    p: Problem, call: Call, operands: Operands, values: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `_gradients` as differentiable functions of all inputs, over the dense matrix.

    So second derivatives are exact. The arguments are those of `_gradients`.
    """
    column = torch.arange(p.refs.shape[0], device=p.x.device)
    positive = (column >= p.lo[:, None]) & (column < p.hi[:, None])
    pair = torch.ones_like(positive) if p.end is None else (column < p.end).expand_as(positive)
    if p.y is None:
        pair = pair & (column != column[:, None])
    masks = {"positives": positive & pair, "negatives": ~positive & pair, "all": pair}
    with torch.enable_grad(), no_autocast(p.x.device.type):
        # One input may be a function of another (an offset of x). Views cut this dependence: it is not this function's.
        inputs = [None if t is None else t.view_as(t) for t in (p.x, p.y, operands.scale, *operands.vectors)]
        x, y, scale, *vectors = inputs
        assert x is not None
        viewed = Operands(scale, operands.scales, vectors)  # type: ignore[arg-type]
        wide = values.dtype
        z = dense_similarities(x.to(wide), (x if y is None else y).to(wide), p.distance)
        rows, upstream = [], []
        for k, g in enumerate(grads):
            if g is None:
                continue
            r = _reduction(call, k, viewed, values)
            row = reduce_rows(z, masks[r.side], r, p.order)
            if row.requires_grad:
                rows.append(row)
                upstream.append(g)
        wanted = {i: t for i, (t, need) in enumerate(zip(inputs, needs, strict=False)) if need and t is not None}
        gradients = torch.autograd.grad(rows, list(wanted.values()), upstream, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, gradients, strict=True))
    return tuple(by_place.get(i) for i in range(len(inputs)))


def _reduction(call: Call, k: int, operands: Operands, values: Tensor) -> Reduction:
    """Term `k` as a `Reduction`.

    Args:
        call: the constants of the call.
        k: the number of the term.
        operands: the tensors of the call.
        values: (R, N), the values of all terms, which are the bounds of windows that are bound to other terms.
    """
    t = call.terms[k]
    offset, ref_offset, lower, upper = (operands.vector(slot) for slot in t.slots)
    lower = values[t.lower_of] + t.lower_shift if t.lower_of >= 0 else lower
    upper = values[t.upper_of] + t.upper_shift if t.upper_of >= 0 else upper
    op, side, transform = OPS[t.op], SIDES[t.side], TRANSFORMS[t.transform]
    if t.op in (MIN, MAX, COUNT):
        return Reduction(op, side, transform, lower=lower, upper=upper)
    learned = operands.scale is not None and not (t.op == LOGSUMEXP and t.transformed)
    scale = operands.scale[k] if learned and operands.scale is not None else call.scales[k]
    shift: float | Tensor = t.shift if offset is None else offset
    return Reduction(op, side, transform, scale, shift, ref_offset, lower, upper)
