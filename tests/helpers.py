"""What the tests share: batches, and a tolerance that follows from the precision instead of being tuned."""

from __future__ import annotations

import torch
from torch import Tensor

from flashpair.check import CRITERIA, batch

__all__ = ["CRITERIA", "assert_as_good_as", "assert_same", "batch", "gradients", "relative"]


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    if truth.numel() == 0:
        return 0.0
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def assert_as_good_as(found: Tensor, eager: Tensor, truth: Tensor) -> None:
    """`found` is as near to the float64 `truth` as twice what dense eager code of the same precision reaches."""
    bound = 2 * (relative(eager, truth) + torch.finfo(eager.dtype).eps)
    assert relative(found, truth) <= bound, f"{relative(found, truth):.2e} over {bound:.2e}"


def assert_same(found: Tensor, truth: Tensor) -> None:
    """Two float64 results of the same sums in another order: equal to a thousand roundings of the largest entry."""
    assert found.shape == truth.shape
    assert torch.equal(found.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    assert torch.equal(found[~finite].nan_to_num(), truth[~finite].nan_to_num())
    if finite.any():
        scale = truth[finite].abs().max().item()
        error = (found[finite] - truth[finite]).abs().max().item()
        assert error <= 1000 * torch.finfo(torch.float64).eps * scale + 1e-16, f"{error:.2e} at a scale of {scale:.2e}"


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of the inputs under random upstream gradients (the same for a seed); zeros where there are none."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [o for o in outputs if o.requires_grad]
    if not wanted:
        return [torch.zeros_like(t) for t in inputs]
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in wanted]
    found = torch.autograd.grad(wanted, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
