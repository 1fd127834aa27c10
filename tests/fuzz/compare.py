"""Is a result as near to the float64 truth as the dense reference of the same precision is?

    |found - truth| <= 2 x (the reference's own error + one rounding of the largest value), row by row

One evaluation's error may be small by chance, so that the reference's is taken over several inputs that are one
rounding from the case's: every feature is multiplied by 1, 1 + eps or 1 - eps, in all rows alike, so that equal rows
stay equal and ties stay ties; and every other sample has Euclidean distances by products. Where a window or a hinge is
decided within that rounding the samples fall on both sides, and the row's error is as large as the jump; nothing else
is forgiven.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .case import DTYPES, Batch, Case
from .scales import by_products

Results = dict[str, Tensor]
FEW, MANY = 3, 60  # samples: of every case, and of one that fails with few


def working(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == "float64" else torch.float32


def sampled(case: Case, given: Batch, k: int) -> Batch:
    """The inputs in the precision that is computed in, from the second sample on a rounding away."""
    dtype = working(case)
    x, y = given.x.to(dtype), None if given.y is None else given.y.to(dtype)
    if k:
        steps = torch.randint(-1, 2, (x.shape[1],), generator=torch.Generator().manual_seed(k)).to(dtype)
        factor = 1 + steps * torch.finfo(dtype).eps
        x, y = x * factor, None if y is None else y * factor
    return Batch(x, given.labels, y, given.ref_labels)


def as_rows(t: Tensor) -> Tensor:  # (..., D) -> (rows, D); a vector's entries are rows
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(-1, 1)


def _largest(t: Tensor) -> Tensor:
    return t.abs().amax(1) if t.shape[1] else t.new_zeros(t.shape[0])


def worst(
    found: Tensor, truth: Tensor, samples: list[Tensor], dtype: torch.dtype, scale: Tensor | None
) -> tuple[float, str]:
    """The largest share of the bound that a row's error is, with words; infinite where one is finite alone."""
    if found.shape != truth.shape:
        return torch.inf, f"shape {tuple(found.shape)} where it is {tuple(truth.shape)}"
    if found.numel() == 0:
        return 0.0, ""
    f, t = as_rows(found), as_rows(truth)
    s = torch.stack([as_rows(one) for one in samples])
    limit = torch.finfo(dtype)
    kept = t.isfinite() & (t.abs() <= limit.max) & s.isfinite().all(0)  # what the precision can hold
    lost = ~f.isfinite() & kept
    if lost.any():
        return (
            torch.inf,
            f"not finite in row {int(lost.any(1).nonzero()[0])} where the truth is {t[lost][0].item():.3g}",
        )
    swallowed = f.isfinite() & ~t.isfinite() & ~s.isfinite().any(0)
    if swallowed.any():
        return (
            torch.inf,
            f"{f[swallowed][0].item():.3g} in row {int(swallowed.any(1).nonzero()[0])} where the truth is not finite",
        )
    error = _largest(torch.where(kept, f - t, 0.0))
    own = torch.where(kept, s - t, 0.0).abs().amax((0, 2))
    size = _largest(torch.where(kept, t, 0.0))
    size = size.amax().expand_as(size) if scale is None and t.shape[1] > 1 else size
    if scale is not None and scale.shape == size.shape:
        size = torch.maximum(size, scale.nan_to_num(0.0, 0.0, 0.0))
    # A float64 truth has roundings of its own.
    rounding = (2 if dtype == torch.float64 else 1) * limit.eps * size + limit.smallest_normal
    if t.shape[0] > 1 and dtype != torch.float16:  # beside far larger rows an exponential may underflow
        rounding = rounding + limit.eps**2 * size.max()
    usual = (own / size.clamp_min(limit.smallest_normal)).mean() * size  # where a row's own is small by chance
    share = error / (2 * (torch.maximum(own, usual) + rounding))
    row = int(share.argmax())
    words = f"row {row} off by {error[row]:.3g}, the reference by {own[row]:.3g}, of {_largest(t)[row]:.3g}"
    return share[row].item(), words


def failure(case: Case, given: Batch, found: Results, truth: Results, sample: Callable[[Batch], Results]) -> str:
    """Empty, or which of the results is worse than it may be, and by how much."""

    def samples_of(numbers: range) -> list[Results]:
        some = []
        for k in numbers:
            with by_products() if k % 2 else contextlib.nullcontext():
                some.append(sample(sampled(case, given, k)))
        return some

    samples = samples_of(range(FEW))
    words = _failure(case, given, found, truth, samples)
    if words:
        samples += samples_of(range(FEW, MANY))
        words = _failure(case, given, found, truth, samples)
    return words


def _failure(case: Case, given: Batch, found: Results, truth: Results, samples: list[Results]) -> str:
    if not (given.x.isfinite().all() and (given.y is None or given.y.isfinite().all())):
        return "" if found["loss"].isnan().all() else "loss: a finite number of embeddings that are not finite"
    for name, t in truth.items():
        if name.startswith("scale"):
            continue
        scale = truth.get(f"scale {name}")
        narrow = DTYPES[case.dtype] if name in ("dx", "dy") else working(case)
        if name not in found:
            return f"{name} is missing"
        share, words = worst(found[name], t, [s[name] for s in samples], narrow, scale)
        if share > 1:
            return f"{name}: {share:.1f} times its bound, {words}"
    return ""
