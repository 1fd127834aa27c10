"""`python -m flashpair check`: gradcheck and parity of every criterion and implementation, on this machine; of a user's
own, `python -m flashpair check my_loss.py:MyLoss` or `package.module:MyLoss`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine.dispatch import IMPLEMENTATIONS, unsupported_reasons
from ..losses.base import Criterion
from ..losses.registry import CRITERIA
from .import_target import criterion


def batch(n: int, d: int, per_class: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered random embeddings (n, d) with labels (n,), shuffled."""
    generator = torch.Generator("cpu").manual_seed(seed)
    labels = torch.randperm(n, generator=generator, device="cpu") // per_class
    centres = torch.randn(n // per_class + 1, d, generator=generator, dtype=torch.float64, device="cpu")
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64, device="cpu")
    return (centres[labels] + noise).to(dtype), labels


def value_and_gradients(criterion: Criterion, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradient in the embeddings and in every parameter by name; 0 where there is none."""
    x = x.detach().clone().requires_grad_()
    loss = criterion(x, labels)
    learned = {"gradient": x} | {f"gradient of {name}": p for name, p in criterion.named_parameters()}
    found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(learned.items(), found, strict=True)}
    return {"value": loss.detach(), **gradients}


def value_and_gradient(criterion: Criterion, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found = value_and_gradients(criterion, x, labels)
    return found["value"], found["gradient"]


def _relative(found: Tensor, truth: Tensor) -> float:
    off, size = (found.double() - truth).norm().item(), truth.norm().item()
    return off / size if size else off


def check(make: Callable[..., Criterion], impl: str, device: str = "cpu") -> tuple[bool, str]:
    """Checks one criterion with one implementation on this machine.

    In float64 it runs gradcheck on a small batch. In float32 it compares the value, and the gradients of the embeddings
    and of every parameter, with the float64 reference on a batch of several tiles. The bound is twice the error of the
    dense float32 reference, plus one rounding. For parameters it is at least the embeddings' bound, because a single
    number of the dense reference can be right by luck.

    Args:
        make: called with ``impl=...``, makes the criterion.
        impl: the name of an implementation.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Whether the check passed, and the errors and bounds in words.

    Examples:
        >>> from flashpair.tools.check import check
        >>> check(flashpair.NTXentLoss, "reference")[0]
        True
    """
    x, labels = (t.to(device) for t in batch(12, 5, 3, torch.float64))
    smooth = not make().differentiates or torch.autograd.gradcheck(
        lambda t: make(impl=impl)(t, labels), (x.requires_grad_(),), raise_exception=False
    )
    x, labels = (t.to(device) for t in batch(600, 48, 4, torch.float32))
    criteria = [make(impl=name).to(device) for name in ("reference", impl, "reference")]
    value_and_gradients(criteria[0], x, labels)  # which makes weights that wait for their width
    for other in criteria[1:]:
        value_and_gradients(other, x, labels)
        other.load_state_dict(criteria[0].state_dict())  # parameters may be random
    inputs = (x.double(), x, x)
    truth, found, eager = (value_and_gradients(c, t, labels) for c, t in zip(criteria, inputs, strict=True))
    errors = [_relative(found[name], t) for name, t in truth.items()]
    off = {name: _relative(eager[name], t) for name, t in truth.items()}
    floor = {name: off["gradient"] if name not in ("value", "gradient") else 0.0 for name in truth}
    bounds = [2 * (max(off[name], floor[name]) + torch.finfo(torch.float32).eps) for name in truth]
    good = smooth and all(e <= b for e, b in zip(errors, bounds, strict=True))
    words = f"gradcheck {'passes' if smooth else 'FAILS'}" if make().differentiates else "no gradcheck, by definition"
    for what, error, bound in zip(truth, errors, bounds, strict=True):
        words += f", {what} error {error:.1e} (bound {bound:.1e})"
    return good, words


def refusal(make: Callable[..., Criterion], impl: str, device: str = "cpu") -> str:
    """Why `impl` refuses this criterion, though it can run here; empty if it takes it."""
    x, labels = (t.to(device) for t in batch(4, 2, 2, torch.float32))
    try:
        make(impl=impl)(x, labels)
    except (RuntimeError, ValueError) as error:
        if str(error).startswith((f"impl={impl!r} cannot run", "impl of ")):
            return str(error)
        raise
    return ""


def main(targets: Sequence[str] = ()) -> int:
    """Checks every criterion with every implementation that can run on this machine, CPU and GPU; prints the results.

    Args:
        targets: your own criteria as FILE.py:Name or module:Name. If given, only these are checked. Each is made as
            ``Name(impl=...)``.

    Returns:
        0 if all pass, else 1.

    Raises:
        ValueError: a target that cannot be loaded, or is not a Criterion.
    """
    failed = 0
    checked = {target: criterion(target) for target in targets} or CRITERIA
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device, impl in itertools.product(devices, IMPLEMENTATIONS):
        if reasons := unsupported_reasons(impl, torch.device(device)):
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
