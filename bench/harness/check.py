"""Compares loss and gradient of each variant with float64 before it is timed.

The bound is measured, not chosen: FACTOR times (the error of the eager reference at the same precision, against itself
in float64, plus one rounding). A gradient is compared row by row, relative to the row or to the typical row.

Rounding can move a pair over a mining threshold, or over a node of a soft histogram, which changes its two rows
completely. So a few rows over the bound are forgiven, or twice as many as eager has. They are counted, and may move the
loss by no more than their share. How many rows eager has is chance, so eager runs with several orders of D, whose sums
round differently, and the worst order counts. A row that is forgiven because eager has such rows may be off by at most
FACTOR times eager's worst row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpair.engine.dispatch import unsupported_reasons

from ..studies.family_cases import FAMILY
from .cases import Batch, Case, make_batch
from .variants import Step, TrainingStep, criterion, make_step, training_step

FACTOR = 8.0
WORST_BOUND = 0.1  # even if eager is worse
MOST_FLOP = 5e12  # for a truth in float64; a larger case is checked on a part of itself
DENSE_SIDE = 4096
DOUBLE = 1e-9  # relative, of two results in float64
WEIGHT_COPIES = 40  # of class weights, in float64
ROUNDED = 0.01  # relative: over it, a difference is not rounding
SMALL = 256
FORGIVEN_ROWS = 2
FORGIVEN_SHARE = 1e-3
ORDERS = 4  # of D, that eager is run with


class Truth(NamedTuple):
    """Loss and gradient of `case` in float64, on the numbers of `batch`; `how` they were computed; the bound.

    `forgiven`: the share of rows that may exceed the bound, twice eager's share; `worst`: the limit for these rows.
    `weights`: the gradient of class weights (C, D), if any.
    """

    case: Case
    batch: Batch
    loss: float
    gradient: Tensor
    how: str
    bound: float
    forgiven: float
    worst: float
    weights: Tensor | None = None


class Verdict(NamedTuple):
    """Relative errors: of the loss, and of the gradient's rows (99th percentile and worst)."""

    right: bool
    loss_error: float
    gradient_error: float
    worst_row: float
    rows_over: int
    bound: float
    words: str

    def record(self, truth: Truth) -> dict[str, Any]:
        return {**self._asdict(), "against": truth.how, "checked_n": truth.case.n, "checked_m": truth.case.m}


def _head(case: Case) -> Case:
    """The case, or one of the same kind that is small enough for dense matrices in float64."""
    side = max(16, min(DENSE_SIDE, math.isqrt(case.options.memory_limit // FAMILY[case.options.loss].bytes_a_pair)))
    if case.centres:
        o, a_class = case.options, case.centres // case.options.num_classes
        classes = max(16, o.memory_limit // (WEIGHT_COPIES * 8 * case.d * a_class))
        o = replace(o, num_classes=min(o.num_classes, classes))
        return Case(o, min(case.n, max(16, side**2 // (o.num_classes * a_class))), case.d)
    if case.n * case.m <= side**2:
        return case
    ref = None if case.square else min(case.m, side)
    return Case(replace(case.options, ref=ref), min(case.n, side), case.d)


class Found(NamedTuple):
    """Loss and gradient of a step, in embeddings (N, D), and in class weights (C, D) if it has any."""

    loss: float
    gradient: Tensor
    weights: Tensor | None

    def errors(self, gradient: Tensor, weights: Tensor | None) -> Tensor:
        """The errors of the embeddings' rows, then of the weights' rows."""
        errors = row_errors(self.gradient, gradient)
        if self.weights is None or weights is None:
            return errors
        return torch.cat([errors, row_errors(self.weights, weights)])


def _run(step: Callable[[], Tensor], batch: Batch) -> Found:
    loss = step()
    gradient = batch.x.grad
    assert gradient is not None
    weights = step.weight_gradient() if isinstance(step, TrainingStep) else None
    if isinstance(step, TrainingStep):
        step.forget()
    batch.x.grad = None
    return Found(float(loss), gradient, weights)


def _double(case: Case, batch: Batch, impl: str) -> Found:
    exact, made = batch.double(), criterion(case, impl)
    if isinstance(made, torch.nn.Module):
        made.double()
    return _run(training_step(made, exact), exact)


def _agree(one: Found, other: Found) -> bool:
    """Whether two float64 results of the same sums in different orders agree."""
    close = _loss_error(one.loss, other.loss) < DOUBLE
    return close and bool((one.errors(other.gradient, other.weights) < DOUBLE).all())


def row_errors(gradient: Tensor, truth: Tensor) -> Tensor:  # (N, D), (N, D) -> (N,)
    """Each row's error relative to its norm or the root mean square of all rows' norms, whichever is more."""
    norm = torch.linalg.vector_norm(truth, dim=1)
    typical = norm.square().mean().sqrt()
    size = torch.maximum(norm, typical).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.vector_norm(gradient.double() - truth, dim=1) / size


def _loss_error(loss: float, truth: float) -> float:
    if loss == truth:
        return 0.0
    return abs(loss - truth) / max(abs(truth), torch.finfo(torch.float64).tiny)


def _errors_in_other_orders(case: Case, batch: Batch, truth: Found) -> Iterator[Tensor]:
    """Eager's errors with the columns of all embeddings in other orders, which changes nothing but rounding.

    Losses with class weights are run in one order only, because the weights are made in it.
    """
    generator = torch.Generator().manual_seed(case.options.seed)
    for _ in range(0 if case.centres else ORDERS - 1):
        order = torch.randperm(case.d, generator=generator).to(batch.x.device)
        x, y = batch.x.detach()[:, order].requires_grad_(), None if batch.y is None else batch.y[:, order]
        other = batch._replace(x=x, y=y)
        yield _run(training_step(criterion(case, "reference"), other), other).errors(truth.gradient[:, order], None)


def find_truth(case: Case, batch: Batch) -> Truth:
    head = _head(case)
    head_batch = batch if head == case else make_batch(head)
    dense = _double(head, head_batch, "reference")
    eager = _run(training_step(criterion(head, "reference"), head_batch), head_batch)
    errors = eager.errors(dense.gradient, dense.weights)
    error = max(_loss_error(eager.loss, dense.loss), errors.quantile(0.99).item())
    rounding = torch.finfo(case.options.torch_dtype).eps
    bound = min(FACTOR * (error + rounding), WORST_BOUND)
    off = [errors, *_errors_in_other_orders(head, head_batch, dense)]
    forgiven = 2 * max((e > bound).double().mean().item() for e in off)
    worst = FACTOR * max(e.max().item() for e in off)
    quick = 6 * case.n * (case.centres or case.m) * case.d <= MOST_FLOP
    fits = case.options.num_classes == head.options.num_classes
    if (
        head != case
        and quick
        and fits
        and case.options.device == "cpu"
        and not unsupported_reasons("tiled", batch.x.device)
    ):
        if _agree(_double(head, head_batch, "tiled"), dense):
            loss, gradient, weights = _double(case, batch, "tiled")
            how = "flashpair's tiled implementation in float64"
            return Truth(case, batch, loss, gradient, how, bound, forgiven, worst, weights)
    how = "the dense reference in float64"
    how = how if head == case else f"{how}, on a part of the size"
    return Truth(head, head_batch, dense.loss, dense.gradient, how, bound, forgiven, worst, dense.weights)


def only_rounds(verdict: Verdict, case: Case, variant: str) -> bool:
    """Whether a difference is only float32 rounding: it is small, and a small case in float64 is right."""
    if not (verdict.gradient_error < ROUNDED and verdict.loss_error < ROUNDED):
        return False
    exact = Case(replace(case.options, dtype="float64"), min(case.n, SMALL), case.d)
    batch = make_batch(exact)
    truth = _double(exact, batch, "reference")
    return _agree(_run(make_step(variant, exact, batch), batch), truth)


def judge(step: Step, truth: Truth) -> Verdict:
    """`step` must be made on ``truth.batch``."""
    found = _run(step, truth.batch)
    errors = found.errors(truth.gradient, truth.weights)
    n, bound = errors.shape[0], truth.bound
    over = int((~(errors <= bound)).sum())  # a NaN exceeds the bound
    loss_error = _loss_error(found.loss, truth.loss)
    typical, worst = errors.quantile(0.99).item(), errors.max().item()
    rows_right = over <= max(FORGIVEN_ROWS, FORGIVEN_SHARE * n)
    rows_right |= over <= truth.forgiven * n and worst <= truth.worst
    loss_right = loss_error <= bound + over / n
    words = []
    if not loss_right:
        words.append(f"loss off by {loss_error:.1e}")
    if not rows_right:
        words.append(f"gradient off by {typical:.1e} in {over:,} of {n:,} rows")
    said = f"wrong: {' and '.join(words)}, allowed {bound:.1e}" if words else ""
    return Verdict(not words, loss_error, typical, worst, over, bound, said)
