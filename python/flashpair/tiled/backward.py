"""Backward of `tiled`: each tile's similarities again, their weights, and the products with the embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pool import in_order
from ..tiling import BAND_ROWS, Tile
from .engine import MAX, MIN, POSITIVES, Engine, Kept, Problem, Term, address


class Gradients(NamedTuple):
    """Of x (N, D), y (M, D), scale (K,), offset (K, N) and ref_offset (K, M); None where not wanted."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    ref_offset: Tensor | None


def backward(
    problem: Problem, reductions: list[Term], values: Tensor, kept: Kept, grads: list[Tensor | None], need: list[bool]
) -> Gradients:
    """Gradients from dL/dr (K tensors (N,), None for unused ones); `need`: of x, y, scale, offset, ref_offset."""
    e = Engine(problem)
    n, m, k, lanes = e.n, e.m, len(reductions), e.grid.lanes
    dtype = e.x.dtype
    need_x, need_y, need_scale, need_offset, need_ref_offset = need
    dx = torch.zeros(lanes, n, e.d, dtype=dtype) if need_x else None
    dy = torch.zeros(m, e.d, dtype=dtype) if need_y and not e.square else None
    dscale = torch.zeros(lanes, k, n // BAND_ROWS + 1, dtype=torch.float64) if need_scale else None
    doffset = torch.zeros(lanes, k, n, dtype=dtype) if need_offset else None
    dref_offset = torch.zeros(k, m, dtype=dtype) if need_ref_offset else None
    euclidean = e.squares is not None
    row_pull = torch.zeros(lanes, n, dtype=dtype) if euclidean and need_x else None
    ref_pull = torch.zeros(m, dtype=dtype) if euclidean and dy is not None else None
    active = [i for i, t in enumerate(reductions) if t.weighted and grads[i] is not None]

    def new_pass(chosen: list[int], lane: int) -> Any:
        p = e.new_pass()
        for i in chosen:
            t = reductions[i]
            p.add(
                t.op, t.side, t.transform, t.scale, address(t.offset), address(t.ref_offset), address(t.lower),
                address(t.upper), 0, 0, 0, address(values[i]), address(grads[i]),
                address(None if dscale is None else dscale[lane, i]),
                address(None if doffset is None else doffset[lane, i]),
                address(None if dref_offset is None else dref_offset[i]),
            )  # fmt: skip
        return p

    columns_written = dy is not None or dref_offset is not None

    def touched(tile: Tile) -> tuple[Any, ...]:
        if tile.mirror:
            return (tile.row_block, tile.col_block)
        if columns_written and not e.square:
            return ((tile.lane, tile.row_block), tile.col_block)
        return ((tile.lane, tile.row_block),) if not e.square else (tile.row_block,)

    def spread(tile: Tile, engine_pass: Any) -> None:
        """Recompute the tile, weigh it, and add its products to the gradients."""
        z, ld = e.similarities(tile)
        w = e.buffer("w", tile)
        pulls = address(None if row_pull is None else row_pull[tile.lane])
        other = pulls if tile.mirror else address(ref_pull)
        live = engine_pass.weigh(z.data_ptr(), ld, tile[:6], tile.row_block, w.data_ptr(), pulls, other)
        if not live:
            return
        rows, cols = slice(tile.r0, tile.r0 + tile.rows), slice(tile.c0, tile.c0 + tile.cols)
        if dx is not None:
            dx[tile.lane, rows].addmm_(w, e.y[cols])
            if tile.mirror:
                dx[tile.lane, cols].addmm_(w.T, e.x[rows])
        if dy is not None:
            dy[cols].addmm_(w.T, e.x[rows])

    on_band = [i for i in active if e.over_band(reductions[i])]
    on_grid = [i for i in active if i not in on_band]
    if on_band:
        band_pass = new_pass(on_band, 0)
        workers = 1 if columns_written and not e.square else e.workers()
        in_order(e.band_tiles(), touched, lambda tile: spread(tile, band_pass), workers)
    if on_grid:
        passes = [new_pass(on_grid, lane) for lane in range(lanes)]
        listing = kept.live_count.numel() > 0
        counts = kept.live_count.tolist() if listing else []

        def visit(tile: Tile) -> None:
            slot = e.grid.slot(tile) if listing else -1
            if not listing or counts[slot] < 0:
                spread(tile, passes[tile.lane])
                return
            pulls = address(None if row_pull is None else row_pull[tile.lane])
            lane_x = None if dx is None else dx[tile.lane]
            passes[tile.lane].scatter(
                tile[:6], kept.live_entry[slot].data_ptr(), kept.live_z[slot].data_ptr(), counts[slot],
                tile.row_block, address(e.x), address(e.y), e.d, address(lane_x),
                address(lane_x) if tile.mirror else address(dy), pulls, pulls if tile.mirror else address(ref_pull),
            )  # fmt: skip

        positives_only = all(reductions[i].side == POSITIVES for i in on_grid)
        tiles = e.tiles(positives_only)
        if listing:
            tiles = (t for t in tiles if counts[e.grid.slot(t)] != 0)
        in_order(tiles, touched, visit, e.workers())

    total_x = None if dx is None else dx.sum(0) if lanes > 1 else dx[0]
    pull_x = None if row_pull is None else row_pull.sum(0)
    for i, t in enumerate(reductions):
        if t.op in (MIN, MAX) and not t.detach and grads[i] is not None:
            extreme_gradient(e, t, values[i], kept.index[i], grads[i], total_x, dy, pull_x, ref_pull)
    if total_x is not None and pull_x is not None:
        total_x.addcmul_(pull_x[:, None], e.x)
    if dy is not None and ref_pull is not None:
        dy.addcmul_(ref_pull[:, None], e.y)
    return Gradients(
        total_x, dy,
        None if dscale is None else dscale.sum((0, 2)).to(dtype),
        None if doffset is None else doffset.sum(0),
        dref_offset,
    )  # fmt: skip


def extreme_gradient(
    e: Engine, term: Term, value: Tensor, index: Tensor, grad: Tensor, dx: Tensor | None, dy: Tensor | None,
    pull_x: Tensor | None, pull_y: Tensor | None,
) -> None:
    """A min's or max's gradient goes to the one pair that attained it."""
    found = index >= 0
    at = index.clamp_min(0)
    w = torch.where(found, grad, 0.0)
    if e.squares is not None:
        u = torch.where(value > 0, w / value, 0.0)
        w = -u
        if pull_x is not None:
            pull_x += u
        other = pull_x if e.square else pull_y
        if other is not None:
            other.index_add_(0, at, u)
    if dx is not None:
        dx.addcmul_(w[:, None], e.y[at])
    other = dx if e.square else dy
    if other is not None:
        other.index_add_(0, at, w[:, None] * e.x)
