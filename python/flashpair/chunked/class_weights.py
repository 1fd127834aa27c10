"""Pairs of embeddings and class weights. Either may be the anchors.

Many classes come in chunks: a chunk of weights is normalised, reduced and dropped, and normalised again in backward. So
only the weights and their gradient take memory that grows with the number of classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import ReferencePairs
from ..core.call import Call, compile_call, operands_of
from ..core.class_pairs import ClassPairs
from ..core.pairs import PairAccess
from ..core.problem import Operands, Problem, accumulator, merge_logsumexp, solid, tops
from ..core.reduction import Reduction, check_call
from ..core.similarity import inverse_norm, l2_normalize, nan_unless_finite, no_autocast, through_normalize, upcast
from ..engine import row_reduce_op
from ..engine.dispatch import Route, route_call, route_pairs
from ..engine.pairs import Pairs, checked_pairs

CHUNK_BYTES = 2**25  # the size of a chunk of weights; weights of at most this size are one chunk


def class_pairs(x: Tensor, labels: Tensor, weight: Tensor, normalize: bool, impl: str) -> PairAccess:
    """Pairs of embeddings as anchors and weights as references. The weights of an anchor's class are its one positive.

    Args:
        x: (B, D), the embeddings.
        labels: (B,) int64, classes.
        weight: (C, D), which is always normalised.
        normalize: L2-normalise the embeddings, too.
        impl: as `Criterion` takes it.
    """
    return _pairs(x, labels, weight, normalize, impl, proxies=False)


def proxy_pairs(weight: Tensor, x: Tensor, labels: Tensor, normalize: bool, impl: str) -> PairAccess:
    """Pairs of weights (C, D) as anchors and embeddings (B, D) as references; arguments are those of `class_pairs`."""
    return _pairs(x, labels, weight, normalize, impl, proxies=True)


def _pairs(x: Tensor, labels: Tensor, weight: Tensor, normalize: bool, impl: str, *, proxies: bool) -> PairAccess:
    x, w = upcast(x, weight)
    assert w is not None
    x = l2_normalize(x) if normalize else x
    route = route_pairs(impl, x, w)
    if route.backend != "reference" and w.numel() * w.element_size() > CHUNK_BYTES:
        return ChunkedClassPairs(x, labels, w, route, proxies)
    return _resident(x, labels, l2_normalize(w), impl, proxies)


def _resident(x: Tensor, labels: Tensor, weight: Tensor, impl: str, proxies: bool) -> Pairs | ReferencePairs:
    """Pairs with all weights (C, D) at once, which are normalised already."""
    classes = torch.arange(weight.shape[0], device=weight.device)
    if proxies:
        return checked_pairs(weight, classes, x, labels, "dot", False, impl)
    return checked_pairs(x, labels, weight, classes, "dot", False, impl)


class ChunkedClassPairs(PairAccess):
    """Pairs of embeddings and weights, of which the weights are normalised in chunks.

    Sums and logsumexps without a transform, offset or window run in chunks. Everything else needs `resident`, which
    makes a normalised copy of all weights.

    Args:
        x: (B, D), the embeddings, in any order.
        labels: (B,) int64, their classes.
        weight: (C, D), not normalised.
        route: the backend that runs, and its dtype.
        proxies: the weights are the anchors.
    """

    square, distance = False, "dot"
    limit = "is not available where class weights come in chunks"

    def __init__(self, x: Tensor, labels: Tensor, weight: Tensor, route: Route, proxies: bool) -> None:
        self.sample_labels, self.order = torch.sort(labels, stable=True)
        self.rows, self.weight, self.route, self.proxies = x.index_select(0, self.order), weight, route, proxies
        self.labels = self.sample_labels if not proxies else torch.arange(weight.shape[0], device=x.device)

    @property
    def x(self) -> Tensor:
        """The anchors (N, D), sorted. Weights are not normalised."""
        return self.weight if self.proxies else self.rows

    @property
    def impl(self) -> str:
        """The name of the backend that runs."""
        return self.route.backend

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.rows.dtype)

    @property
    def ref_labels(self) -> Tensor:
        return self.sample_labels if self.proxies else torch.arange(self.weight.shape[0], device=self.rows.device)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        check_call(reductions, self.rows, self.count, self.weight.shape[0] + self.rows.shape[0] - self.count)
        for r in reductions:
            known = r.op in ("sum", "logsumexp") and r.transform == "identity"
            if not known or not (r.offset is r.lower is r.upper is None):
                return self.resident.reduce(*reductions)
        compiled = compile_call(reductions, "dot", self.impl)
        route_call(self.route, compiled, self.rows, 0)  # a named backend that cannot compute this call says so
        call = _ClassCall(compiled, reductions, self.proxies)
        scale = operands_of(call.call, reductions, 0, 0, self.dtype, self.rows.device).scale
        rows: Tensor = _ClassReduce.apply(call, self.rows, self.sample_labels, self.weight, scale)
        nonfinite = nan_unless_finite(self.rows, None)
        return tuple((row.detach() if r.detach else row) + nonfinite for row, r in zip(rows, reductions, strict=True))

    @functools.cached_property
    def resident(self) -> Pairs:
        """The same pairs, in the same order of rows, with a normalised copy of all weights."""
        impl = self.impl if self.route.named else "auto"
        pairs = _resident(self.rows, self.sample_labels, l2_normalize(self.weight), impl, self.proxies)
        assert isinstance(pairs, Pairs)
        return pairs

    @property
    def nonfinite(self) -> Tensor:  # type: ignore[override]
        return self.resident.nonfinite

    def positive_places(self, places: range) -> Tensor:
        return self.resident.positive_places(places)

    def similarities_at(self, refs: Tensor) -> Tensor:
        return self.resident.similarities_at(refs)

    def class_pairs(self) -> ClassPairs:
        return self.resident.class_pairs()

    def take_pairs(self, chosen: ClassPairs) -> Pairs:
        return self.resident.take_pairs(chosen)

    def dense(self) -> ReferencePairs:
        """The same pairs, in the same order of rows, over the dense matrix."""
        return self.resident.dense()

    def num_positives(self) -> Tensor:
        if not self.proxies:
            return torch.ones_like(self.labels)
        counts = torch.zeros_like(self.labels)  # bincount's size would depend on the labels' values
        return counts.index_add(0, self.sample_labels, torch.ones_like(self.sample_labels))

    def num_negatives(self) -> Tensor:
        return (self.rows if self.proxies else self.weight).shape[0] - self.num_positives()

    def squared_norms(self) -> Tensor:
        return self.resident.squared_norms() if self.proxies else (self.rows * self.rows).sum(1)

    def restore(self, values: Tensor) -> Tensor:
        return values if self.proxies else torch.empty_like(values).index_copy(0, self.order, values)

    def arrange(self, values: Tensor) -> Tensor:
        return values if self.proxies else values.index_select(0, self.order)

    def arrange_refs(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.order) if self.proxies else values


class _ClassCall(NamedTuple):
    """A call of some reductions, and whether the weights are the anchors."""

    call: Call
    reductions: tuple[Reduction, ...]
    proxies: bool


class _Chunk(NamedTuple):
    """Classes [first, last) of c classes.

    Attributes:
        first: the first class.
        last: one past the last class.
        normalized: (c, D), their normalised weights.
        inverse: (c, 1), the reciprocals of the weights' norms.
        problem: the problem of these classes alone.
    """

    first: int
    last: int
    normalized: Tensor
    inverse: Tensor
    problem: Problem


def _chunks(x: Tensor, labels: Tensor, weight: Tensor, proxies: bool) -> Iterator[_Chunk]:
    """The chunks of weights (C, D), with embeddings x (B, D) sorted by their labels (B,)."""
    size = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, weight.shape[0], size):
        part = weight[first : first + size]
        inverse = inverse_norm(part)
        normalized, count = part * inverse, part.shape[0]
        if proxies:
            classes = torch.arange(first, first + count, device=x.device)
            lo, hi = torch.searchsorted(labels, classes), torch.searchsorted(labels, classes, right=True)
            sides, order = (normalized, x), torch.arange(x.shape[0], device=x.device)
        else:
            lo, hi = (labels - first).clamp(0, count), (labels - first + 1).clamp(0, count)
            sides, order = (x, normalized), torch.arange(count, device=x.device)
        yield _Chunk(first, first + count, normalized, inverse, Problem(*sides, lo, hi, None, order, "dot"))


def _merged(call: Call, first: Tensor, second: Tensor, scale: Tensor | None) -> Tensor:
    """The values over two sets of references, from the values over each.

    Args:
        call: the constants of the K reductions.
        first: (R, N), the values over the first set, with rows as in core/problem.py.
        second: (R, N), the values over the second set.
        scale: (K,), the scales, if any of them is a tensor.
    """
    merged = first.clone()
    for k, (t, top) in enumerate(zip(call.terms, tops(call.terms), strict=True)):
        if top < 0:
            merged[k] = first[k] + second[k]
        else:
            rows = [k, top, top + 1]
            term_scale = 1.0 if t.transformed else call.scales[k] if scale is None else scale[k]
            merged[rows] = torch.stack(merge_logsumexp(first[rows], second[rows], term_scale))
    return merged


class _ClassReduce(torch.autograd.Function):
    """The row values (K, N) of reductions over all chunks of weights.

    It keeps the values for backward. Second derivatives use the dense matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, class_call: _ClassCall, x: Tensor, labels: Tensor, weight: Tensor, scale: Tensor | None
    ) -> Tensor:
        call, parts, kept = class_call.call, [], []  # type: ignore[var-annotated]
        for chunk in _chunks(x, labels, weight, class_call.proxies):
            values, *kept = row_reduce_op.forward(chunk.problem, call, Operands(scale, call.scales, []), False)
            if class_call.proxies or not parts:
                parts.append(values)
                continue
            parts[0] = _merged(call, parts[0], values, scale)
        total = torch.cat(parts, 1)
        ctx.class_call = class_call
        ctx.save_for_backward(x, labels, weight, scale, total, *kept)
        return total[: len(class_call.reductions)].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, weight, scale, total, *kept = ctx.saved_tensors
        class_call, (_, need_x, _, need_weight, need_scale) = ctx.class_call, ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(class_call, x, labels, weight, scale, g, ctx.needs_input_grad)
        dx = torch.zeros_like(x) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        dscale = torch.zeros_like(scale) if need_scale else None
        need = [need_weight, need_x] if class_call.proxies else [need_x, need_weight]
        call = class_call.call
        for chunk in _chunks(x, labels, weight, class_call.proxies):
            rows = slice(chunk.first, chunk.last) if class_call.proxies else slice(None)
            part = row_reduce_op.backward(
                chunk.problem, call, Operands(scale, call.scales, []), total[:, rows].contiguous(), kept,
                [solid(row) for row in g[:, rows]], [*need, need_scale, False, False],
            )  # fmt: skip
            of_x, of_weight = (part.y, part.x) if class_call.proxies else (part.x, part.y)
            if dx is not None and of_x is not None:
                dx += of_x
            if dweight is not None and of_weight is not None:
                dweight[chunk.first : chunk.last] = through_normalize(of_weight, chunk.normalized, chunk.inverse)
            if dscale is not None and part.scale is not None:
                dscale += part.scale
        return None, dx, None, dweight, dscale


def _differentiable_backward(  # type: ignore[no-untyped-def]
    class_call, x, labels, weight, scale, g, needs
) -> tuple[Tensor | None, ...]:
    """The gradients of `_ClassReduce` as differentiable functions of its inputs, over the dense matrix."""
    classes = torch.arange(weight.shape[0], device=x.device)
    with torch.enable_grad(), no_autocast(x.device.type):
        x, weight = x.view_as(x), weight.view_as(weight)  # one may be a function of the other
        scale = None if scale is None else scale.view_as(scale)
        w = l2_normalize(weight)
        if class_call.proxies:
            pairs = ReferencePairs.from_embeddings(w, classes, x, labels, "dot", False)
        else:
            pairs = ReferencePairs.from_embeddings(x, labels, w, classes, "dot", False)
        scales = [r.scale for r in class_call.reductions] if scale is None else scale.unbind()
        reductions = [replace(r, scale=s, detach=False) for r, s in zip(class_call.reductions, scales, strict=True)]
        rows = torch.stack(pairs.reduce(*reductions))
        inputs = (None, x, None, weight, scale)
        wanted = {k: t for k, (t, need) in enumerate(zip(inputs, needs, strict=True)) if need and t is not None}
        gradients = torch.autograd.grad(rows, list(wanted.values()), g, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, gradients, strict=True))
    return tuple(by_place.get(k) for k in range(len(inputs)))
