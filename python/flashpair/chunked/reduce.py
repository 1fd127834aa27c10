"""Row reductions against references that come in chunks, one chunk at a time.

    source ── chunk ──► a backend's forward or backward on that chunk ──► the state of each anchor

Computes: what one call on all references would. The results of chunks are merged in float64: sums are added,
log-sum-exps are added in logarithms, and of extremes the better one stays.
Never materialises: more references than the chunk that the source has brought. A window that is bound to another
reduction needs that reduction's value over all chunks. So each stage of a call goes through all chunks once, and
backward goes through them once more.
Keeps for backward: the row values, and for each extreme the reference that attained it; for a screened call also the
live pairs of each chunk (those inside the windows), up to a fixed number for each row and reference.
Deterministic: chunks are merged in the source's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import screened, tiled
from ..core.call import OFFSET, REF_OFFSET, Call
from ..core.chunks import NO_REFERENCE, Chunk, Received, ReferenceSource, as_integers, as_numbers, only_once, places_of
from ..core.problem import (
    POSITIVES,
    Gradients,
    Operands,
    Problem,
    Terms,
    accumulator,
    num_rows,
    solid,
    stages,
    tops,
)
from ..engine import row_reduce_op
from . import two_sided
from .merged_values import MergedValues, resolved

LIVE_PAIRS_PER_ROW = 8  # kept of a screened chunk, 8 bytes each in float32; fewer than of a call on all references


class ChunkedCall(NamedTuple):
    """A call and the source of its references."""

    ref_source: ReferenceSource
    call: Call

    def problem(self, x: Tensor, chunk: Chunk) -> Problem:
        """A chunk against its anchors. If it is `two_sided`, its rows are these anchors and then its references.

        Args:
            x: (N, D), all anchors, sorted.
            chunk: the chunk.
        """
        labels, order = self.ref_source.labels[chunk.anchors], self.ref_source.order[chunk.anchors]
        anchors = x[chunk.anchors]
        lo = torch.searchsorted(chunk.labels, labels)
        hi = torch.searchsorted(chunk.labels, labels, right=True)
        if not chunk.two_sided or chunk.y is None:
            return Problem(anchors, chunk.y, lo, hi, chunk.end, chunk.order, self.call.distance)
        n = anchors.shape[0]
        ref_lo = torch.searchsorted(labels, chunk.labels)
        ref_hi = torch.searchsorted(labels, chunk.labels, right=True)
        rows, order = torch.cat([anchors, chunk.y]), torch.cat([order, chunk.order])
        lo, hi = torch.cat([lo + n, ref_lo]), torch.cat([hi + n, ref_hi])
        return Problem(rows, None, lo, hi, None, order, self.call.distance, n)

    def chunk_operands(self, operands: Operands, chunk: Chunk) -> Operands:
        """The operands of the rows of `problem`."""
        vectors = [v[chunk.anchors].contiguous() for v in operands.vectors]
        if chunk.two_sided and chunk.anchor_values is not None:
            vectors = [torch.cat(pair) for pair in zip(vectors, chunk.anchor_values, strict=False)]
        return Operands(operands.scale, operands.scales, vectors)

    def screens(self, p: Problem, terms: Terms) -> bool:
        """Whether to screen a chunk for these terms of one stage."""
        can = self.call.backend == "screened" and not p.split and any(t.side != POSITIVES for t in terms)
        return can and screened.worthwhile(p.x, p.refs.shape[0])

    def unscreened_backend(self, p: Problem) -> Any:
        """The backend that computes a chunk without screening."""
        return tiled if self.call.backend == "screened" else row_reduce_op.backend_module(self.call.backend, p.x.device)

    def forward(
        self, p: Problem, terms: Terms, operands: Operands, keep_live: bool
    ) -> tuple[Tensor, Tensor | None, tiled.Kept | None]:
        """Forward on one chunk.

        Args:
            p: the chunk's problem of N rows.
            terms: the K terms of one stage.
            operands: their operands.
            keep_live: keep the live pairs of a screened chunk for backward.

        Returns:
            The values (R, N); the index among all references of each extreme (K, N) int64, or None; and the live pairs,
            or None.
        """
        keep, live = any(t.indexed for t in terms), None
        if self.screens(p, terms):
            keep_live = keep_live and any(t.weighted and t.side != POSITIVES for t in terms)
            values, screen = screened.forward(p, terms, operands, keep or keep_live)
            places = screen.extreme
            if keep_live:
                tiles = max(screen.live_count.shape[0], 1)
                live = screen.trimmed(LIVE_PAIRS_PER_ROW * sum(map(len, (p.x, p.refs))) // tiles)
        elif p.split:
            values, places = two_sided.forward(self.call.backend, p, terms, operands, keep)
        else:
            if keep and not two_sided.in_one_problem(self.call.backend, p):
                ranked = p._replace(order=two_sided.ranks(p.order))
            else:
                ranked = p
            values, kept = self.unscreened_backend(p).forward(ranked, terms, operands, keep)
            places = kept[0]
        if not keep:
            return values, None, live
        return values, torch.where(places < 0, NO_REFERENCE, p.order[places.clamp_min(0)]), live

    def backward(
        self, p: Problem, terms: Terms, operands: Operands, values: Tensor, winner: Tensor | None, grads: Tensor,
        need: Sequence[bool], live: tiled.Kept | None,
    ) -> Gradients:  # fmt: skip
        """Backward on one chunk.

        Args:
            p: the chunk's problem of N rows.
            terms: the K terms, all of one stage.
            operands: their operands.
            values: (R, N), the terms' values over all chunks.
            winner: (K, N) int64, the index among all references of each extreme, or None.
            grads: (K, N), the gradients of the values.
            need: whether gradients of x, y, scale, offset and ref_offset are needed.
            live: the live pairs that forward kept of this chunk, or None.
        """
        places = None if winner is None else places_of(winner, p.order)
        rows = [solid(row) for row in grads]
        if p.split:
            if places is not None:  # a row of the same group is no reference in this problem
                in_second = torch.arange(places.shape[1], device=places.device) >= p.split
                places = torch.where((places >= p.split) == in_second, -1, places)
            return two_sided.backward(self.call.backend, p, terms, operands, values, places, rows, need)
        module = self.unscreened_backend(p)
        kept = two_sided.kept_of(module, p, terms, places)
        if live is not None:  # the live pairs are no positives, so terms over positives need a pass without them
            with_live = [kept[0], *live[1:]]
            of_positives = [t.side == POSITIVES for t in terms]
            positive_grads = [g if positive else None for g, positive in zip(rows, of_positives, strict=True)]
            other_grads = [None if positive else g for g, positive in zip(rows, of_positives, strict=True)]
            first = module.backward(p, terms, operands, values, kept, positive_grads, need)
            second = module.backward(p, terms, operands, values, with_live, other_grads, need)
            return Gradients(*(None if a is None else a + b for a, b in zip(first, second, strict=True)))
        gradients: Gradients = module.backward(p, terms, operands, values, kept, rows, need)
        return gradients


LivePairs = dict[int, tiled.Kept]  # the live pairs of chunks, by the number of the chunk in its source


def reduce_chunks(
    chunked: ChunkedCall, x: Tensor, y: Tensor | None, terms: Terms, operands: Operands, keep: bool
) -> tuple[Tensor, Tensor | None, LivePairs]:
    """Forward over all chunks, once for each stage.

    Args:
        chunked: the call and the source of references.
        x: (N, D), the sorted anchors.
        y: (m, D), the sorted references of this process, or None.
        terms: the K terms of the call.
        operands: their operands.
        keep: keep the live pairs of screened chunks for backward.

    Returns:
        The values (R, N); the index among all references of each extreme (K, N) int64, or None; and the live pairs.
    """
    scales = operands.scales if operands.scale is None else operands.scale
    state, live_pairs = MergedValues(terms, scales, x.shape[0], x), LivePairs()
    for stage in stages(terms):
        stage_terms, stage_operands = resolved(terms, operands, stage, state.values())
        count = num_rows(stage_terms)
        anchor_values = torch.stack(list(stage_operands.vectors)) if stage_operands.vectors else None
        for number, chunk in enumerate(chunked.ref_source.chunks(x, y, anchor_values)):
            n = x[chunk.anchors].shape[0]
            if n and chunk.labels.shape[0]:
                problem, chunk_operands = chunked.problem(x, chunk), chunked.chunk_operands(stage_operands, chunk)
                values, winner, live = chunked.forward(problem, stage_terms, chunk_operands, keep)
                if live is not None:  # only one stage has any, see screened.unsupported_reasons
                    live_pairs[number] = live
            else:
                empty = MergedValues(stage_terms, stage_operands.scales, n + chunk.labels.shape[0] * chunk.two_sided, x)
                values, winner = empty.values(), empty.winner
            state.merge(stage, chunk.anchors, values[:, :n], None if winner is None else winner[:, :n])
            if not chunk.two_sided:
                continue
            out = values[:, n:]
            out = out if winner is None else torch.cat([out, as_numbers(winner[:, n:], values.dtype)])
            for anchors, numbers, _ in chunked.ref_source.send(chunk, out, None):
                assert numbers is not None
                state.merge(stage, anchors, numbers[:count], None if winner is None else as_integers(numbers[count:]))
    return state.values(), state.winner, live_pairs


class _Backward:
    """Backward over all chunks: the parts of the call that it needs, and the gradients so far.

    Args:
        chunked: the call and the source of references.
        x: (N, D), the sorted anchors.
        y: (m, D), the sorted references of this process, or None.
        scale: (K,), the scales, if any of them is a tensor.
        vectors: the vectors of the call.
        kept: what forward returned (values, winners and live pairs), and the gradient of the row values (K, N).

    Attributes:
        term_numbers: the terms that give gradients.
        terms: these terms, with windows that vectors bound.
        grads: (k, N), the gradients of their values.
        offsets: the index of the term in `terms` and the role, for each of the V vectors that get a gradient.
        dx: (N, D), the gradient of x.
        dy: (m, D), the gradient of y, or None.
        dscale: (K,), the gradient of the scales, or None.
        doffset: (V, N), the gradients of vectors.
    """

    def __init__(
        self, chunked: ChunkedCall, x: Tensor, y: Tensor | None, scale: Tensor | None, vectors: Sequence[Tensor],
        kept: Any,
    ) -> None:  # fmt: skip
        values, winner, self.live_pairs, g = kept
        all_terms = chunked.call.terms
        self.term_numbers = [k for k, t in enumerate(all_terms) if t.weighted or t.indexed]
        operands = Operands(scale, chunked.call.scales, vectors)
        self.terms, self.operands = resolved(all_terms, operands, self.term_numbers, values)
        top = tops(all_terms)
        rows = self.term_numbers + [top[k] + more for k in self.term_numbers if top[k] >= 0 for more in (0, 1)]
        self.chunked, self.x, self.y, self.values, self.grads = chunked, x, y, values[rows], g[self.term_numbers]
        self.winner = winner[self.term_numbers] if winner is not None and any(t.indexed for t in self.terms) else None
        roles = chunked.call.vector_roles
        self.offsets = [
            (j, role) for j, k in enumerate(self.term_numbers) for role in (OFFSET, REF_OFFSET) if (k, role) in roles
        ]
        wide = accumulator(x.dtype)
        self.dx = torch.zeros_like(x, dtype=wide)
        self.dy = None if y is None else torch.zeros_like(y, dtype=wide)
        self.dscale = None if scale is None else torch.zeros_like(scale)
        self.doffset = self.values.new_zeros(len(self.offsets), x.shape[0])

    def anchor_values(self) -> Tensor:
        """What two-sided chunks need of these anchors elsewhere: vectors, values, gradients and winners (V, N)."""
        rows = [*(row[None] for row in self.operands.vectors), self.values, self.grads]
        return torch.cat(rows if self.winner is None else [*rows, as_numbers(self.winner, self.values.dtype)])

    def run(self) -> None:
        """Goes through all chunks, and adds up all gradients."""
        ref_source = self.chunked.ref_source
        for number, chunk in enumerate(ref_source.chunks(self.x, self.y, self.anchor_values())):
            numbers, grad = self._chunk_backward(chunk, self.live_pairs.get(number))
            if chunk.two_sided or chunk.needs_grad:
                self._add(ref_source.send(chunk, numbers, grad))
        self._add(ref_source.flush())

    def _add(self, received: Sequence[Received]) -> None:
        """Adds gradients that other processes computed."""
        for rows, numbers, grad in received:
            if numbers is not None:
                self.doffset[:, rows] += numbers
            if grad is not None:
                (self.dx if self.dy is None else self.dy)[rows] += grad

    def _chunk_backward(self, chunk: Chunk, live: tiled.Kept | None) -> tuple[Tensor | None, Tensor | None]:
        """Adds the gradients of a chunk's anchors.

        Returns:
            The gradients for `ReferenceSource.send`: of the vectors of a two-sided chunk's references (V, M) or None,
            and of the references (M, D) or None.
        """
        anchors, m = chunk.anchors, chunk.labels.shape[0]
        n, v, k = self.x[anchors].shape[0], len(self.operands.vectors), len(self.term_numbers)
        r = v + self.values.shape[0]
        if not n or not m:
            return (self.doffset.new_zeros(len(self.offsets), m) if chunk.two_sided and self.offsets else None,
                    self.dx.new_zeros(m, self.x.shape[1]))  # fmt: skip
        values, grads = self.values[:, anchors], self.grads[:, anchors]
        winner = None if self.winner is None else self.winner[:, anchors]
        if chunk.two_sided:  # anchor_values holds what `anchor_values` of the other process returned
            assert chunk.anchor_values is not None
            values = torch.cat([values, chunk.anchor_values[v:r]], 1)
            grads = torch.cat([grads, chunk.anchor_values[r : r + k]], 1)
            winner = None if winner is None else torch.cat([winner, as_integers(chunk.anchor_values[r + k :])], 1)
        need_vectors = [any(role == kind for _, role in self.offsets) for kind in (OFFSET, REF_OFFSET)]
        gradients = self.chunked.backward(
            self.chunked.problem(self.x, chunk), self.terms, self.chunked.chunk_operands(self.operands, chunk),
            values.contiguous(), winner, grads,
            [True, chunk.needs_grad and not chunk.two_sided, self.dscale is not None, *need_vectors], live,
        )  # fmt: skip
        assert gradients.x is not None
        self.dx[anchors] += gradients.x[:n]
        if self.dscale is not None and gradients.scale is not None:
            self.dscale[self.term_numbers] += gradients.scale.to(self.dscale.dtype)
        numbers = None
        if self.offsets:
            of_role = {OFFSET: gradients.offset, REF_OFFSET: gradients.ref_offset}
            numbers = torch.stack([of_role[role][j] for j, role in self.offsets])  # type: ignore[index]
            self.doffset[:, anchors] += numbers[:, :n]
        if not chunk.two_sided:
            return None, gradients.y
        return None if numbers is None else numbers[:, n:], gradients.x[n:]

    def by_vector(self) -> list[Tensor | None]:
        """The gradient (N,) of each vector of the call; None for a vector without one."""
        by_role = {(self.term_numbers[j], role): row for (j, role), row in zip(self.offsets, self.doffset, strict=True)}
        return [by_role.get(role) for role in self.chunked.call.vector_roles]


class ChunkedRowReduce(torch.autograd.Function):
    """`RowReduce` over the chunks of a source; it returns the row values (K, N). Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, chunked: ChunkedCall, x: Tensor, y: Tensor | None, scale: Tensor | None, *vectors: Tensor
    ) -> Tensor:
        terms = chunked.call.terms
        operands = Operands(scale, chunked.call.scales, vectors)
        values, winner, ctx.live_pairs = reduce_chunks(chunked, x, y, terms, operands, any(ctx.needs_input_grad))
        ctx.chunked = chunked
        ctx.save_for_backward(x, y, scale, values, winner, *vectors)
        return values[: len(terms)].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        x, y, scale, values, winner, *vectors = ctx.saved_tensors
        gradients = _Backward(ctx.chunked, x, y, scale, vectors, (values, winner, ctx.live_pairs, g))
        if gradients.term_numbers:
            gradients.run()
        dy = None if y is None or gradients.dy is None else gradients.dy.to(y.dtype)
        return None, gradients.dx.to(x.dtype), dy, gradients.dscale, *gradients.by_vector()
