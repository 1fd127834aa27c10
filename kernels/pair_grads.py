"""Backward: dL/dz of the pairs of a tile through one reduction, and the sums that a row gets of them.

    dL/dz_ij = dL/dr_i phi'(s_ij) [softmax factor] scale,   s = scale * z

from the end of the pair that is its anchor. In a square problem a pair has both of its ends in the same batch, and what
both give to z_ij is added: one product with the embeddings then serves both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .state import total_offset
from .tile import INF, LOG2E, LOGSUMEXP, TRANSFORMED, inside_window, load_vector
from .transforms import logistic


class Anchors(NamedTuple):
    """What a reduction has of a block of anchors, (R,), or broadcast against its pairs."""

    lower: Any
    upper: Any
    offset: Any
    top: Any
    rest2: Any  # rest in base 2; inf where the set was empty
    grad: Any  # dL/dr, 0 where the set was empty


class RowSums(NamedTuple):
    """Each row's part of the gradients of a reduction's own operands, (R,)."""

    d_scale: Any
    d_offset: Any
    d_ref_offset: Any


@triton.jit
def load_anchors(reduction, index, inside, ACC: tl.constexpr):
    lower = load_vector(reduction.lower, index, inside, 0.0, ACC)
    upper = load_vector(reduction.upper, index, inside, 0.0, ACC)
    offset = load_vector(reduction.offset, index, inside, 0.0, ACC)
    grad = load_vector(reduction.grad, index, inside, 0.0, ACC)
    top, rest2 = load_vector(reduction.top, index, inside, 0.0, ACC), tl.zeros(index.shape, ACC)
    if reduction.rest is not None:
        rest2 = tl.load(reduction.rest + index, mask=inside, other=INF) * LOG2E
        grad = tl.where(rest2 == INF, 0.0, grad)
    return Anchors(lower, upper, offset, top, rest2, grad)


@triton.jit
def no_anchors(ROWS: tl.constexpr, ACC: tl.constexpr):
    none = tl.zeros((ROWS,), ACC)
    return Anchors(none, none, none, none, none, none)


@triton.jit
def no_sums(ROWS: tl.constexpr, ACC: tl.constexpr):
    return RowSums(tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC))


@triton.jit
def per_row(a):
    """Anchors (R, 1)."""
    return Anchors(
        a.lower[:, None], a.upper[:, None], a.offset[:, None], a.top[:, None], a.rest2[:, None], a.grad[:, None]
    )  # fmt: skip


@triton.jit
def per_column(a):
    """Anchors (1, C)."""
    return Anchors(
        a.lower[None, :], a.upper[None, :], a.offset[None, :], a.top[None, :], a.rest2[None, :], a.grad[None, :]
    )  # fmt: skip


@triton.jit
def grads_from_anchors(z, keep, reduction, scale, anchors, ref_offset):
    """dL/ds of each pair from its anchor, s = scale * z, and what of it goes to the anchor's own offset."""
    keep = inside_window(z, keep, anchors.lower, anchors.upper, reduction)
    if reduction.OP == LOGSUMEXP:
        # The difference first: it is 0 for the largest term, whatever is multiplied and added at once.
        exponent = (z - anchors.top) * (scale * LOG2E) - anchors.rest2
        grad = tl.where(keep, tl.exp2(exponent) * anchors.grad, 0.0)
        to_offset = grad
    elif reduction.OP == TRANSFORMED:
        phi, by_s, by_offset = reduction.SLOPE(z * scale, anchors.offset)
        weight = tl.where(keep, tl.exp2((phi - anchors.top) * LOG2E - anchors.rest2) * anchors.grad, 0.0)
        grad, to_offset = weight * by_s, weight * by_offset
    else:
        _, by_s, by_offset = reduction.SLOPE(
            z * scale, total_offset(anchors.offset, ref_offset, reduction.ref_offset is not None)
        )  # fmt: skip
        grad, to_offset = tl.where(keep, by_s * anchors.grad, 0.0), tl.where(keep, by_offset * anchors.grad, 0.0)
        if reduction.ref_offset is not None:
            # Of logaddexp(offset, ref_offset) the anchor's share; the reference's is the rest.
            some = (anchors.offset > -INF) | (ref_offset > -INF)
            to_offset *= tl.where(some, logistic(anchors.offset - ref_offset), 0.0)
    return grad, to_offset


@triton.jit
def grads_of_both_ends(z, keep, reduction, scale, shared_top, anchors, columns, sums, ACC: tl.constexpr):
    """dL/ds from both ends at once, where all but a factor of each end depends on the pair alone."""
    d_scale, d_offset, d_ref_offset = sums
    others = load_anchors(reduction, columns.index, columns.valid, ACC)
    from_row = inside_window(z, keep, anchors.lower[:, None], anchors.upper[:, None], reduction)
    from_col = inside_window(z, keep, others.lower[None, :], others.upper[None, :], reduction)
    if reduction.OP == LOGSUMEXP:
        # 0 at most, of a pair that counts from either end; of others it may be anything, and must not become inf * 0.
        shared = tl.exp2(tl.minimum((z - shared_top) * (scale * LOG2E), 1.0))
    else:
        _, by_s, _ = reduction.SLOPE(z * scale, tl.zeros((z.shape[0], z.shape[1]), ACC))
        shared = tl.where(from_row | from_col, by_s, 0.0)
    row_factor = tl.where(from_row, anchors.grad[:, None], 0.0)
    grad = shared * (row_factor + tl.where(from_col, others.grad[None, :], 0.0))
    if reduction.d_scale is not None:
        d_scale += tl.sum(shared * row_factor * z, 1)
    return grad, RowSums(d_scale, d_offset, d_ref_offset)


@triton.jit
def tile_grads(
    z, keep, reduction, scale, shared_top, anchors, ref_offset, columns, sums,
    ANCHOR: tl.constexpr, REFERENCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dz of a tile's pairs through one reduction (R, C), and the rows' sums with the tile added.

    ANCHOR, REFERENCE: the rows are the pairs' anchors, their references, or both. anchors, ref_offset: of the rows.
    """
    one_factor: tl.constexpr = (
        (reduction.shared_top is not None)
        if reduction.OP == LOGSUMEXP
        else ((reduction.OP != TRANSFORMED) and (reduction.offset is None))
    )
    if ANCHOR and REFERENCE and one_factor:
        grad, sums = grads_of_both_ends(z, keep, reduction, scale, shared_top, anchors, columns, sums, ACC)
    else:
        d_scale, d_offset, d_ref_offset = sums
        grad = tl.zeros((z.shape[0], z.shape[1]), ACC)
        if ANCHOR:
            col_ref_offset = load_vector(reduction.ref_offset, columns.index, columns.valid, 0.0, ACC)
            grad, to_offset = grads_from_anchors(
                z, keep, reduction, scale, per_row(anchors), col_ref_offset[None, :]
            )  # fmt: skip
            if reduction.d_scale is not None:
                d_scale += tl.sum(grad * z, 1)
            if reduction.d_offset is not None:
                d_offset += tl.sum(to_offset, 1)
        if REFERENCE:
            others = load_anchors(reduction, columns.index, columns.valid, ACC)
            from_col, to_offset = grads_from_anchors(
                z, keep, reduction, scale, per_column(others), ref_offset[:, None]
            )  # fmt: skip
            if reduction.d_ref_offset is not None:
                d_ref_offset += tl.sum(from_col - to_offset, 1)
            grad += from_col
        sums = RowSums(d_scale, d_offset, d_ref_offset)
    return grad * scale, sums


@triton.jit
def store_sums(reduction, at, ref_at, inside, taking_part, nonfinite, sums, CARRY: tl.constexpr):
    """What a program's rows have of a reduction's operands, (CARRY) added to what earlier launches left there.

    ref_at, taking_part: of the rows as references. nonfinite (): 0 or NaN, added to all.
    """
    d_scale, d_offset, d_ref_offset = sums
    if reduction.d_scale is not None:
        if CARRY:
            d_scale += tl.load(reduction.d_scale + at, mask=inside, other=0.0)
        tl.store(reduction.d_scale + at, d_scale + nonfinite, mask=inside)
    if reduction.d_offset is not None:
        if CARRY:
            d_offset += tl.load(reduction.d_offset + at, mask=inside, other=0.0)
        tl.store(reduction.d_offset + at, d_offset + nonfinite, mask=inside)
    if reduction.d_ref_offset is not None:
        d_ref_offset = tl.where(taking_part, d_ref_offset, 0.0)
        if CARRY:
            d_ref_offset += tl.load(reduction.d_ref_offset + ref_at, mask=inside, other=0.0)
        tl.store(reduction.d_ref_offset + ref_at, d_ref_offset + nonfinite, mask=inside)
