"""Pairs of embeddings and class weights, in either role.

Many classes come in chunks: a chunk of weights is normalised, reduced and forgotten, and once more for its gradient. So
beside the weights and their gradient nothing grows with their number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import ReferencePairs
from ..core.label_order import LabelOrder
from ..core.problem import accumulator, decode, merge_logsumexp, solid, tops
from ..core.reduction import Reduction, check_call
from ..core.similarity import inverse_norm, no_autocast, normalize, poison, through_normalize, upcast
from ..engine import row_reduce_op
from ..engine.dispatch import choose
from ..engine.pairs import Pairs, checked_pairs

CHUNK_BYTES = 2**25  # of weights that are normalised at a time, and up to which they are at once


def class_pairs(x: Tensor, labels: Tensor, weight: Tensor, unit: bool, impl: str) -> Pairs | ReferencePairs:
    """Embeddings (B, D) as anchors, normalised if `unit`, and the weights (C, D), which always are, as references: each
    anchor's class is its one positive."""
    return _pairs(x, labels, weight, unit, impl, proxies=False)


def proxy_pairs(weight: Tensor, x: Tensor, labels: Tensor, unit: bool, impl: str) -> Pairs | ReferencePairs:
    """The weights (C, D) as anchors, and embeddings (B, D) as references."""
    return _pairs(x, labels, weight, unit, impl, proxies=True)


def _pairs(
    x: Tensor, labels: Tensor, weight: Tensor, unit: bool, impl: str, *, proxies: bool
) -> Pairs | ReferencePairs:
    x, w = upcast(x, weight)
    assert w is not None
    x = normalize(x) if unit else x
    chosen = choose(impl, x, w)
    if chosen != "reference" and w.numel() * w.element_size() > CHUNK_BYTES:
        return StreamedPairs(x, labels, w, chosen, proxies)
    w, classes = normalize(w), torch.arange(weight.shape[0], device=weight.device)
    if proxies:
        return checked_pairs(w, classes, x, labels, "dot", False, impl)
    return checked_pairs(x, labels, w, classes, "dot", False, impl)


class _Job(NamedTuple):
    """What a call of some reductions needs beside tensors: see row_reduce_op.Spec."""

    spec: row_reduce_op.Spec
    reductions: tuple[Reduction, ...]
    proxies: bool


class StreamedPairs(Pairs):
    """`Pairs` of embeddings (B, D) and weights (C, D) that are not normalised yet: plain sums and logsumexps by chunks,
    other reductions of all weights at once, for which a normalised copy of them is made.

    proxies: the weights are the anchors.
    """

    def __init__(self, x: Tensor, labels: Tensor, weight: Tensor, impl: str, proxies: bool) -> None:
        ordered, order = torch.sort(labels, stable=True)
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        self.rows, self.weight, self.proxies = x.index_select(0, order), weight, proxies
        label_order = LabelOrder(none if proxies else order, none, ordered, ordered, none, none, None, False)
        super().__init__(self.rows, weight, label_order, "dot", impl)

    @property
    def count(self) -> int:
        return (self.weight if self.proxies else self.rows).shape[0]

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        check_call(reductions, self.rows, self.count, self.weight.shape[0] + self.rows.shape[0] - self.count)
        for r in reductions:
            known = r.op in ("sum", "logsumexp") and r.transform == "identity"
            if not known or not (r.offset is r.lower is r.upper is None):
                return self.whole.reduce(*reductions)
        x, dtype = self.rows, accumulator(self.rows.dtype)
        scale = None
        if any(isinstance(r.scale, Tensor) for r in reductions):
            scale = torch.stack([torch.as_tensor(r.scale, dtype=dtype, device=x.device) for r in reductions])
        plain = tuple(replace(r, scale=1.0 if isinstance(r.scale, Tensor) else r.scale) for r in reductions)
        job = _Job(row_reduce_op.encode(plain, (), "dot", self.impl), reductions, self.proxies)
        found: Tensor = _Streamed.apply(job, x, self.labels, self.weight, scale)
        bad = poison(x, None)
        return tuple((row.detach() if r.detach else row) + bad for row, r in zip(found, reductions, strict=True))

    @functools.cached_property
    def whole(self) -> Pairs:
        """The same pairs, rows in the same order, with all weights normalised at once: for what chunks cannot merge."""
        w = normalize(self.weight)
        classes = torch.arange(w.shape[0], device=w.device)
        sides = (w, classes, self.rows, self.labels) if self.proxies else (self.rows, self.labels, w, classes)
        found = checked_pairs(*sides, "dot", False, self.impl)
        assert isinstance(found, Pairs)
        return found

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        return self.whole.positives(most, block)

    def num_positives(self) -> Tensor:
        if not self.proxies:
            return torch.ones_like(self.labels)
        return torch.bincount(self.labels, minlength=self.weight.shape[0])

    def num_negatives(self) -> Tensor:
        return (self.rows if self.proxies else self.weight).shape[0] - self.num_positives()

    def squares(self) -> Tensor:
        return (self.rows * self.rows).sum(1)

    def restore(self, values: Tensor) -> Tensor:
        return values if self.proxies else super().restore(values)

    def dense(self) -> ReferencePairs:
        return self.whole.dense()


class _Chunk(NamedTuple):
    """Classes [first, last): unit weights and the reciprocal norms, and the problem as the registered ops take it."""

    first: int
    last: int
    unit: Tensor
    inverse: Tensor
    problem: tuple[Any, ...]


def _chunks(x: Tensor, labels: Tensor, weight: Tensor, scale: Tensor | None, job: _Job) -> Iterator[_Chunk]:
    size = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, weight.shape[0], size):
        part = weight[first : first + size]
        inverse = inverse_norm(part)
        unit, count = part * inverse, part.shape[0]
        if job.proxies:
            classes = torch.arange(first, first + count, device=x.device)
            lo, hi = torch.searchsorted(labels, classes), torch.searchsorted(labels, classes, right=True)
            sides, order = (unit, x), torch.arange(x.shape[0], device=x.device)
        else:
            lo, hi = (labels - first).clamp(0, count), (labels - first + 1).clamp(0, count)
            sides, order = (x, unit), torch.arange(count, device=x.device)
        yield _Chunk(first, first + count, unit, inverse, (*sides, lo, hi, None, order, scale, [], *job.spec))


def _merged(job: _Job, one: Tensor, other: Tensor, scale: Tensor | None) -> Tensor:
    """The values of two chunks' references taken together; rows as core/problem.py says."""
    found, terms = one.clone(), decode(job.spec.code, job.spec.shifts, job.spec.slots)
    for k, (t, top) in enumerate(zip(terms, tops(terms), strict=True)):
        if top < 0:
            found[k] = one[k] + other[k]
        else:
            rows = [k, top, top + 1]
            by = 1.0 if t.transformed else job.spec.scales[k] if scale is None else scale[k]
            found[rows] = torch.stack(merge_logsumexp(one[rows], other[rows], by))
    return found


class _Streamed(torch.autograd.Function):
    """Row values (K, rows) of reductions over all chunks. It keeps them; second derivatives take the dense matrix."""

    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, labels: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        found: list[Tensor] = []
        kept: list[Tensor] = []
        for chunk in _chunks(x, labels, weight, scale, job):
            values, *kept = row_reduce_op.call("row_reduce", x)(*chunk.problem, False)
            if job.proxies or not found:
                found.append(values)
                continue
            found[0] = _merged(job, found[0], values, scale)
        total = torch.cat(found, 1)
        ctx.job = job
        ctx.save_for_backward(x, labels, weight, scale, total, *kept)
        return total[: len(job.reductions)].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, weight, scale, total, *kept = ctx.saved_tensors
        job, (_, need_x, _, need_weight, need_scale) = ctx.job, ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(job, x, labels, weight, scale, g, ctx.needs_input_grad)
        dx = torch.zeros_like(x) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        dscale = torch.zeros_like(scale) if need_scale else None
        wants = [need_weight, need_x] if job.proxies else [need_x, need_weight]
        for chunk in _chunks(x, labels, weight, scale, job):
            rows = slice(chunk.first, chunk.last) if job.proxies else slice(None)
            own, other, part, *_ = row_reduce_op.call("row_reduce_backward", x)(
                *chunk.problem, total[:, rows].contiguous(), *kept, [solid(row) for row in g[:, rows]],
                [*wants, need_scale, False, False],
            )  # fmt: skip
            of_x, of_weight = (other, own) if job.proxies else (own, other)
            if dx is not None:
                dx += of_x
            if dweight is not None:
                dweight[chunk.first : chunk.last] = through_normalize(of_weight, chunk.unit, chunk.inverse)
            if dscale is not None:
                dscale += part
        return None, dx, None, dweight, dscale


def _differentiable_backward(  # type: ignore[no-untyped-def]
    job, x, labels, weight, scale, g, needs
) -> tuple[Tensor | None, ...]:
    """The same gradient as a differentiable function of its inputs, over the dense matrix."""
    classes = torch.arange(weight.shape[0], device=x.device)
    with torch.enable_grad(), no_autocast(x.device.type):
        x, weight = x.view_as(x), weight.view_as(weight)  # which may owe something to each other
        scale = None if scale is None else scale.view_as(scale)
        w = normalize(weight)
        if job.proxies:
            pairs = ReferencePairs.from_embeddings(w, classes, x, labels, "dot", False)
        else:
            pairs = ReferencePairs.from_embeddings(x, labels, w, classes, "dot", False)
        scales = [r.scale for r in job.reductions] if scale is None else scale.unbind()
        given = [replace(r, scale=s, detach=False) for r, s in zip(job.reductions, scales, strict=True)]
        rows = torch.stack(pairs.reduce(*given))
        inputs = (None, x, None, weight, scale)
        wanted = {k: t for k, (t, need) in enumerate(zip(inputs, needs, strict=True)) if need and t is not None}
        found = torch.autograd.grad(rows, list(wanted.values()), g, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(k) for k in range(len(inputs)))
