"""`python -m flashpair check`: gradcheck and parity of every criterion and implementation, on this machine; of a user's
own, `python -m flashpair check my_loss.py:MyLoss` or `package.module:MyLoss`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .criteria.base import Criterion
from .dispatch import IMPLEMENTATIONS, obstacles
from .forms import CRITERIA
from .named import criterion


def batch(n: int, d: int, per_class: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered random embeddings (n, d) with labels (n,), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) // per_class
    centres = torch.randn(n // per_class + 1, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (centres[labels] + noise).to(dtype), labels


def value_and_gradient(criterion: Criterion, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = criterion(x, labels)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def check(make: Callable[..., Criterion], impl: str, device: str = "cpu") -> tuple[bool, str]:
    """Gradcheck in float64 on a small batch, and float32 against the float64 reference on one of several tiles.

    The bound is what float32 can do: twice the dense float32 reference's own error, and one rounding.
    """
    x, labels = (t.to(device) for t in batch(12, 5, 3, torch.float64))
    smooth = not make().differentiates or torch.autograd.gradcheck(
        lambda t: make(impl=impl)(t, labels), (x.requires_grad_(),), raise_exception=False
    )
    x, labels = (t.to(device) for t in batch(600, 48, 4, torch.float32))
    truth = value_and_gradient(make(impl="reference"), x.double(), labels)
    found = value_and_gradient(make(impl=impl), x, labels)
    eager = value_and_gradient(make(impl="reference"), x, labels)
    errors = [_relative(f, t) for f, t in zip(found, truth, strict=True)]
    bounds = [2 * (_relative(e, t) + torch.finfo(torch.float32).eps) for e, t in zip(eager, truth, strict=True)]
    good = smooth and all(e <= b for e, b in zip(errors, bounds, strict=True))
    words = f"gradcheck {'passes' if smooth else 'FAILS'}" if make().differentiates else "no gradcheck, by definition"
    for what, error, bound in zip(("value", "gradient"), errors, bounds, strict=True):
        words += f", {what} error {error:.1e} (bound {bound:.1e})"
    return good, words


def refusal(make: Callable[..., Criterion], impl: str, device: str = "cpu") -> str:
    """Why `impl` does not take this criterion, though it runs here; empty if it does."""
    x, labels = (t.to(device) for t in batch(4, 2, 2, torch.float32))
    try:
        make(impl=impl)(x, labels)
    except (RuntimeError, ValueError) as error:
        if str(error).startswith((f"impl={impl!r} cannot run", "impl of ")):
            return str(error)
        raise
    return ""


def main(targets: Sequence[str] = ()) -> int:
    """0 if every criterion passes with every implementation that can run on this machine's CPU and GPU.

    targets: users' own criteria, FILE.py:Name or module:Name, which are then checked alone; each is made as
    ``Name(impl=...)``.
    """
    failed = 0
    checked = {target: criterion(target) for target in targets} or CRITERIA
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device, impl in itertools.product(devices, IMPLEMENTATIONS):
        if reasons := obstacles(impl, torch.device(device)):
            sys.stdout.write(f"{impl} on {device}: not checked, it cannot run: {'; '.join(reasons)}\n")
            continue
        for name, make in checked.items():
            if reason := refusal(make, impl, device):
                sys.stdout.write(f"---- {impl} on {device}, {name}: not checked, {reason}\n")
                continue
            good, words = check(make, impl, device)
            failed += not good
            sys.stdout.write(f"{'ok  ' if good else 'FAIL'} {impl} on {device}, {name}: {words}\n")
    sys.stdout.write(f"{failed} failed\n" if failed else "all pass\n")
    return int(failed > 0)
