"""Forward of `tiled`: the running row reductions over the band of positives and over the grid of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pool import in_order
from ..tiling import Tile
from .engine import COUNT, LOGSUMEXP, MAX, MIN, POSITIVES, SUM, Engine, Kept, Problem, Term, address, kept_sizes, listed_term


def forward(problem: Problem, reductions: list[Term], keep: bool) -> tuple[Tensor, Kept]:
    """Values (K, N) of the reductions, in sorted order, without the offset of logsumexp; `keep`: backward will follow."""
    e = Engine(problem)
    n, k, lanes = e.n, len(reductions), e.grid.lanes
    dtype = e.x.dtype
    code = [c for t in reductions for c in (t.op, t.side, t.transform, int(t.detach))]
    windows = [t.window for t in reductions]
    sizes = kept_sizes(n, e.m, e.square, code, windows, keep)
    extremes = sizes[0][0] > 0
    peak = torch.empty(lanes, k, n, dtype=dtype)
    for i, t in enumerate(reductions):
        peak[:, i] = torch.inf if t.op == MIN else -torch.inf
    total = torch.zeros(lanes, k, n, dtype=torch.float64)
    index = torch.full((lanes, *sizes[0]), -1)
    live = Kept(
        index, torch.full(sizes[1], -1, dtype=torch.int32),
        torch.empty(sizes[2], dtype=torch.int32), torch.empty(sizes[3], dtype=dtype),
    )  # fmt: skip
    alone = sum(t.weighted and not e.over_band(t) for t in reductions) == 1
    listed = listed_term(code, windows) if live.live_count.numel() and alone else None

    def passes(chosen: list[int]) -> list[Any]:
        made = []
        for lane in range(lanes):
            p = e.new_pass()
            for i in chosen:
                t = reductions[i]
                wanted = extremes and t.op in (MIN, MAX) and not t.detach
                p.add(
                    t.op, t.side, t.transform, t.scale, address(t.offset), address(t.ref_offset), address(t.lower),
                    address(t.upper), address(peak[lane, i]), address(total[lane, i]),
                    address(index[lane, i]) if wanted else 0, 0, 0, 0, 0, 0,
                )  # fmt: skip
            made.append(p)
        return made

    on_band = [i for i, t in enumerate(reductions) if e.over_band(t)]
    on_grid = [i for i in range(k) if i not in on_band]
    if on_band:
        (band_pass,) = passes(on_band)[:1]

        def visit_band(tile: Tile) -> None:
            z, ld = e.similarities(tile)
            band_pass.reduce(z.data_ptr(), ld, tile[:6])

        in_order(e.band_tiles(), lambda t: (t.row_block,), visit_band, e.workers())
    if on_grid:
        grid_passes = passes(on_grid)
        place = on_grid.index(listed) if listed is not None else 0
        capacity = live.live_entry.shape[1]

        def visit(tile: Tile) -> None:
            z, ld = e.similarities(tile)
            grid_passes[tile.lane].reduce(z.data_ptr(), ld, tile[:6])
            if listed is not None:
                slot = e.grid.slot(tile)
                live.live_count[slot] = grid_passes[tile.lane].list_live(
                    place, z.data_ptr(), ld, tile[:6],
                    live.live_entry[slot].data_ptr(), live.live_z[slot].data_ptr(), capacity,
                )  # fmt: skip

        positives_only = all(reductions[i].side == POSITIVES for i in on_grid)
        in_order(e.tiles(positives_only), _touched_rows, visit, e.workers())
    values, best = merge_lanes(reductions, peak, total, index, problem.order)
    return values, live._replace(index=best)


def _touched_rows(tile: Tile) -> tuple[Any, ...]:
    return ((tile.lane, tile.row_block), (tile.lane, tile.col_block)) if tile.mirror else ((tile.lane, tile.row_block),)


def merge_lanes(
    reductions: list[Term], peak: Tensor, total: Tensor, index: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """States (lanes, K, N) to values (K, N) and the extremes' references (K, N), equal ones to the lowest."""
    values = peak.new_empty(peak.shape[1:])
    best = index[0].clone()
    for i, t in enumerate(reductions):
        if t.op == LOGSUMEXP:
            values[i] = torch.logsumexp(total[:, i].log() + peak[:, i], 0)
        elif t.op in (SUM, COUNT):
            values[i] = total[:, i].sum(0)
        else:
            values[i] = peak[:, i].amin(0) if t.op == MIN else peak[:, i].amax(0)
            if index.numel() and order.numel():
                candidate = (peak[:, i] == values[i]) & (index[:, i] >= 0)
                rank = torch.where(candidate, order[index[:, i].clamp_min(0)], torch.iinfo(torch.int64).max)
                best[i] = index[:, i].gather(0, rank.argmin(0, keepdim=True))[0]
    return values, best
