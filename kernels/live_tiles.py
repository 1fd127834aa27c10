"""Between the passes: which clean tiles have a pair that a window lets through. Backward visits no others."""

import triton
import triton.language as tl

from .tile import SIZES, load_positives, split_tiles


@triton.jit(do_not_specialize=SIZES)
def list_tiles(
    live, pos_begin, pos_end, num_valid, listed, counts, rows, cols, live_rows, live_stride, planes, list_stride,
    DIRECT: tl.constexpr, MIRROR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """listed (row blocks, tiles) int32: each row block's clean tiles with a live pair, in order; counts: how many.

    live (planes, anchors' row blocks, references' tiles) int8: what `reduce_rows` has left, a plane a reduction.
    DIRECT: the rows are anchors; MIRROR: references, and the tiles are those of their anchors.
    """
    block = tl.program_id(0)
    index = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _begins, _ends, begin, end = load_positives(pos_begin, pos_end, index, index < rows, 0)
    num_cols = cols
    if num_valid is not None:
        num_cols = tl.minimum(tl.load(num_valid).to(tl.int32), cols)
    visit = split_tiles(begin, end, num_cols, 0, 1, BLOCK_COLS, False)
    count = num_cols * 0
    for step in range(0, visit.tail_tile, STEP):
        tile = step + tl.arange(0, STEP)
        inside = tile < visit.tail_tile
        inside = inside & ((tile < visit.first_masked) | (tile >= visit.first_masked + visit.num_masked))
        alive = tl.zeros((STEP,), tl.int32)
        plane = live
        for _ in range(0, planes):
            if DIRECT:
                alive |= tl.load(plane + block.to(tl.int64) * live_stride + tile, mask=inside, other=0).to(tl.int32)
            if MIRROR:
                # A tile of anchors is part of one of their row blocks; a row block, of several tiles of references.
                row = (tile.to(tl.int64) * BLOCK_COLS) // BLOCK_ROWS
                for part in tl.static_range(BLOCK_ROWS // BLOCK_COLS):
                    column = tl.full((STEP,), block * (BLOCK_ROWS // BLOCK_COLS) + part, tl.int64)
                    seen = inside & (column < live_stride)
                    alive |= tl.load(plane + row * live_stride + column, mask=seen, other=0).to(tl.int32)
            plane += tl.full([], live_rows, tl.int64) * live_stride
        at = count + tl.cumsum(alive, 0) - 1
        tl.store(listed + block.to(tl.int64) * list_stride + at, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.store(counts + block, count)
