"""Embeddings in label order, normalised if a criterion asks for it: one launch in each direction."""

import triton
import triton.language as tl

from .tile import SIZES


@triton.jit(do_not_specialize=SIZES)
def gather_rows(
    x, order, out, inverse, n, d, TINY: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out (N, D) = x[order] (N, D), over its norm if UNIT, whose reciprocal goes to inverse (N,).

    A norm up to TINY is 0, and its row stays zero; one that is not finite makes the row NaN.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    source = tl.load(order + rows, mask=inside, other=0)[:, None] * d
    target = rows.to(tl.int64)[:, None] * d
    factor = tl.full((ROWS,), 1.0, ACC)
    if UNIT:
        # Added up by column first. A product in the sum across lanes would be fused into it, from one end only: lanes
        # would then hold different sums, and which of them is kept is up to the hardware.
        squares = tl.zeros((ROWS, STEP), ACC)
        for start in range(0, d, STEP):
            column = start + tl.arange(0, STEP)[None, :]
            part = tl.load(x + source + column, mask=inside[:, None] & (column < d), other=0.0).to(ACC)
            squares += part * part
        square = tl.sum(squares, 1)
        # Rounded as the reference's: the fast ones err by a unit more, and a window may open by that.
        norm = tl.sqrt_rn(square) if ACC == tl.float32 else tl.sqrt(square)
        some = tl.where(norm > TINY, norm, 1.0)
        inverse_norm = tl.div_rn(tl.full((ROWS,), 1.0, ACC), some) if ACC == tl.float32 else 1.0 / some
        factor = tl.where(norm - norm == 0.0, inverse_norm, float("nan"))
        factor = tl.where(norm <= TINY, 0.0, factor)
        tl.store(inverse + rows, factor, mask=inside)
    for start in range(0, d, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        here = inside[:, None] & (column < d)
        part = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
        tl.store(out + target + column, part.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=SIZES)
def scatter_rows(
    g, x, order, inverse, dx, n, d, UNIT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx (N, D) from g (N, D), the gradient of `gather_rows`: (g - y <y, g>) / |x| with y = x / |x|, if UNIT."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    source = tl.load(order + rows, mask=inside, other=0)[:, None] * d
    sorted_row = rows.to(tl.int64)[:, None] * d
    factor, along = tl.full((ROWS,), 1.0, ACC), tl.zeros((ROWS,), ACC)
    if UNIT:
        factor = tl.load(inverse + rows, mask=inside, other=0.0)
        products = tl.zeros((ROWS, STEP), ACC)
        for start in range(0, d, STEP):
            column = start + tl.arange(0, STEP)[None, :]
            here = inside[:, None] & (column < d)
            part = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
            products += part * tl.load(g + sorted_row + column, mask=here, other=0.0).to(ACC)
        along = tl.sum(products, 1)
    for start in range(0, d, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        here = inside[:, None] & (column < d)
        part = tl.load(g + sorted_row + column, mask=here, other=0.0).to(ACC)
        if UNIT:
            y = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
            part = (part - y * along[:, None]) * factor[:, None]
        tl.store(dx + source + column, part.to(dx.dtype.element_ty), mask=here)
