"""The loss and the gradient of a small batch by one call of a backend.

    criterion -> plan -> one autograd.Function -> `onchip` (one CUDA launch) or `tiled` on the CPU (one C++ call)

In a small batch the steps of a loss (sorting, launches, autograd) cost more than its pairs. A backend that knows the
formula of the loss needs one step. It takes criteria that declare their `RowFormula`.

Forward computes the loss and its gradient, and backward scales the gradient. With ``reduction="none"`` the gradient has
to wait for the upstream gradients of the rows, so backward is a second call. Keeps for backward: the gradient, in
float32 or float64. Second derivatives use the dense reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import tiled
from ..backends.cuda import onchip
from ..core.problem import AVERAGINGS, Results, SmallBatch, SmallBatchCode, accumulator, plain, solid
from ..core.row_formula import FORMULAS, RowFormula
from ..core.similarity import no_autocast
from .dispatch import small_batch_backend

NONE = AVERAGINGS.index("none")


class Plan(NamedTuple):
    """The constants of a call, as the registered operator takes them.

    Attributes:
        code: the integers.
        numbers: the two scales, the two shifts and epsilon.
        backend: the backend that computes it.
    """

    code: SmallBatchCode
    numbers: tuple[float, ...]
    backend: str


def plan(
    impl: str, formula: RowFormula | None, x: Tensor, y: Tensor | None, *, reduction: str, normalize: bool,
    distance: str, penalty: bool,
) -> Plan | None:  # fmt: skip
    """The plan of a criterion's call; None: no backend computes it in one call.

    Args:
        impl: as `Criterion` takes it.
        formula: the criterion's row formula, or None.
        x: (N, D), the embeddings.
        y: (M, D), the references, or None.
        reduction: the criterion's reduction.
        normalize: whether the criterion normalises embeddings.
        distance: the criterion's distance.
        penalty: whether the criterion adds a penalty on norms.

    Raises:
        RuntimeError: ``impl="onchip"`` cannot compute it; the error gives all reasons.
    """
    backend = small_batch_backend(impl, x, y, formula is not None and formula.one_pair)
    if not backend:
        return None
    plan_or_reasons = _plan(backend, formula, x, y, reduction, normalize, distance, penalty)
    if isinstance(plan_or_reasons, Plan):
        return plan_or_reasons
    if impl == "onchip":
        raise RuntimeError(f"impl='onchip' cannot run: {'; '.join(plan_or_reasons)}")
    return None


def _plan(
    backend: str, formula: RowFormula | None, x: Tensor, y: Tensor | None, reduction: str, normalize: bool,
    distance: str, penalty: bool,
) -> Plan | tuple[str, ...]:  # fmt: skip
    """The plan, or all reasons why the backend cannot compute the loss."""
    if formula is None:
        names = ", ".join(FORMULAS)
        return (f"{backend} computes the losses {names}, and this criterion does not declare such a row formula",)
    for value in formula.scales + formula.shifts:
        if isinstance(value, Tensor):
            return (f"{backend} takes numbers as hyper-parameters, not tensors",)
    make = _compile_plan if torch.compiler.is_compiling() else _compiled_plan
    m, dtype, want_dy = x.shape[0], x.dtype, False
    if y is not None:
        m, dtype = y.shape[0], torch.promote_types(x.dtype, y.dtype)
        want_dy = y.requires_grad and torch.is_grad_enabled()
    shape = (*x.shape, m)
    return make(backend, formula, shape, dtype, want_dy, x.device.index or 0, reduction, normalize, distance, penalty)


def _compile_plan(
    backend: str, formula: RowFormula, shape: tuple[int, int, int], dtype: torch.dtype, want_dy: bool, device: int,
    reduction: str, normalize: bool, distance: str, penalty: bool,
) -> Plan | tuple[str, ...]:  # fmt: skip
    """The plan of a call of that shape (N, D, M), or all reasons why the backend cannot compute it."""
    n, d, m = shape
    block_rows: int | str
    if backend == "onchip":
        block_rows = onchip.block_rows(n, m, d, accumulator(dtype).itemsize, want_dy, onchip.limits(device))
    else:
        block_rows = 0  # csrc/cpu/small_batch.h has no blocks
    reasons: tuple[str, ...] = (block_rows,) if isinstance(block_rows, str) else ()
    if penalty and reduction in ("none", "nonzero"):
        reasons += (f"{backend} adds a penalty on norms only to a scalar loss, and reduction is {reduction!r}",)
    if reasons or isinstance(block_rows, str):
        return reasons
    code = SmallBatchCode(
        block_rows, FORMULAS.index(formula.name), AVERAGINGS.index(reduction), int(normalize),
        int(distance == "euclidean"), int(formula.one_pair), int(formula.epsilon is not None),
    )  # fmt: skip
    numbers = (*formula.scales, *formula.shifts, formula.epsilon or 0.0)
    return Plan(code, numbers, backend)  # type: ignore[arg-type]


_compiled_plan = functools.lru_cache(maxsize=1024)(_compile_plan)


def _run(x, labels, y, ref_labels, upstream, code, numbers, backend, *want) -> Results:  # type: ignore[no-untyped-def]
    module = onchip if backend == "onchip" else tiled
    return module.run_small_batch(SmallBatch(x, labels, y, ref_labels, upstream, code, numbers, *want))


_library = torch.library.Library("flashpair", "FRAGMENT")
_library.define(
    "small_batch_loss(Tensor x, Tensor labels, Tensor? y, Tensor? ref_labels, Tensor? upstream, int[] code, "
    "float[] numbers, str impl, bool want_loss, bool want_share, bool want_dx, bool want_dy) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _op(x, labels, y, ref_labels, upstream, code, numbers, *rest):  # type: ignore[no-untyped-def]
    results = _run(x, labels, y, ref_labels, upstream, SmallBatchCode(*code), tuple(numbers), *rest)
    return tuple(x.new_empty(0) if t is None else t for t in results)


def _fake(x, labels, y, ref_labels, upstream, code, numbers, backend, *want):  # type: ignore[no-untyped-def]
    rows = (x.shape[0],) if SmallBatchCode(*code).averaging == NONE else ()
    shapes = (rows, (), x.shape, (x if y is None else y).shape)
    dtype = accumulator(x.dtype)
    return tuple(x.new_empty(s, dtype=dtype) if w else x.new_empty(0) for s, w in zip(shapes, want, strict=True))


for _key in ("CPU", "CUDA"):
    _library.impl("small_batch_loss", _op, _key)
torch.library.register_fake("flashpair::small_batch_loss", _fake, lib=_library)


def _call(x: Tensor, *arguments: Any) -> Results:
    return _run(x, *arguments) if plain(x) else torch.ops.flashpair.small_batch_loss(x, *arguments)


class _Loss(torch.autograd.Function):
    """The loss, and with `want_share` the share of valid rows.

    ``dense(x, y)`` computes the same loss by the reference. `grad` says whether gradients are enabled, which `ctx` does
    not know.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, dense: Callable[..., Tensor] | None, want_share: bool, grad: bool, labels: Tensor,
        ref_labels: Tensor | None, x: Tensor, y: Tensor | None,
    ) -> Any:  # fmt: skip
        need_x, need_y = (grad and need for need in ctx.needs_input_grad[6:])
        now = plan.code.averaging != NONE  # else the gradient has to wait for the upstream gradients of the rows
        loss, share, dx, dy = _call(
            x, labels, y, ref_labels, None, *plan, True, want_share, need_x and now, need_y and now
        )
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.dense = plan, dense
        if need_x or need_y:
            ctx.save_for_backward(x, y, labels, ref_labels, dx, dy)
        if not want_share:
            return loss
        ctx.mark_non_differentiable(share)
        return loss, share

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        x, y, labels, ref_labels, dx, dy = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[6:]
        if ctx.dense is not None and torch.is_grad_enabled():  # to be differentiated again
            with torch.enable_grad(), no_autocast(x.device.type):
                x, y = x.view_as(x), None if y is None else y.view_as(y)  # one may be a function of the other
                wanted = [t for t, need in ((x, need_x), (y, need_y)) if need and t is not None]
                gradients = list(torch.autograd.grad(ctx.dense(x, y), wanted, g, create_graph=True))
            return *(None,) * 6, gradients.pop(0) if need_x else None, gradients[0] if need_y else None
        if ctx.plan.code.averaging == NONE:
            _, _, dx, dy = _call(x, labels, y, ref_labels, solid(g), *ctx.plan, False, False, need_x, need_y)
        else:  # scaled in float32 and rounded afterwards, so that loss scaling works
            dx, dy = dx * g if need_x else None, dy * g if need_y else None
        if dx is not None and dx.dtype != x.dtype:
            dx = dx.to(x.dtype)
        if dy is not None and dy.dtype != x.dtype:
            dy = dy.to(x.dtype)
        return *(None,) * 6, dx, dy


def loss(
    plan: Plan, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, penalty: Tensor | None,
    dense: Callable[..., Tensor] | None,
) -> Tensor:  # fmt: skip
    """The loss () or (N,) of a call that has a plan.

    Args:
        plan: from `plan`.
        x: (N, D), the embeddings.
        labels: (N,) int64.
        y: (M, D), the references, or None.
        ref_labels: (M,) int64, or None.
        penalty: () that is added to the loss of every valid row, or None.
        dense: a function of x and y that computes the same loss by the reference, for second derivatives.
    """
    narrow = plan.backend == "onchip"  # onchip takes 16-bit embeddings as they are
    if (y is not None and y.dtype != x.dtype) or not (narrow or x.dtype.itemsize >= 4):
        wide = accumulator(x.dtype if y is None else torch.promote_types(x.dtype, y.dtype))
        x, y = x.to(wide), None if y is None else y.to(wide)
    grad = torch.is_grad_enabled()
    if penalty is None:
        return _Loss.apply(plan, dense, False, grad, labels, ref_labels, x, y)
    value, share = _Loss.apply(plan, dense, True, grad, labels, ref_labels, x, y)
    return value + penalty.to(value.dtype) * share
