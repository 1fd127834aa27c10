"""Row reductions against references that come in chunks, of which one at a time is there.

    source ── chunk ──► the schedule's forward or backward of that chunk ──► one state for each anchor

Computes: what one call on all references would, since a row's reductions merge: sums add up, log-sum-exps add up in
logarithms, of extremes the better one stays. Chunks are merged in float64.
Never materialises: more than the chunk that the source has brought. A window bound to another reduction of the call
needs that one's value over all chunks, so each stage of a call goes through all chunks once, and backward once more.
Keeps for backward: the rows' values, and of extremes which reference attained them; of a call that is screened, the
live pairs of each chunk, up to a fixed number a row and reference.
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
    COUNT,
    LOGSUMEXP,
    MAX,
    MIN,
    POSITIVES,
    SUM,
    Gradients,
    Operands,
    Problem,
    Terms,
    accumulator,
    merge_logsumexp,
    num_rows,
    solid,
    stages,
    tops,
)
from ..engine import row_reduce_op
from . import two_sided

LIVE_PAIRS_PER_ROW = 8  # that are kept of a screened chunk, of 8 bytes in float32: fewer than of what is at hand


class _State:
    """The rows' values over the chunks so far, in float64 and in problem.py's rows, and which reference attained them.

    scales: (K,) numbers or tensors (), of each term.
    """

    def __init__(self, terms: Terms, scales: Sequence[float | Tensor] | Tensor, n: int, like: Tensor) -> None:
        start = {LOGSUMEXP: -torch.inf, MAX: -torch.inf, MIN: torch.inf, SUM: 0.0, COUNT: 0.0}
        self.terms, self.scales, self.dtype, self.tops = terms, scales, accumulator(like.dtype), tops(terms)
        self.total = like.new_zeros(num_rows(terms), n, dtype=torch.float64)
        for row, t, top in zip(self.total, terms, self.tops, strict=False):
            row.fill_(start[t.op])
            if top >= 0:
                self.total[top + 1] = torch.inf
        self.winner = None
        if any(t.indexed for t in terms):
            self.winner = torch.full((len(terms), n), NO_REFERENCE, dtype=torch.int64, device=like.device)

    def values(self) -> Tensor:
        return self.total.to(self.dtype)

    def merge(self, which: Sequence[int], own: slice, values: Tensor, winner: Tensor | None) -> None:
        places = tops([self.terms[k] for k in which])
        for place, k in enumerate(which):
            op, mine, new = self.terms[k].op, self.total[k, own], values[place].double()
            if op == LOGSUMEXP:
                rows, new_rows = [k, self.tops[k], self.tops[k] + 1], [place, places[place], places[place] + 1]
                by = 1.0 if self.terms[k].transformed else self.scales[k]
                merged = merge_logsumexp(self.total[rows][:, own], values[new_rows].double(), by)
                for row, part in zip(rows, merged, strict=True):
                    self.total[row, own] = part
            elif op in (SUM, COUNT):
                mine += new
            else:
                if self.winner is not None and winner is not None:
                    best, by = self.winner[k, own], winner[place]
                    better = (new > mine) if op == MAX else (new < mine)
                    best.copy_(torch.where(better | ((new == mine) & (by < best)), by, best))
                mine.copy_((torch.maximum if op == MAX else torch.minimum)(mine, new))


def resolved(terms: Terms, operands: Operands, which: Sequence[int], values: Tensor) -> tuple[Terms, Operands]:
    """Those terms, with windows that are bound to values (K, N) as vectors, and the vectors that they need."""
    vectors: list[Tensor] = []
    resolved_terms = []
    for k in which:
        t, slots = terms[k], []
        bounds = {2: (t.lower_of, t.lower_shift), 3: (t.upper_of, t.upper_shift)}
        for place, slot in enumerate(t.slots):
            of, shift = bounds.get(place, (-1, 0.0))
            vector = values[of] + shift if of >= 0 else operands.vector(slot)
            slots.append(-1 if vector is None else len(vectors))
            vectors += [] if vector is None else [vector]
        resolved_terms.append(t._replace(lower_of=-1, upper_of=-1, slots=tuple(slots)))
    scale = None if operands.scale is None else torch.stack([operands.scale[k] for k in which])
    return tuple(resolved_terms), Operands(scale, [operands.scales[k] for k in which], vectors)


class ChunkedCall(NamedTuple):
    """A call and the source of its references."""

    ref_source: ReferenceSource
    call: Call

    def problem(self, x: Tensor, chunk: Chunk) -> Problem:
        """The chunk against its anchors; with `two_sided` the anchors come first, see two_sided.py."""
        labels, order, own = self.ref_source.labels[chunk.own], self.ref_source.order[chunk.own], x[chunk.own]
        lo = torch.searchsorted(chunk.labels, labels)
        hi = torch.searchsorted(chunk.labels, labels, right=True)
        if not chunk.two_sided or chunk.y is None:
            return Problem(own, chunk.y, lo, hi, chunk.end, chunk.order, self.call.distance)
        n = own.shape[0]
        back = torch.searchsorted(labels, chunk.labels), torch.searchsorted(labels, chunk.labels, right=True)
        rows, order = torch.cat([own, chunk.y]), torch.cat([order, chunk.order])
        lo, hi = torch.cat([lo + n, back[0]]), torch.cat([hi + n, back[1]])
        return Problem(rows, None, lo, hi, None, order, self.call.distance, n)

    def chunk_operands(self, operands: Operands, chunk: Chunk) -> Operands:
        """The operands of the chunk's anchors, followed with `two_sided` by those of its other ones."""
        vectors = [v[chunk.own].contiguous() for v in operands.vectors]
        if chunk.two_sided and chunk.anchor_values is not None:
            vectors = [torch.cat(pair) for pair in zip(vectors, chunk.anchor_values, strict=False)]
        return Operands(operands.scale, operands.scales, vectors)

    def screens(self, p: Problem, terms: Terms) -> bool:
        """Whether a chunk of a call that may be screened is: `terms` are those of one stage."""
        some = self.call.backend == "screened" and not p.split and any(t.side != POSITIVES for t in terms)
        return some and screened.worthwhile(p.x, p.refs.shape[0])

    def schedule(self, p: Problem) -> Any:
        return tiled if self.call.backend == "screened" else row_reduce_op.schedule_of(self.call.backend, p.x.device)

    def forward(
        self, p: Problem, terms: Terms, operands: Operands, lists: bool
    ) -> tuple[Tensor, Tensor | None, tiled.Kept | None]:
        """Values (K, N), and which references attained extremes (K, N), by their place among all; where it is screened
        and `lists` are wanted, the live pairs."""
        keep, live = any(t.indexed for t in terms), None
        if self.screens(p, terms):
            lists = lists and any(t.weighted and t.side != POSITIVES for t in terms)
            values, lists_of_tiles = screened.forward(p, terms, operands, keep or lists)
            places = lists_of_tiles.extreme
            if lists:
                slots = max(lists_of_tiles.live_count.shape[0], 1)
                live = lists_of_tiles.trimmed(LIVE_PAIRS_PER_ROW * sum(map(len, (p.x, p.refs))) // slots)
        elif p.split:
            values, places = two_sided.forward(self.call.backend, p, terms, operands, keep)
        else:
            own = (
                p._replace(order=two_sided.ranks(p.order)) if keep and not two_sided.joined(self.call.backend, p) else p
            )
            values, kept = self.schedule(p).forward(own, terms, operands, keep)
            places = kept[0]
        if not keep:
            return values, None, live
        return values, torch.where(places < 0, NO_REFERENCE, p.order[places.clamp_min(0)]), live

    def backward(
        self, p: Problem, terms: Terms, operands: Operands, values: Tensor, winner: Tensor | None, grads: Tensor,
        need: Sequence[bool], live: tiled.Kept | None,
    ) -> Gradients:  # fmt: skip
        places = None if winner is None else places_of(winner, p.order)
        rows = [solid(row) for row in grads]
        if p.split:
            if places is not None:  # the own group's rows are no references here
                second = torch.arange(places.shape[1], device=places.device) >= p.split
                places = torch.where((places >= p.split) == second, -1, places)
            return two_sided.backward(self.call.backend, p, terms, operands, values, places, rows, need)
        module = self.schedule(p)
        kept = two_sided.kept_of(module, p, terms, places)
        if live is not None:  # in which positives are not listed
            listed = [kept[0], *live[1:]]
            sides = [[g if (t.side == POSITIVES) == own else None for g, t in zip(rows, terms, strict=True)]
                     for own in (True, False)]  # fmt: skip
            band = module.backward(p, terms, operands, values, kept, sides[0], need)
            rest = module.backward(p, terms, operands, values, listed, sides[1], need)
            return Gradients(*(None if a is None else a + b for a, b in zip(band, rest, strict=True)))
        gradients: Gradients = module.backward(p, terms, operands, values, kept, rows, need)
        return gradients


Lists = dict[int, tiled.Kept]  # of chunks by their number in the source


def reduce_chunks(
    job: ChunkedCall, x: Tensor, y: Tensor | None, terms: Terms, operands: Operands, keep: bool
) -> tuple[Tensor, Tensor | None, Lists]:
    """Values (K, N) over all chunks, which references attained extremes, and to `keep` what chunks have left alive."""
    scales = operands.scales if operands.scale is None else operands.scale
    state, lists = _State(terms, scales, x.shape[0], x), Lists()
    for stage in stages(terms):
        some, bounded = resolved(terms, operands, stage, state.values())
        count = num_rows(some)
        anchor_values = torch.stack(list(bounded.vectors)) if bounded.vectors else None
        for number, chunk in enumerate(job.ref_source.chunks(x, y, anchor_values)):
            n = x[chunk.own].shape[0]
            if n and chunk.labels.shape[0]:
                values, winner, live = job.forward(
                    job.problem(x, chunk), some, job.chunk_operands(bounded, chunk), keep
                )
                if live is not None:  # of one stage alone, see screened.unsupported_reasons
                    lists[number] = live
            else:
                nothing = _State(some, bounded.scales, n + chunk.labels.shape[0] * chunk.two_sided, x)
                values, winner = nothing.values(), nothing.winner
            state.merge(stage, chunk.own, values[:, :n], None if winner is None else winner[:, :n])
            if not chunk.two_sided:
                continue
            out = values[:, n:]
            out = out if winner is None else torch.cat([out, as_numbers(winner[:, n:], values.dtype)])
            for own, numbers, _ in job.ref_source.send(chunk, out, None):
                assert numbers is not None
                state.merge(stage, own, numbers[:count], None if winner is None else as_integers(numbers[count:]))
    return state.values(), state.winner, lists


class _Backward:
    """One pass of backward over all chunks: what it needs of the call, and the gradients so far."""

    def __init__(
        self, job: ChunkedCall, x: Tensor, y: Tensor | None, scale: Tensor | None, vectors: Sequence[Tensor], kept: Any
    ) -> None:
        values, winner, self.lists, g = kept
        every = job.call.terms
        self.which = [k for k, t in enumerate(every) if t.weighted or t.indexed]
        operands = Operands(scale, job.call.scales, vectors)
        self.terms, self.operands = resolved(every, operands, self.which, values)
        above = tops(every)
        rows = self.which + [above[k] + more for k in self.which if above[k] >= 0 for more in (0, 1)]
        self.job, self.x, self.y, self.values, self.grads = job, x, y, values[rows], g[self.which]
        self.winner = winner[self.which] if winner is not None and any(t.indexed for t in self.terms) else None
        # (term, role) of each vector that wants a gradient
        roles = job.call.vector_roles
        self.offsets = [
            (j, role) for j, k in enumerate(self.which) for role in (OFFSET, REF_OFFSET) if (k, role) in roles
        ]
        wide = accumulator(x.dtype)
        self.dx = torch.zeros_like(x, dtype=wide)
        self.dy = None if y is None else torch.zeros_like(y, dtype=wide)
        self.dscale = None if scale is None else torch.zeros_like(scale)
        self.doffset = self.values.new_zeros(len(self.offsets), x.shape[0])

    def anchor_values(self) -> Tensor:
        """What anchors need where they are references elsewhere: vectors, values, upstream gradients, winners."""
        rows = [*(row[None] for row in self.operands.vectors), self.values, self.grads]
        return torch.cat(rows if self.winner is None else [*rows, as_numbers(self.winner, self.values.dtype)])

    def run(self) -> None:
        ref_source = self.job.ref_source
        for number, chunk in enumerate(ref_source.chunks(self.x, self.y, self.anchor_values())):
            numbers, rows = self._chunk_backward(chunk, self.lists.get(number))
            if chunk.two_sided or chunk.wanted:
                self._add(ref_source.send(chunk, numbers, rows))
        self._add(ref_source.flush())

    def _add(self, received: Sequence[Received]) -> None:
        for own, numbers, rows in received:
            if numbers is not None:
                self.doffset[:, own] += numbers
            if rows is not None:
                (self.dx if self.dy is None else self.dy)[own] += rows

    def _chunk_backward(self, chunk: Chunk, live: tiled.Kept | None) -> tuple[Tensor | None, Tensor | None]:
        """Adds a chunk's part, and returns the part of the chunk's own anchors or references."""
        own, m = chunk.own, chunk.labels.shape[0]
        n, v, k = self.x[own].shape[0], len(self.operands.vectors), len(self.which)
        r = v + self.values.shape[0]
        if not n or not m:
            return (self.doffset.new_zeros(len(self.offsets), m) if chunk.two_sided and self.offsets else None,
                    self.dx.new_zeros(m, self.x.shape[1]))  # fmt: skip
        values, grads = self.values[:, own], self.grads[:, own]
        winner = None if self.winner is None else self.winner[:, own]
        if chunk.two_sided:
            assert chunk.anchor_values is not None
            values = torch.cat([values, chunk.anchor_values[v:r]], 1)
            grads = torch.cat([grads, chunk.anchor_values[r : r + k]], 1)
            winner = None if winner is None else torch.cat([winner, as_integers(chunk.anchor_values[r + k :])], 1)
        wants = [any(role == kind for _, role in self.offsets) for kind in (OFFSET, REF_OFFSET)]
        gradients = self.job.backward(
            self.job.problem(self.x, chunk), self.terms, self.job.chunk_operands(self.operands, chunk),
            values.contiguous(), winner, grads,
            [True, chunk.wanted and not chunk.two_sided, self.dscale is not None, *wants], live,
        )  # fmt: skip
        assert gradients.x is not None
        self.dx[own] += gradients.x[:n]
        if self.dscale is not None and gradients.scale is not None:
            self.dscale[self.which] += gradients.scale.to(self.dscale.dtype)
        numbers = None
        if self.offsets:
            parts = {OFFSET: gradients.offset, REF_OFFSET: gradients.ref_offset}
            numbers = torch.stack([parts[role][j] for j, role in self.offsets])  # type: ignore[index]
            self.doffset[:, own] += numbers[:, :n]
        if not chunk.two_sided:
            return None, gradients.y
        return None if numbers is None else numbers[:, n:], gradients.x[n:]

    def by_vector(self) -> list[Tensor | None]:
        """The gradient of each vector of the call."""
        by_role = {(self.which[j], role): row for (j, role), row in zip(self.offsets, self.doffset, strict=True)}
        return [by_role.get(role) for role in self.job.call.vector_roles]


class ChunkedRowReduce(torch.autograd.Function):
    """RowReduce over the chunks of a source: row values (K, N). Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, job: ChunkedCall, x: Tensor, y: Tensor | None, scale: Tensor | None, *vectors: Tensor
    ) -> Tensor:
        terms = job.call.terms
        operands = Operands(scale, job.call.scales, vectors)
        values, winner, ctx.lists = reduce_chunks(job, x, y, terms, operands, any(ctx.needs_input_grad))
        ctx.job = job
        ctx.save_for_backward(x, y, scale, values, winner, *vectors)
        return values[: len(terms)].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        x, y, scale, values, winner, *vectors = ctx.saved_tensors
        pass_ = _Backward(ctx.job, x, y, scale, vectors, (values, winner, ctx.lists, g))
        if pass_.which:
            pass_.run()
        dy = None if y is None or pass_.dy is None else pass_.dy.to(y.dtype)
        return None, pass_.dx.to(x.dtype), dy, pass_.dscale, *pass_.by_vector()
