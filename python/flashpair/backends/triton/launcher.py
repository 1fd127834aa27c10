"""What `fused` and `tiled` share: one problem's tiles and constants, and the launches of its Triton kernels.

A launch runs on the tensors' device and its current stream, and nothing here reads a tensor on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...core.problem import (
    COUNT,
    LOGSUMEXP,
    MAX,
    MIN,
    POSITIVES,
    SUM,
    Operands,
    Problem,
    Term,
    Terms,
    accumulator,
    tops,
)
from ...core.reduction import TRANSFORMS
from ...core.transforms import custom
from . import codegen
from .kernels import configs, gradient, reduce, rows, tile, transforms
from .kernels.gradient import Weighed
from .kernels.reduce import Reduced

FINISH_ROWS = 256
LIST_STEP = 256
TILES_PER_SPLIT = 4
TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}
SPREAD = {
    torch.float32: 60.0,
    torch.float64: 600.0,
}  # of logsumexps, within which e^(their difference) is a safe factor
EXACT = 8.0  # of which the same factor's rounding is none to speak of
Lists = dict[int, tuple[Tensor, Tensor]]  # `Work.list_live`'s, by the columns of a tile
MAPPED, NOTHING, UNRANKED = tile.MAPPED.value, tile.NOTHING.value, reduce.UNRANKED.value
LOG2E = tile.LOG2E.value
ALIGNMENT = 16  # bytes, and elements: where a tensor's memory begins, or a row's, for one kernel to serve every N


def padded(count: int) -> int:
    """The least multiple of ALIGNMENT that is `count` or more: rows of so many all begin alike."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def aligned(t: Tensor | None) -> Tensor | None:
    """A vector that begins where kernels may load wide. A row of a matrix may not, and they would be compiled anew."""
    return t if t is None or t.data_ptr() % ALIGNMENT == 0 else t.clone()


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def splits(blocks: int, tiles: int, device: torch.device, most: int = 64) -> int:
    """Among how many programs a row block's columns are shared: so many that the last wave of programs is full."""
    found, best = 1, 0.0
    for count in range(1, max(1, min(most, tiles // TILES_PER_SPLIT)) + 1):
        waves = blocks * count / processors(device)
        filled = waves / math.ceil(waves) if waves else 1.0
        if filled > best + 0.05:
            found, best = count, filled
    return found


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply: float32 as torch's own products on a GPU would be, of one tf32 product or exact."""
    if dtype != torch.float32:
        return "ieee"
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9; older words refuse to be mixed
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "split"


def groups(terms: Terms, chosen: Sequence[int]) -> list[tuple[int, ...]]:
    """The terms, two a launch; one of positives rides along with one of other sides only where that is alone. One whose
    transform is generated from steps, which take registers, is launched by itself."""
    alone = [(k,) for k in chosen if in_steps(terms[k])]
    band = [k for k in chosen if terms[k].side == POSITIVES and not in_steps(terms[k])]
    rest = [k for k in chosen if terms[k].side != POSITIVES and not in_steps(terms[k])]
    found: list[tuple[int, ...]]
    found = [tuple(rest[k : k + 2]) for k in range(0, len(rest), 2)]
    if found and len(found[-1]) == 1 and band:
        found[-1] += (band.pop(0),)
    return alone + found + [tuple(band[k : k + 2]) for k in range(0, len(band), 2)]


def in_steps(t: Term) -> bool:
    """Whether a term's transform is generated from steps."""
    return TRANSFORMS[t.transform] not in transforms.table


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, warps: int, stages: int, **more: Any
) -> Any:
    """Launches, on `device` and its current stream; what was compiled comes back, None where nothing was."""
    if 0 in grid:
        return None
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **more}
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return kernel[grid](*args, **options)
    return kernel[grid](*args, **options)


def at_most(registers: int) -> dict[str, int]:
    """What a launch is told of the registers that a thread may have; 0: nothing."""
    return {"maxnreg": registers} if registers else {}


class Side(NamedTuple):
    """Who owns the rows of a launch: anchors, references, or both ends of a square problem."""

    x: Tensor
    y: Tensor
    lo: Tensor  # each row's interval of positives among the columns
    hi: Tensor
    row_end: Tensor | None
    col_end: Tensor | None
    row_squares: Tensor | None
    col_squares: Tensor | None
    anchor: bool
    reference: bool


class Block(NamedTuple):
    """Rows and columns of a launch; `given`: their products, read with these strides, instead of embeddings."""

    row0: int
    row1: int
    col0: int
    col1: int
    given: Tensor | None = None
    strides: tuple[int, int] = (0, 0)


class Work:
    """One problem on one device: its configuration and its launches."""

    def __init__(self, p: Problem, terms: Terms, operands: Operands) -> None:
        p.refuse_groups("schedules of the GPU take")
        self.p, self.terms, self.operands, self.tops = p, terms, operands, tops(terms)
        self.n, self.d = p.x.shape
        self.m = p.refs.shape[0]
        self.device, self.dtype = p.x.device, accumulator(p.x.dtype)
        self.config = configs.choose(configs.family(self.device), p.x.dtype, self.d)
        if p.distance != "dot":
            self.config = configs.of_distances(self.config)
        c = self.config
        self.slabs = -(-self.d // c.slab)
        self.squares = p.row_and_ref_squares()
        self._around: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.constants = {
            "SQUARED": p.distance == "squared_euclidean",
            "PRECISION": precision(p.x.dtype),
            "ONE_CHUNK": self.d <= min(c.depth, c.slab) and c.depth == c.slab, "EVEN_D": self.d % c.depth == 0,
            "BLOCK_ROWS": c.rows, "BLOCK_COLS": c.cols, "BLOCK_K": c.depth, "ACC": TRITON[self.dtype],
        }  # fmt: skip

    @property
    def square(self) -> bool:
        return self.p.y is None

    def anchors(self) -> Side:
        p = self.p
        return Side(p.x, p.refs, p.lo, p.hi, None, p.end, *self.squares, True, self.square)

    def references(self) -> Side:
        """References as rows: reference j is a positive of the anchors [lo_j, hi_j)."""
        p = self.p
        column = torch.arange(self.m, device=self.device)
        lo, hi = torch.searchsorted(p.hi, column, right=True), torch.searchsorted(p.lo, column, right=True)
        return Side(p.refs, p.x, lo, hi, p.end, None, *self.squares[::-1], False, True)

    @property
    def narrow(self) -> int:
        """Columns of a tile where there is more to compute of a pair, which takes more registers."""
        return max(16, self.config.cols // (2 if self.p.distance == "dot" else 4))

    def blocks(self, rows: int) -> int:
        return -(-rows // self.config.rows)

    def tiles(self, cols: int) -> int:
        return -(-cols // self.config.cols)

    def bounds(self, k: int, values: Tensor) -> dict[str, Tensor | None]:
        """The vectors of a term's window, given or from the values of the reductions that bound it."""
        t = self.terms[k]
        lower, upper = (self.operands.vector(slot) for slot in t.slots[2:])
        if t.lower_of >= 0:
            lower = values[t.lower_of] + t.lower_shift
        if t.upper_of >= 0:
            upper = values[t.upper_of] + t.upper_shift
        return {"lower": aligned(lower), "upper": aligned(upper)}

    def shared(self, k: int, values: Tensor) -> dict[str, Tensor | None]:
        t = self.terms[k]
        scale = None if self.operands.scale is None or t.op in (MIN, MAX, COUNT) else self.operands.scale[k]
        offset, ref_offset = (self.operands.vector(slot) for slot in t.slots[:2])
        if offset is None and t.shift:
            offset = values.new_full((self.n,), t.shift)
        offsets = {"offset": aligned(offset), "ref_offset": aligned(ref_offset)}
        return {"scale": scale, **offsets, **self.bounds(k, values)}

    def scales(self, group: Sequence[int]) -> list[float]:
        return [float(self.operands.scales[k]) for k in group] + [1.0] * (2 - len(group))

    def _forms(self, group: Sequence[int], what: int) -> list[Any]:
        found: list[Any] = []
        for k in group:
            t = self.terms[k]
            found += [MAPPED if t.transformed else t.op, t.side, phi(t)[what]]
        return found if len(group) == 2 else [*found, NOTHING, POSITIVES, phi(None)[what]]

    def reduce(
        self,
        group: Sequence[int],
        state: Sequence[Reduced],
        side: Side,
        block: Block,
        count: int,
        *,
        lists: Lists | None = None,
        carry: bool = False,
    ) -> None:
        """Folds a block's pairs into the state of one or two terms, its columns shared by `count` programs."""
        c, live = self.config, state[0].live if state[0].live is not None else state[-1].live
        states = state if len(state) == 2 else [*state, Reduced()]
        band_only = all(self.terms[k].side == POSITIVES for k in group)
        constants = dict(self.constants)
        if live is None and (self.p.distance != "dot" or any(s.ref_offset is not None for s in state)):
            constants["BLOCK_COLS"] = self.narrow
        listed, counts = (lists or {}).get(constants["BLOCK_COLS"], (None, None))
        run(
            reduce.reduce_rows, (self.blocks(block.row1 - block.row0), count), self.device,
            side.x, side.y, self.d, block.given, *block.strides, side.row_squares, side.col_squares,
            side.lo, side.hi, side.col_end, listed, counts, self.p.order,
            block.row0, block.row1, block.col0, block.col1, self.n, 0 if live is None else live.shape[-1],
            0 if listed is None else listed.shape[1], *self.scales(group), *states, *self._forms(group, 0),
            SQUARE=self.square, BAND_ONLY=band_only, CARRY=carry, **constants,
            warps=c.forward[0], stages=c.forward[1], **at_most(c.registers[0]),
        )  # fmt: skip

    def finish(self, k: int, state: Reduced, poison: Tensor, values: Tensor, index: Tensor | None) -> None:
        """The rows of `values` that are a term's, from its state."""
        t, count = self.terms[k], (state.total if state.peak is None else state.peak).shape[0]
        run(
            reduce.finish, (-(-self.n // FINISH_ROWS),), self.device, state.peak, state.total, poison, values[k],
            *self.relative(k, values), index, self.n, count, float(self.operands.scales[k]), state.scale,
            OP=MAPPED if t.transformed else t.op, BLOCK=FINISH_ROWS, ACC=TRITON[self.dtype], warps=4, stages=1,
        )  # fmt: skip

    def finish_all(
        self, group: Sequence[int], states: Sequence[Reduced], poison: Tensor, values: Tensor,
        index: dict[int, Tensor | None], riders: dict[int, int],
    ) -> None:  # fmt: skip
        """Of some terms, and of those that ride with them."""
        for k, state in zip(group, states, strict=True):
            self.finish(k, state, poison, values, index[k])
            for rider in (other for other, leader in riders.items() if leader == k):
                self.finish(rider, Reduced(peak=state.peak), poison, values, None)

    def relative(self, k: int, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The top and rest (N,) of a logsumexp."""
        at = self.tops[k]
        return (None, None) if at < 0 else (values[at], values[at + 1])

    def reduce_all(
        self, group: Sequence[int], count: int, poison: Tensor, values: Tensor, index: dict[int, Tensor | None],
        live: dict[int, Tensor], riders: dict[int, int],
    ) -> None:  # fmt: skip
        """Values and indices of one or two terms, and their riders, over all pairs, from the embeddings."""
        states = [self.state(k, count, index[k] is not None, values, live.get(k)) for k in group]
        self.reduce(group, states, self.anchors(), Block(0, self.n, 0, self.m), count)
        self.finish_all(group, states, poison, values, index, riders)

    def state(self, k: int, count: int, indexed: bool, values: Tensor, live: Tensor | None = None) -> Reduced:
        """Empty tensors for the state of a term; `indexed`: with the place of a min's or max's extreme."""
        op, shape = self.terms[k].op, (count, self.n)
        peak = None if op in (SUM, COUNT) else torch.empty(shape, dtype=self.dtype, device=self.device)
        total = None
        if op not in (MIN, MAX):
            total = torch.empty(shape, dtype=self.dtype, device=self.device)
        elif indexed:
            total = torch.empty(shape, dtype=torch.int32, device=self.device)
        return Reduced(**self.shared(k, values), peak=peak, total=total, live=live)

    def clear(self, state: Reduced) -> None:
        """The empty state that launches with `carry` add to."""
        if state.peak is not None:
            state.peak.fill_(-torch.inf)
        if state.total is not None:
            state.total.fill_(UNRANKED if state.total.dtype == torch.int32 else 0)

    def weigh(
        self, group: Sequence[int], slots: Sequence[Weighed], side: Side, block: Block, poison: Tensor, *,
        dx: Tensor | None = None, count: int = 1, lists: Lists | None = None, carry: bool = False,
        weights: Tensor | None = None, weight_strides: tuple[int, int] = (0, 0), pull: Tensor | None = None,
        close_dx: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Gradients of a block's rows through one or two terms; see `weigh_rows`."""
        near, kernels = None, [(1, slots)]
        if dx is not None and self.p.distance != "dot":
            close_dx = dx
        if side.anchor and side.reference and self.n:
            around, near = self._around_tops(group, slots)
            kernels = [(1, around)] if near is None else [(1, around), (0, slots)]
        for wanted, own in kernels:
            c, constants = self.config, dict(self.constants)
            # one function a pair for each end, or one of many steps; or distances, some of which are taken twice
            if (
                not wanted
                or self.p.distance != "dot"
                or any(s.ref_offset is not None for s in own)
                or any(in_steps(self.terms[k]) for k in group)
            ):
                constants["BLOCK_COLS"] = self.narrow
            listed, counts = (lists or {}).get(constants["BLOCK_COLS"], (None, None))
            operands = own if len(own) == 2 else [*own, Weighed()]
            run(
                gradient.weigh_rows,
                (self.blocks(block.row1 - block.row0), count, 1 if dx is None else self.slabs), self.device,
                side.x, side.y, self.d, block.given, *block.strides, weights, *weight_strides,
                side.row_squares, side.col_squares, side.lo, side.hi, side.row_end, side.col_end,
                listed, counts, near, poison, dx, close_dx, pull, block.row0, block.row1, block.col0, block.col1,
                self.n, self.m, 0 if listed is None else listed.shape[1], *self.scales(group), *operands,
                *self._forms(group, 1), ANCHOR=side.anchor, REFERENCE=side.reference, SQUARE=self.square,
                BAND_ONLY=all(self.terms[k].side == POSITIVES for k in group), CARRY=carry, WANTED=wanted,
                BLOCK_D=c.slab, EVEN_SLAB=self.d % c.slab == 0, **constants,
                warps=c.backward[0], stages=c.backward[1], **at_most(c.registers[1]),
            )  # fmt: skip

    def _around_tops(self, group: Sequence[int], slots: Sequence[Weighed]) -> tuple[Sequence[Weighed], Tensor | None]:
        """Operands with which one exponential, relative to the largest term of all rows, serves both ends of a pair;
        and whether every row's sum is near enough to it for that. Which of the two kernels has work is decided on the
        device."""
        near, found = None, list(slots)
        for place, (k, s) in enumerate(zip(group, slots, strict=True)):
            if self.terms[k].op != LOGSUMEXP or self.terms[k].transformed:
                continue
            if k not in self._around:
                self._around[k] = self._one_for_all(k, s)
            around, factor, close = self._around[k]
            near = close if near is None else near & close
            found[place] = s._replace(around=around, grad=factor, top=None, rest=None)
        return found, near

    def _one_for_all(self, k: int, s: Weighed) -> tuple[Tensor, Tensor, Tensor]:
        """A z that no row's terms are larger than, (); what each row's weights relative to it are multiplied by, (N,);
        and whether that is exact enough, () int8.

        A difference in the exponent is rounded by itself, which counts for nothing beside how similarities themselves
        are rounded, where a row's largest term is as large.
        """
        scale = s.top.new_full((), float(self.operands.scales[k])) if s.scale is None else s.scale
        sign, some = torch.where(scale < 0, -1.0, 1.0), s.rest < torch.inf
        around = torch.where(some, s.top * sign, -torch.inf).amax() * sign
        around = torch.where(around.isinf(), 0.0, around)
        gap = torch.where(some, (around - s.top) * scale - s.rest, 0.0)
        most = (EXACT + 2 * (s.top * scale).abs()).clamp_max(SPREAD[self.dtype])
        # As the kernel rounds the other half of the exponent.
        factor = torch.exp2((around - s.top) * (scale * LOG2E) - s.rest * LOG2E)
        return around, torch.where(some, s.grad * factor, 0.0), (gap <= most).all().to(torch.int8)

    def list_live(self, live: Tensor, side: Side, width: int | None = None) -> tuple[Tensor, Tensor]:
        """(row blocks, tiles) int32 and (row blocks,) int32: the clean tiles that a side's row blocks must visit.

        live (planes, row blocks, tiles) int8, of tiles of `width` columns if they are not the configuration's.
        """
        rows, cols, width = side.x.shape[0], side.y.shape[0], width or self.config.cols
        listed = torch.empty(self.blocks(rows), -(-cols // width), dtype=torch.int32, device=self.device)
        counts = torch.empty(self.blocks(rows), dtype=torch.int32, device=self.device)
        run(
            gradient.list_live, (self.blocks(rows),), self.device,
            live, side.lo, side.hi, side.col_end, listed, counts, rows, cols, live.shape[1], live.shape[2],
            live.shape[0], listed.shape[1], DIRECT=side.anchor, MIRROR=side.reference,
            BLOCK_ROWS=self.config.rows, BLOCK_COLS=width, STEP=LIST_STEP, warps=4, stages=1,
        )  # fmt: skip
        return listed, counts

    def places(self, ranks: Tensor) -> Tensor:
        """Sorted places (K, N) of references in the caller's order, -1 where there is none."""
        if self.m == 0:
            return ranks
        place = torch.empty_like(self.p.order).scatter_(0, self.p.order, torch.arange(self.m, device=self.device))
        return torch.where(ranks < 0, -1, place[ranks.clamp_min(0)])


def phi(t: Term | None) -> tuple[Any, Any]:
    """The jit functions of a term's transform and of its slope."""
    name = "identity" if t is None or not (t.op == SUM or t.transformed) else TRANSFORMS[t.transform]
    return transforms.table[name] if name in transforms.table else codegen.functions(custom(name))


def weighted(terms: Terms, grads: Iterable[Tensor | None]) -> list[int]:
    return [k for k, (t, g) in enumerate(zip(terms, grads, strict=True)) if t.weighted and g is not None]


def windowed(terms: Terms) -> list[int]:
    """The terms whose windows say which tiles are dead: all that weigh pairs off the band, or none."""
    off_band = [k for k, t in enumerate(terms) if t.weighted and t.side != POSITIVES]
    return off_band if all(terms[k].window for k in off_band) else []


def _row_tiles(x: Tensor) -> dict[str, Any]:
    step = min(1024, configs.power_of_two(x.shape[1]))
    return {"ROWS": 1024 // step, "STEP": step, "ACC": TRITON[accumulator(x.dtype)], "warps": 4, "stages": 1}


def gather_rows(x: Tensor, order: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """x[order] (N, D), normalised if `unit`, and then the reciprocal norms (N,), else (0,)."""
    n, d = x.shape
    wide = accumulator(x.dtype)
    y, inverse = torch.empty_like(x), torch.empty(n if unit else 0, dtype=wide, device=x.device)
    tiles = _row_tiles(x)
    run(
        rows.gather_rows, (-(-n // tiles["ROWS"]),), x.device, x, order, y, inverse, n, d,
        TINY=torch.finfo(wide).tiny ** 0.5, UNIT=unit, **tiles,
    )  # fmt: skip
    return y, inverse


def scatter_rows(g: Tensor, x: Tensor, order: Tensor, inverse: Tensor, unit: bool) -> Tensor:
    """The gradient of `gather_rows` in x."""
    n, d = x.shape
    dx, tiles = torch.empty_like(x), _row_tiles(x)
    grid = (-(-n // tiles["ROWS"]),)
    run(rows.scatter_rows, grid, x.device, g, x, order, inverse, dx, n, d, UNIT=unit, **tiles)
    return dx
