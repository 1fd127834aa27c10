"""Embeddings in label order, normalised if a criterion asks for it: one launch in each direction.

Computes: y_i = x_perm(i), or x_perm(i) / |x_perm(i)|; and the gradient of that.
Keeps for backward: the reciprocal norms (N,).
Deterministic: a program owns its rows, and each is added up in one order.
"""

import triton
import triton.language as tl

from .tile import SIZES, nan_unless_finite


@triton.jit
def inverse_norm(square, TINY: tl.constexpr, ACC: tl.constexpr):
    """1 / sqrt(square): 0 where that norm is up to TINY, NaN where it is not finite."""
    # Rounded as the reference's: the fast ones err by a unit more, and a window may open by that.
    norm = tl.sqrt_rn(square) if ACC == tl.float32 else tl.sqrt(square)
    some = tl.where(norm > TINY, norm, 1.0)
    inverse = tl.div_rn(tl.full(norm.shape, 1.0, ACC), some) if ACC == tl.float32 else 1.0 / some
    inverse = nan_unless_finite(inverse, norm)
    return tl.where(norm <= TINY, 0.0, inverse)


@triton.jit(do_not_specialize=SIZES)
def gather_rows(
    x, perm, out, inverse, n, d, TINY: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out (N, D) = x[perm] (N, D), if NORMALIZE over its norm, whose reciprocal goes to inverse (N,).

    Grid: (blocks of ROWS). A norm up to TINY is 0, and its row stays zero; one that is not finite makes the row NaN.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    source = tl.load(perm + rows, mask=inside, other=0)[:, None] * d
    target = rows.to(tl.int64)[:, None] * d
    factor = tl.full((ROWS,), 1.0, ACC)
    if NORMALIZE:
        # Added up by column first. A product in the sum across lanes would be fused into it, from one end only: lanes
        # would then hold different sums, and which of them is kept is up to the hardware.
        squares = tl.zeros((ROWS, STEP), ACC)
        for start in range(0, d, STEP):
            column = start + tl.arange(0, STEP)[None, :]
            part = tl.load(x + source + column, mask=inside[:, None] & (column < d), other=0.0).to(ACC)
            squares += part * part
        factor = inverse_norm(tl.sum(squares, 1), TINY, ACC)
        tl.store(inverse + rows, factor, mask=inside)
    for start in range(0, d, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        here = inside[:, None] & (column < d)
        part = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
        tl.store(out + target + column, part.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=SIZES)
def scatter_rows(
    g, x, perm, inverse, dx, n, d, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx (N, D) from g (N, D), the gradient of `gather_rows`: if NORMALIZE, (g - y <y, g>) / |x| with y = x / |x|.

    Grid: (blocks of ROWS).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    source = tl.load(perm + rows, mask=inside, other=0)[:, None] * d
    sorted_row = rows.to(tl.int64)[:, None] * d
    factor, y_dot_g = tl.full((ROWS,), 1.0, ACC), tl.zeros((ROWS,), ACC)
    if NORMALIZE:
        factor = tl.load(inverse + rows, mask=inside, other=0.0)
        products = tl.zeros((ROWS, STEP), ACC)
        for start in range(0, d, STEP):
            column = start + tl.arange(0, STEP)[None, :]
            here = inside[:, None] & (column < d)
            part = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
            products += part * tl.load(g + sorted_row + column, mask=here, other=0.0).to(ACC)
        y_dot_g = tl.sum(products, 1)
    for start in range(0, d, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        here = inside[:, None] & (column < d)
        part = tl.load(g + sorted_row + column, mask=here, other=0.0).to(ACC)
        if NORMALIZE:
            y = tl.load(x + source + column, mask=here, other=0.0).to(ACC) * factor[:, None]
            part = (part - y * y_dot_g[:, None]) * factor[:, None]
        tl.store(dx + source + column, part.to(dx.dtype.element_ty), mask=here)
