"""`onchip`: the loss and the gradient of an everyday batch in one launch of CUDA C++ (csrc/cuda/onchip.cu).

It computes whole criteria, those that say their `RowFormula`, not row reductions. Forward leaves the gradient of the
one number that the loss is, and backward scales it; with ``reduction="none"`` backward is a second launch.
Keeps for backward: that gradient, in float32 or float64. Double backward goes through the dense reference.
Allocates, beside its results, one workspace, O((N + M) D). No host sync; the tensors' device and its current stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension
from .formula import FORMULAS, RowFormula
from .rows import plain
from .schedule import accumulator

NUMBERS = {dtype: k for k, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16))}
AVERAGINGS = ("mean", "sum", "none", "mean_valid", "nonzero")
BLOCK_ROWS = (1, 2, 4, 8, 16)  # that a block may own: csrc/cuda/onchip.cu has a kernel for each
SCRATCH, ROW_NUMBERS = 4 * 8, 6  # of a block, and of each of its rows, beside embeddings and similarities: onchip.cu


class Limits(NamedTuple):
    """A device's multiprocessors, bytes of shared memory a block may have, and whether it has cooperative launches."""

    processors: int
    shared: int
    cooperative: bool


@functools.lru_cache(maxsize=16)
def _limits(index: int) -> Limits:
    module = extension.onchip()
    assert not isinstance(module, str)
    return Limits(*module.limits(index))


def limits(index: int) -> Limits:
    """Those of the CUDA device of that index."""
    return _limits(index)


limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def block_rows(n: int, m: int, d: int, itemsize: int, want_dy: bool, of: Limits) -> int | str:
    """How many rows a block owns: as few as the multiprocessors allow, one block each; or why none will do.

    A block's shared memory holds its rows, of width D, and their stripe of similarities with all others.
    """
    if not of.cooperative:
        return "the device has no cooperative launches"
    others, width = -(-max(n, m) // 4) * 4, -(-d // 4) * 4
    owned = "N + M" if want_dy else "N"
    for rows in BLOCK_ROWS:
        blocks = max(1, -(-n // rows)) + (-(-m // rows) if want_dy else 0)
        if blocks > of.processors:
            continue
        needed = itemsize * (rows * (others + width + ROW_NUMBERS) + SCRATCH) + rows * others  # and a byte a pair
        if needed <= of.shared:
            return rows
        return (
            f"a block's {rows} rows of {others} similarities and of D = {width} take {needed} bytes of shared memory,"
            f" and a block has {of.shared}"
        )
    most = BLOCK_ROWS[-1]
    return (
        f"{owned} = {n + m if want_dy else n} is over {most * of.processors}:"
        f" {of.processors} multiprocessors with {most} rows each"
    )


def largest_batch(d: int, of: Limits) -> int:
    """The largest N of a float32 batch of width D against itself."""
    found = 0
    for n in range(4, BLOCK_ROWS[-1] * of.processors + 1, 4):
        if isinstance(block_rows(n, n, d, 4, False, of), int):
            found = n
    return found


class Spec(NamedTuple):
    """The constants of a call, as the registered op takes them."""

    code: tuple[int, ...]  # rows a block, formula, averaging, unit, euclidean, one_pair, mined
    numbers: tuple[float, ...]  # scales, shifts, epsilon


def plan(
    formula: RowFormula | None, x: Tensor, y: Tensor | None, *, reduction: str, unit: bool, distance: str, penalty: bool
) -> Spec | tuple[str, ...]:
    """What the kernel is told of a criterion's call, or every reason why it cannot take it."""
    if formula is None:
        names = ", ".join(FORMULAS)
        return (f"onchip knows the losses {names}, and this criterion says none of them of itself",)
    for value in formula.scales + formula.shifts:
        if isinstance(value, Tensor):
            return ("onchip takes numbers as hyper-parameters, not tensors",)
    make = _plan_of if torch.compiler.is_compiling() else _plan
    index = x.device.index or 0
    if y is None:
        return make(formula, x.shape, x.shape[0], x.dtype, False, index, reduction, unit, distance, penalty)
    dtype = torch.promote_types(x.dtype, y.dtype)
    want_dy = y.requires_grad and torch.is_grad_enabled()
    return make(formula, x.shape, y.shape[0], dtype, want_dy, index, reduction, unit, distance, penalty)


def _plan_of(
    formula: RowFormula, shape: torch.Size, m: int, dtype: torch.dtype, want_dy: bool, device: int, reduction: str,
    unit: bool, distance: str, penalty: bool,
) -> Spec | tuple[str, ...]:  # fmt: skip
    n, d = shape
    rows = block_rows(n, m, d, accumulator(dtype).itemsize, want_dy, limits(device))
    reasons: tuple[str, ...] = (rows,) if isinstance(rows, str) else ()
    if penalty and reduction in ("none", "nonzero"):
        reasons += (f"onchip adds a penalty on norms to one number, not to reduction={reduction!r}",)
    if reasons or isinstance(rows, str):
        return reasons
    code = (
        rows, FORMULAS.index(formula.name), AVERAGINGS.index(reduction), int(unit), int(distance == "euclidean"),
        int(formula.one_pair), int(formula.epsilon is not None),
    )  # fmt: skip
    return Spec(code, (*formula.scales, *formula.shifts, formula.epsilon or 0.0))  # type: ignore[arg-type]


_plan = functools.lru_cache(maxsize=1024)(_plan_of)


@functools.lru_cache(maxsize=1024)
def _launch(
    device: int, n: int, m: int, d: int, number: int, square: bool, code: tuple[int, ...], numbers: tuple[float, ...],
    want_dy: bool,
) -> Any:  # fmt: skip
    module = extension.onchip()
    assert not isinstance(module, str)
    return module.Launch(device, n, m, d, number, square, *code, *numbers, want_dy)


Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _run(
    x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, upstream: Tensor | None,
    code: tuple[int, ...], numbers: tuple[float, ...], want_loss: bool, want_share: bool, want_dx: bool, want_dy: bool,
) -> Results:  # fmt: skip
    """Loss () or (N,), the share of valid rows (), dL/dx (N, D) and dL/dy (M, D), float32 or float64; None unwanted."""
    device, dtype = x.device, accumulator(x.dtype)
    index = device.index or 0
    if device.type == "cuda" and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return _run(x, labels, y, ref_labels, upstream, code, numbers, want_loss, want_share, want_dx, want_dy)
    x, labels = x.contiguous(), labels.contiguous()
    n, d = x.shape
    if y is None or ref_labels is None:
        square, m, refs, ref_labels = True, n, x, labels
    else:
        square, m, refs, ref_labels = False, y.shape[0], y.contiguous(), ref_labels.contiguous()
    launch = _launch(index, n, m, d, NUMBERS[x.dtype], square, code, numbers, want_dy)

    def room(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    loss = room(want_loss, *((n,) if code[2] == AVERAGINGS.index("none") else ()))
    share, dx, dy = room(want_share), room(want_dx, n, d), room(want_dy, m, d)
    workspace = torch.empty(launch.workspace, dtype=torch.uint8, device=device)
    launch(
        x.data_ptr(), refs.data_ptr(), labels.data_ptr(), ref_labels.data_ptr(),
        0 if upstream is None else upstream.data_ptr(), 0 if loss is None else loss.data_ptr(),
        0 if share is None else share.data_ptr(), 0 if dx is None else dx.data_ptr(),
        0 if dy is None else dy.data_ptr(), workspace.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0,
    )  # fmt: skip
    return loss, share, dx, dy


_library = torch.library.Library("flashpair", "FRAGMENT")
_library.define(
    "onchip(Tensor x, Tensor labels, Tensor? y, Tensor? ref_labels, Tensor? upstream, int[] code, float[] numbers, "
    "bool want_loss, bool want_share, bool want_dx, bool want_dy) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _op(x, labels, y, ref_labels, upstream, code, numbers, *want):  # type: ignore[no-untyped-def]
    found = _run(x, labels, y, ref_labels, upstream, tuple(code), tuple(numbers), *want)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _fake(x, labels, y, ref_labels, upstream, code, numbers, *want):  # type: ignore[no-untyped-def]
    rows = (x.shape[0],) if code[2] == AVERAGINGS.index("none") else ()
    shapes = (rows, (), x.shape, (x if y is None else y).shape)
    dtype = accumulator(x.dtype)
    return tuple(x.new_empty(s, dtype=dtype) if w else x.new_empty(0) for s, w in zip(shapes, want, strict=True))


for _key in ("CPU", "CUDA"):
    _library.impl("onchip", _op, _key)
torch.library.register_fake("flashpair::onchip", _fake, lib=_library)


def _call(x: Tensor, *arguments: Any) -> Results:
    return _run(x, *arguments) if plain(x) else torch.ops.flashpair.onchip(x, *arguments)


class _Loss(torch.autograd.Function):
    """The loss, and with `want_share` the share of valid rows. dense(x, y): the same loss, by the reference."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, dense: Callable[..., Tensor] | None, want_share: bool, labels: Tensor,
        ref_labels: Tensor | None, x: Tensor, y: Tensor | None,
    ) -> Any:  # fmt: skip
        need_x, need_y = ctx.needs_input_grad[5:]
        rows = spec.code[2] == AVERAGINGS.index("none")
        loss, share, dx, dy = _call(
            x, labels, y, ref_labels, None, *spec, True, want_share, need_x and not rows, need_y and not rows
        )
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.dense = spec, dense
        if need_x or need_y:
            ctx.save_for_backward(x, y, labels, ref_labels, dx, dy)
        if not want_share:
            return loss
        ctx.mark_non_differentiable(share)
        return loss, share

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        x, y, labels, ref_labels, dx, dy = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[5:]
        if ctx.dense is not None and torch.is_grad_enabled():  # to be differentiated again
            wanted = [t for t, need in ((x, need_x), (y, need_y)) if need]
            found = list(torch.autograd.grad(ctx.dense(x, y), wanted, g, create_graph=True))
            return None, None, None, None, None, found.pop(0) if need_x else None, found[0] if need_y else None
        if ctx.spec.code[2] == AVERAGINGS.index("none"):
            _, _, dx, dy = _call(x, labels, y, ref_labels, g.contiguous(), *ctx.spec, False, False, need_x, need_y)
        else:  # in float32 before it is rounded, so that loss scaling works
            dx, dy = dx * g if need_x else None, dy * g if need_y else None
        if dx is not None and dx.dtype != x.dtype:
            dx = dx.to(x.dtype)
        if dy is not None and dy.dtype != x.dtype:
            dy = dy.to(x.dtype)
        return None, None, None, None, None, dx, dy


def loss(
    spec: Spec, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, penalty: Tensor | None,
    dense: Callable[..., Tensor] | None,
) -> Tensor:  # fmt: skip
    """The loss that `plan` has let through. penalty (): added to every valid row's loss."""
    if y is not None and y.dtype != x.dtype:
        wide = accumulator(torch.promote_types(x.dtype, y.dtype))
        x, y = x.to(wide), y.to(wide)
    if penalty is None:
        return _Loss.apply(spec, dense, False, labels, ref_labels, x, y)
    value, share = _Loss.apply(spec, dense, True, labels, ref_labels, x, y)
    return value + penalty.to(value.dtype) * share
