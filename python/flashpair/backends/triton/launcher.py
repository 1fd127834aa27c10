"""One problem on one device: the tiles and constants of its kernels, their operands, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...core.problem import COUNT, MAX, MIN, POSITIVES, SUM, Operands, Problem, Terms, accumulator, tops
from . import launch
from .kernels import backward, configs, live_tiles, reduce, state, tile
from .kernels.operands import BackwardOperands, Cols, Form, ForwardOperands, ListedTiles, Matrix, Rows
from .launch import aligned
from .shared_top import SharedTops
from .term_groups import is_generated, transform_functions

MERGE_ROWS = 256
LIST_STEP = 256
NO_RANK = state.NO_RANK.value
NO_PRODUCTS = Matrix()
Listed = dict[int, ListedTiles]  # `Launcher.list_tiles`', by the columns of a tile


class Role(NamedTuple):
    """Who owns the rows of a launch: anchors, references, or both ends of a square problem."""

    rows: Rows
    cols: Cols
    anchor: bool
    reference: bool

    @property
    def num_rows(self) -> int:
        return self.rows.x.shape[0]

    @property
    def num_cols(self) -> int:
        return self.cols.y.shape[0]


class PairBlock(NamedTuple):
    """Rows and columns of a launch, and their products, to be read instead of embeddings."""

    row0: int
    row1: int
    col0: int
    col1: int
    products: Matrix = NO_PRODUCTS


class Launcher:
    """One problem on one device: its configuration and its launches."""

    def __init__(self, p: Problem, terms: Terms, operands: Operands) -> None:
        p.refuse_groups("backends of the GPU take")
        self.p, self.terms, self.operands, self.tops = p, terms, operands, tops(terms)
        self.n, self.d = p.x.shape
        self.m = p.refs.shape[0]
        self.device, self.dtype = p.x.device, accumulator(p.x.dtype)
        self.acc = launch.TRITON[self.dtype]
        self.config = configs.choose(configs.family(self.device), p.x.dtype, self.d)
        if p.distance != "dot":
            self.config = configs.for_distances(self.config)
        self.squares = p.row_and_ref_squares()
        self.shared_tops = SharedTops(terms, operands.scales, self.dtype)
        self._forms: dict[tuple[int, bool], Form] = {}

    # Sizes, and who takes part.

    @property
    def square(self) -> bool:
        return self.p.y is None

    @property
    def euclidean(self) -> bool:
        return self.p.distance != "dot"

    @property
    def squared(self) -> bool:
        return self.p.distance == "squared_euclidean"

    @property
    def narrow(self) -> int:
        """Columns of a tile where there is more to compute of a pair, which takes more registers."""
        return max(16, self.config.cols // (4 if self.euclidean else 2))

    def row_blocks(self, rows: int) -> int:
        return -(-rows // self.config.rows)

    def splits(self, role: Role, most: int = 64) -> int:
        """Among how many programs the columns of a row block are shared."""
        tiles = -(-role.num_cols // self.config.cols)
        return launch.choose_splits(self.row_blocks(role.num_rows), tiles, self.device, most)

    def anchors(self) -> Role:
        p, (squares, ref_squares) = self.p, self.squares
        rows = Rows(p.x, squares, p.lo, p.hi, None)
        return Role(rows, Cols(p.refs, ref_squares, p.end), True, self.square)

    def references(self) -> Role:
        """References as rows: reference j is a positive of the anchors [pos_begin_j, pos_end_j)."""
        p, (squares, ref_squares) = self.p, self.squares
        column = torch.arange(self.m, device=self.device)
        pos_begin = torch.searchsorted(p.hi, column, right=True)
        pos_end = torch.searchsorted(p.lo, column, right=True)
        rows = Rows(p.refs, ref_squares, pos_begin, pos_end, p.end)
        return Role(rows, Cols(p.x, squares, None), False, True)

    # Operands.

    def form(self, cols: int, backward: bool) -> Form:
        """The compile-time constants of a launch with tiles of so many columns."""
        if (cols, backward) not in self._forms:
            c, d = self.config, self.d
            one_chunk = d <= min(c.depth, c.slab) and c.depth == c.slab
            values: list[Any] = [
                self.square, self.squared, launch.precision(self.p.x.dtype), one_chunk, d % c.depth == 0, c.rows, cols,
                c.depth, self.acc, *((c.slab, d % c.slab == 0) if backward else (None, None)),
            ]  # fmt: skip
            self._forms[cols, backward] = Form(*(None if v is None else tl.constexpr(v) for v in values))
        return self._forms[cols, backward]

    def inputs(self, k: int, values: Tensor) -> dict[str, Any]:
        """What both passes read of a term; its window may be bounded by the values of other terms."""
        t, vector = self.terms[k], self.operands.vector
        scale = None if self.operands.scale is None or t.op in (MIN, MAX, COUNT) else self.operands.scale[k]
        offset, ref_offset, lower, upper = (vector(slot) for slot in t.slots)
        if offset is None and t.shift:
            offset = values.new_full((self.n,), t.shift)
        if t.lower_of >= 0:
            lower = values[t.lower_of] + t.lower_shift
        if t.upper_of >= 0:
            upper = values[t.upper_of] + t.upper_shift
        op = tile.TRANSFORMED if t.transformed else tl.constexpr(t.op)
        return {
            "OP": op, "SIDE": tl.constexpr(t.side), "scale": scale, "offset": aligned(offset),
            "ref_offset": aligned(ref_offset), "lower": aligned(lower), "upper": aligned(upper),
        }  # fmt: skip

    def scales(self, group: Sequence[int]) -> list[float]:
        return [float(self.operands.scales[k]) for k in group] + [1.0] * (2 - len(group))

    def forward_operands(
        self, k: int, splits: int, indexed: bool, values: Tensor, live: Tensor | None = None
    ) -> ForwardOperands:
        """A term's, with empty tensors for its state; `indexed`: with the rank of a min's or max's extreme."""
        op, shape = self.terms[k].op, (splits, self.n)
        row_max = None if op in (SUM, COUNT) else torch.empty(shape, dtype=self.dtype, device=self.device)
        row_sum = None if op in (MIN, MAX) else torch.empty(shape, dtype=self.dtype, device=self.device)
        rank = None
        if op in (MIN, MAX) and indexed:
            rank = torch.empty(shape, dtype=torch.int32, device=self.device)
        return ForwardOperands(
            **self.inputs(k, values), PHI=transform_functions(self.terms[k])[0], row_max=row_max, row_sum=row_sum,
            rank=rank, live=live,
        )  # fmt: skip

    def clear(self, state: ForwardOperands) -> None:
        """The empty state that launches with `carry` add to."""
        for t, empty in ((state.row_max, -torch.inf), (state.row_sum, 0), (state.rank, NO_RANK)):
            if t is not None:
                t.fill_(empty)

    def top_and_rest(self, k: int, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where `values` has the top and rest (N,) of a logsumexp."""
        at = self.tops[k]
        return (None, None) if at < 0 else (values[at], values[at + 1])

    # Launches.

    def reduce(
        self, group: Sequence[int], states: Sequence[ForwardOperands], role: Role, block: PairBlock, splits: int, *,
        listed: Listed | None = None, carry: bool = False,
    ) -> None:  # fmt: skip
        """Adds a block's pairs to the states of one or two terms, its columns shared by so many programs."""
        c, live = self.config, states[0].live if states[0].live is not None else states[-1].live
        cols = c.cols
        if live is None and (self.euclidean or any(s.ref_offset is not None for s in states)):
            cols = self.narrow
        tiles = (listed or {}).get(cols, ListedTiles())
        launch.run(
            reduce.reduce_rows, (self.row_blocks(block.row1 - block.row0), splits), self.device,
            role.rows._replace(num_valid=None), role.cols, self.d, block.products, tiles, self.p.order,
            block.row0, block.row1, block.col0, block.col1, self.n, 0 if live is None else live.shape[-1],
            0 if tiles.index is None else tiles.index.shape[1], *self.scales(group),
            pair(states, ForwardOperands()), self.form(cols, False),
            POSITIVES_ONLY=self.positives_only(group), CARRY=carry,
            warps=c.forward[0], stages=c.forward[1], **launch.at_most(c.registers[0]),
        )  # fmt: skip

    def merge(
        self, k: int, state: ForwardOperands, nonfinite: Tensor, values: Tensor, index: Tensor | None
    ) -> None:  # fmt: skip
        """The rows of `values` that are a term's, from the states of all splits."""
        t, splits = self.terms[k], (state.row_sum if state.row_max is None else state.row_max).shape[0]
        launch.run(
            reduce.merge_splits, (-(-self.n // MERGE_ROWS),), self.device,
            state.row_max, state.row_sum, state.rank, nonfinite, values[k], *self.top_and_rest(k, values), index,
            self.n, splits, float(self.operands.scales[k]), state.scale,
            OP=tile.TRANSFORMED.value if t.transformed else t.op, BLOCK=MERGE_ROWS, ACC=self.acc, warps=4, stages=1,
        )  # fmt: skip

    def backward(
        self, group: Sequence[int], reductions: Sequence[BackwardOperands], role: Role, block: PairBlock,
        nonfinite: Tensor, *, dx: Tensor | None = None, splits: int = 1, listed: Listed | None = None,
        carry: bool = False, weights: Matrix = NO_PRODUCTS, norm_grad: Tensor | None = None,
        close_dx: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Gradients of a block's rows through one or two terms; see `backward_rows`."""
        if dx is not None and self.euclidean:
            close_dx = dx
        # Where both ends are rows, one exponential may serve both. Which of the two kernels has work is known on the
        # device alone, so both are launched, and one of them returns at once.
        gate, kernels = None, [(1, reductions)]
        if role.anchor and role.reference and self.n:
            shared, gate = self.shared_tops.apply(group, reductions)
            kernels = [(1, shared)] if gate is None else [(1, shared), (0, reductions)]
        c = self.config
        slabs = 1 if dx is None else -(-self.d // c.slab)
        for wanted, chosen in kernels:
            cols = self.narrow if self._takes_registers(group, chosen) or not wanted else c.cols
            tiles = (listed or {}).get(cols, ListedTiles())
            launch.run(
                backward.backward_rows, (self.row_blocks(block.row1 - block.row0), splits, slabs), self.device,
                role.rows, role.cols, self.d, block.products, weights, tiles, gate, nonfinite, dx, close_dx, norm_grad,
                block.row0, block.row1, block.col0, block.col1, self.n, self.m,
                0 if tiles.index is None else tiles.index.shape[1], *self.scales(group),
                pair(chosen, BackwardOperands()), self.form(cols, True),
                ANCHOR=role.anchor, REFERENCE=role.reference, POSITIVES_ONLY=self.positives_only(group), CARRY=carry,
                WANTED=wanted, warps=c.backward[0], stages=c.backward[1], **launch.at_most(c.registers[1]),
            )  # fmt: skip

    def _takes_registers(self, group: Sequence[int], reductions: Sequence[BackwardOperands]) -> bool:
        """Whether a pair's gradient takes more than one exponential: distances, some of which are taken twice, two
        offsets, or a transform of many steps."""
        two_offsets = any(r.ref_offset is not None for r in reductions)
        return self.euclidean or two_offsets or any(is_generated(self.terms[k]) for k in group)

    def positives_only(self, group: Sequence[int]) -> bool:
        return all(self.terms[k].side == POSITIVES for k in group)

    def list_tiles(self, live: Tensor, role: Role, width: int | None = None) -> ListedTiles:
        """The clean tiles that a role's row blocks must visit.

        live (planes, row blocks, tiles) int8, of tiles of `width` columns if they are not the configuration's.
        """
        rows, cols, width = role.num_rows, role.num_cols, width or self.config.cols
        index = torch.empty(self.row_blocks(rows), -(-cols // width), dtype=torch.int32, device=self.device)
        counts = torch.empty(self.row_blocks(rows), dtype=torch.int32, device=self.device)
        launch.run(
            live_tiles.list_tiles, (self.row_blocks(rows),), self.device,
            live, role.rows.pos_begin, role.rows.pos_end, role.cols.num_valid, index, counts, rows, cols,
            live.shape[1], live.shape[2], live.shape[0], index.shape[1], DIRECT=role.anchor, MIRROR=role.reference,
            BLOCK_ROWS=self.config.rows, BLOCK_COLS=width, STEP=LIST_STEP, warps=4, stages=1,
        )  # fmt: skip
        return ListedTiles(index, counts)

    def places(self, ranks: Tensor) -> Tensor:
        """Sorted places (K, N) of references from their ranks in the caller's order, -1 where there is none."""
        if self.m == 0:
            return ranks
        place = torch.empty_like(self.p.order).scatter_(0, self.p.order, torch.arange(self.m, device=self.device))
        return torch.where(ranks < 0, -1, place[ranks.clamp_min(0)])


def pair(reductions: Sequence[Any], nothing: Any) -> tuple[Any, Any]:
    """The operands of a launch, which are always two."""
    first, second = [*reductions, nothing][:2]
    return first, second
