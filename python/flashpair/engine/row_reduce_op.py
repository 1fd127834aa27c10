"""The registered operators and the one autograd.Function over them.

torch.ops.flashpair.row_reduce and row_reduce_backward are opaque to torch.compile (each has a fake), so a criterion
stays one graph. They take sorted embeddings, and a call's constants as the fields of `Spec`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import screened, tiled
from ..backends.reference import reduce_rows
from ..core.problem import CODES, Operands, Problem, accumulator, decode, num_rows, plain, solid
from ..core.reduction import OPS, SIDES, TRANSFORMS, Bound, Reduction, bound_places
from ..core.similarity import no_autocast
from .positive_pairs import dense_similarities

_library = torch.library.Library("flashpair", "DEF")
_problem = (
    "Tensor x, Tensor? y, Tensor lo, Tensor hi, Tensor? end, Tensor order, Tensor? scale, Tensor[] vectors, "
    "int[] slots, int[] code, float[] shifts, float[] scales, str distance, str impl, "
)
_library.define(f"row_reduce({_problem}bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"row_reduce_backward({_problem}Tensor values, Tensor kept_a, Tensor kept_b, Tensor kept_c, Tensor kept_d, "
    "Tensor?[] grads, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def schedule_of(impl: str, device: torch.device) -> Any:
    """The module that runs `impl` there, imported when first needed: Triton's JIT reads its settings on import."""
    if impl in ("tiled", "screened") and device.type == "cpu":
        return tiled if impl == "tiled" else screened
    return triton_backend(impl)


def triton_backend(impl: str) -> Any:
    return importlib.import_module(f"..backends.triton.{impl}", __package__)


def _row_reduce(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, slots, code, shifts, scales, distance, impl, keep
):
    problem = Problem(solid(x), None if y is None else solid(y), lo, hi, end, order, distance)
    terms = decode(code, shifts, slots)
    values, kept = schedule_of(impl, x.device).forward(problem, terms, Operands(scale, scales, vectors), keep)
    return values, *kept


def _row_reduce_backward(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, slots, code, shifts, scales, distance, impl,
    values, kept_a, kept_b, kept_c, kept_d, grads, need,
):  # fmt: skip
    problem = Problem(solid(x), None if y is None else solid(y), lo, hi, end, order, distance)
    kept = (kept_a, kept_b, kept_c, kept_d)
    terms, operands = decode(code, shifts, slots), Operands(scale, scales, vectors)
    found = schedule_of(impl, x.device).backward(problem, terms, operands, values, kept, grads, need)
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _row_reduce_fake(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, slots, code, shifts, scales, distance, impl, keep
):
    terms = decode(code, shifts, slots)
    likes = schedule_of(impl, x.device).kept_like(x, y, terms, keep)
    values = x.new_empty(num_rows(terms), x.shape[0], dtype=accumulator(x.dtype))
    return values, *(x.new_empty(shape, dtype=dtype) for shape, dtype in likes)


def _row_reduce_backward_fake(  # type: ignore[no-untyped-def]
    x, y, lo, hi, end, order, scale, vectors, slots, code, shifts, scales, distance, impl,
    values, kept_a, kept_b, kept_c, kept_d, grads, need,
):  # fmt: skip
    n, m, k = x.shape[0], (x if y is None else y).shape[0], len(scales)
    shapes = (x.shape, (m, x.shape[1]), (k,), (k, n), (k, m))
    wanted = (need[0], need[1] and y is not None, *need[2:])
    return tuple(
        (x if place < 2 else values).new_empty(shape if want else 0)
        for place, (shape, want) in enumerate(zip(shapes, wanted, strict=True))
    )


for _key in ("CPU", "CUDA"):
    _library.impl("row_reduce", _row_reduce, _key)
    _library.impl("row_reduce_backward", _row_reduce_backward, _key)
torch.library.register_fake("flashpair::row_reduce", _row_reduce_fake, lib=_library)
torch.library.register_fake("flashpair::row_reduce_backward", _row_reduce_backward_fake, lib=_library)


def call(name: str, x: Tensor) -> Callable[..., Any]:
    """The registered op; on plain tensors outside of tracing what it would call, without the dispatcher's 50 us."""
    if plain(x):
        return _row_reduce if name == "row_reduce" else _row_reduce_backward
    return getattr(torch.ops.flashpair, name)


class Spec(NamedTuple):
    """The constants of a call of K reductions."""

    slots: tuple[int, ...]  # what each vector is: 4 * reduction + 0 offset, 1 ref_offset, 2 lower, 3 upper
    code: tuple[int, ...]  # (6 K): op, side, transform, detach, and whose values bound the window (lower, upper; -1)
    shifts: tuple[float, ...]  # (3 K): what is added to those bounds, and the offset where it is a number
    scales: tuple[float, ...]  # (K): used where no scale tensor is given
    distance: str
    impl: str


def encode(reductions: tuple[Reduction, ...], slots: tuple[int, ...], distance: str, impl: str) -> Spec:
    code: list[int] = []
    shifts: list[float] = []
    for r, places in zip(reductions, bound_places(reductions), strict=True):
        code += [OPS.index(r.op), SIDES.index(r.side), TRANSFORMS.index(r.transform), int(r.detach), *places]
        shifts += [bound.shift if isinstance(bound, Bound) else 0.0 for bound in (r.lower, r.upper)]
        shifts.append(0.0 if r.offset is None or isinstance(r.offset, Tensor) or r.offset_outside else float(r.offset))
    scales = tuple(1.0 if isinstance(r.scale, Tensor) else r.scale for r in reductions)
    return Spec(slots, tuple(code), tuple(shifts), scales, distance, impl)


_rows: Callable[[Tensor], tuple[Tensor, ...]] = torch.unbind_copy  # type: ignore[assignment]


class RowReduce(torch.autograd.Function):
    """Row reductions (K tensors (N,)) with General Pair Weighting's gradient; twice differentiable, by a dense path."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, lo: Tensor, hi: Tensor, end: Tensor | None, order: Tensor, x: Tensor, y: Tensor | None,
        scale: Tensor | None, *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        ctx.extra = len(operands) - len(spec.slots)
        vectors = [v for v in operands if v is not None]
        values, *kept = call("row_reduce", x)(x, y, lo, hi, end, order, scale, vectors, *spec, keep)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.spec = spec
            ctx.save_for_backward(lo, hi, end, order, x, y, scale, *vectors, values, *kept)
        rows = _rows(values[: len(spec.scales)])
        count = OPS.index("count")
        codes = range(0, len(spec.code), CODES)
        ctx.mark_non_differentiable(
            *(row for row, at in zip(rows, codes, strict=True) if spec.code[at + 3] or spec.code[at] == count)
        )
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(needs)
        lo, hi, end, order, x, y, scale, *rest = ctx.saved_tensors
        vectors, (values, *kept) = rest[:-5], rest[-5:]
        spec = ctx.spec
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grads, lo, hi, end, order, x, y, scale, vectors, values)
        of_vectors = needs[8 : 8 + len(spec.slots)]
        wants = [slot % 4 if need else -1 for slot, need in zip(spec.slots, of_vectors, strict=True)]
        dx, dy, dscale, doffset, dref_offset = call("row_reduce_backward", x)(
            x, y, lo, hi, end, order, scale, vectors, *spec, values, *kept,
            [None if g is None else solid(g) for g in grads], [*needs[5:8], 0 in wants, 1 in wants],
        )  # fmt: skip
        by_vector = [
            doffset[slot // 4] if want == 0 else dref_offset[slot // 4] if want == 1 else None
            for slot, want in zip(spec.slots, wants, strict=True)
        ]
        return (
            None, None, None, None, None,
            dx if needs[5] else None, dy if needs[6] else None, dscale if needs[7] else None, *by_vector,
            *(None,) * ctx.extra,
        )  # fmt: skip


def _differentiable_backward(ctx, grads, lo, hi, end, order, x, y, scale, vectors, values):  # type: ignore[no-untyped-def]
    """The same gradient as a differentiable function of its inputs, over the dense matrix: exact second derivatives."""
    column = torch.arange((x if y is None else y).shape[0], device=x.device)
    positive = (column >= lo[:, None]) & (column < hi[:, None])
    pair = torch.ones_like(positive) if end is None else (column < end).expand_as(positive)
    if y is None:
        pair = pair & (column != column[:, None])
    masks = {"positives": positive & pair, "negatives": ~positive & pair, "all": pair}
    spec = ctx.spec
    with torch.enable_grad(), no_autocast(x.device.type):
        # What one input owes to another (an offset to x) is not this function's: each is looked at by itself.
        x, y, scale, *vectors = (None if t is None else t.view_as(t) for t in (x, y, scale, *vectors))
        by_slot = dict(zip(spec.slots, vectors, strict=True))
        wide = values.dtype
        z = dense_similarities(x.to(wide), (x if y is None else y).to(wide), spec.distance)
        rows, upstream = [], []
        for i, g in enumerate(grads):
            if g is None:
                continue
            op, side, transform, _, *bounds = spec.code[CODES * i : CODES * (i + 1)]
            offset, ref_offset, *window = (by_slot.get(4 * i + k) for k in range(4))
            for k, of in enumerate(bounds):
                if of >= 0:
                    window[k] = values[of] + spec.shifts[3 * i + k]
            offset = spec.shifts[3 * i + 2] if offset is None else offset
            plain, name = OPS[op] in ("min", "max", "count"), TRANSFORMS[transform]
            transformed = OPS[op] == "logsumexp" and name != "identity"  # which takes numbers
            factor = spec.scales[i] if plain or transformed or scale is None else scale[i]
            offset = None if plain else offset
            r = Reduction(OPS[op], SIDES[side], name, factor, offset, ref_offset, window[0], window[1])
            row = reduce_rows(z, masks[r.side], r, order)
            if row.requires_grad:
                rows.append(row)
                upstream.append(g)
        inputs = (x, y, scale, *vectors, *(None,) * ctx.extra)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[5:]) if need]
        found = torch.autograd.grad(rows, [inputs[i] for i in wanted], upstream, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return (None,) * 5 + tuple(by_place.get(i) for i in range(len(inputs)))
