"""What the tests share: batches, and a tolerance that follows from the precision instead of being tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashpair import Reduction
from flashpair.losses.base import Criterion
from flashpair.losses.registry import OfClasses
from flashpair.tools.check import CRITERIA, batch

__all__ = [
    "CRITERIA",
    "FORMS",
    "FORMULAS",
    "MAPPED",
    "PAIR_CRITERIA",
    "REFERENCE_CRITERIA",
    "WITH_GRADIENT",
    "assert_as_good_as",
    "assert_parity",
    "assert_same",
    "assert_same_bits",
    "batch",
    "forms",
    "gradients",
    "loss_and_gradients",
    "made",
    "relative",
]
FORMULAS = {name: make for name, make in CRITERIA.items() if make().row_formula() is not None}
PAIR_CRITERIA = {name: make for name, make in CRITERIA.items() if not isinstance(make(), OfClasses)}
"""Losses of pairs of samples, to which labels are names alone."""
REFERENCE_CRITERIA = {name: make for name, make in CRITERIA.items() if make().takes_references}


def made(name: str, d: int, **common: str | bool) -> Criterion:
    """The criterion of a row for embeddings of width d; of class weights, the criterion that holds them."""
    criterion = CRITERIA[name](**common)
    return criterion.of_width(d) if isinstance(criterion, OfClasses) else criterion


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    if truth.numel() == 0:
        return 0.0
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def assert_as_good_as(found: Tensor, eager: Tensor, truth: Tensor) -> None:
    """`found` is as near to the float64 `truth` as twice what dense eager code of the same precision reaches."""
    bound = 2 * (relative(eager, truth) + torch.finfo(eager.dtype).eps)
    assert relative(found, truth) <= bound, f"{relative(found, truth):.2e} over {bound:.2e}"


def assert_same(found: Tensor, truth: Tensor, least: float = 0.0) -> None:
    """Two float64 results of the same sums in another order: equal to a thousand roundings of the largest entry, or of
    `least`, the size of what they are sums of, where these may cancel."""
    assert found.shape == truth.shape
    assert torch.equal(found.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    assert torch.equal(found[~finite].nan_to_num(), truth[~finite].nan_to_num())
    if finite.any():
        scale = max(truth[finite].abs().max().item(), least)
        error = (found[finite] - truth[finite]).abs().max().item()
        assert error <= 1000 * torch.finfo(torch.float64).eps * scale + 1e-16, f"{error:.2e} at a scale of {scale:.2e}"


def assert_same_bits(step: Callable[[], Sequence[Tensor]], threads: Sequence[int]) -> None:
    """What `step` returns has the same bits with every number of threads, one call for each of them."""
    before, first = torch.get_num_threads(), None
    try:
        for count in threads:
            torch.set_num_threads(count)
            now = step()
            first = first or now
            assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
    finally:
        torch.set_num_threads(before)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of the inputs under random upstream gradients (the same for a seed); zeros where there are none."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [o for o in outputs if o.requires_grad]
    if not wanted:
        return [torch.zeros_like(t) for t in inputs]
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in wanted]
    found = torch.autograd.grad(wanted, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


FORMS = [("logsumexp", "identity"), ("sum", "identity"), ("sum", "softplus"), ("sum", "hinge"), ("sum", "lifted")]
FORMS += [("min", "identity"), ("max", "identity"), ("count", "identity"), ("sum", "squared_hinge")]
FORMS += [("sum", "triangle"), ("logsumexp", "softplus")]
WITH_GRADIENT = [form for form in FORMS if form[0] in ("logsumexp", "sum")]
MAPPED = ("logsumexp", "softplus")  # takes no window, and numbers as scale and offset


def forms(n: int, m: int, seed: int, device: str = "cpu") -> tuple[list[Reduction], list[Tensor]]:
    """One of every reduction, each with another side and window, and what wants a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def vector(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    sides, windows, found, learn = ("positives", "negatives", "all"), ("open", "lower", "upper", "both"), [], []
    for k, (op, transform) in enumerate(FORMS):
        options = {}
        if (op, transform) == MAPPED:
            found.append(Reduction(op, sides[(k + seed) % 3], transform, scale=3.0, offset=0.5))
            continue
        if op in ("logsumexp", "sum"):
            options = {"scale": (vector(()) + 3).requires_grad_(), "offset": vector(n).requires_grad_()}
        if transform == "lifted":
            options["ref_offset"] = vector(m).requires_grad_()
        learn += options.values()
        window = windows[(k + seed) % 4]
        if window in ("lower", "both"):
            options["lower"] = vector(n) - 1
        if window in ("upper", "both"):
            options["upper"] = vector(n) + 1
        found.append(Reduction(op, sides[(k + seed) % 3], transform, **options))
    return found, learn


def loss_and_gradients(make, impl, x, labels, y=None, ref_labels=None, need=(True, True), **options):
    """Loss and the wanted gradients, under an upstream gradient that is not 1."""
    a = x.clone().requires_grad_(need[0])
    more, wanted = {}, [a] * need[0]
    if y is not None:
        b = y.clone().requires_grad_(need[1])
        more, wanted = {"ref_emb": b, "ref_labels": ref_labels}, wanted + [b] * need[1]
    loss = make(impl=impl, **options)(a, labels, **more)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


def assert_parity(make, impl, *batch, **options) -> None:
    """`loss_and_gradients` of `impl` and of the reference, in float64."""
    found, truth = (loss_and_gradients(make, which, *batch, **options) for which in (impl, "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)
