"""Stage: how steps are launched: CUDA graphs, side streams, devices, torch.compile; bits are those of a plain step.

Each check is of every implementation that runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashpair import MultiSimilarityLoss
from flashpair.engine.dispatch import unsupported_reasons
from flashpair.tools.check import batch, value_and_gradient

from .accelerator import Accelerator, accelerator
from .cases import Kernels, Patience
from .child import Skip, Stage, fatal, reason
from .plan import Plan
from .truth import compare

Check = Callable[[Accelerator, str, "Data"], None]


class Wrong(Exception):
    """A check's result is not what a plain step gives."""


class Data:
    """Batches of one shape, and the type that all checks but torch.compile's are of."""

    def __init__(self, plan: Plan) -> None:
        self.n, self.d = plan.launches_n, plan.width
        self.dtype = getattr(torch, plan.truth_dtypes[0])
        self.compiler = plan.compiler

    def batch(self, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
        x, labels = batch(self.n, self.d, 4, self.dtype, seed=seed)
        return x.to(device), labels.to(device)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: str) -> None:
    if not all(torch.equal(f.cpu(), w.cpu()) for f, w in zip(found, wanted, strict=True)):
        raise Wrong(f"{what} gives other bits than a plain step")


def graphs(gpu: Accelerator, impl: str, data: Data) -> None:
    """A graph replays with other numbers in its tensors."""
    x, labels = data.batch(gpu.device)
    criterion, static = MultiSimilarityLoss(impl=impl), x.clone()

    def step() -> tuple[Tensor, Tensor]:
        leaf = static.requires_grad_()
        loss = criterion(leaf, labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    replay, kept = gpu.graph(step)
    for seed in (1, 2):
        fresh, _ = data.batch(gpu.device, seed)
        with torch.no_grad():
            static.copy_(fresh)
        replay()
        gpu.synchronize()
        same(kept, value_and_gradient(criterion, fresh, labels), "a replayed graph")


def streams(gpu: Accelerator, impl: str, data: Data) -> None:
    """What a side stream is still writing is read after it."""
    x, labels = data.batch(gpu.device)
    criterion = MultiSimilarityLoss(impl=impl)
    wanted = value_and_gradient(criterion, x, labels)
    late = torch.zeros_like(x)
    found = gpu.late(late, x, lambda: value_and_gradient(criterion, late, labels))
    same(found, wanted, "a side stream")


def devices(gpu: Accelerator, impl: str, data: Data) -> None:
    """Kernels run on their tensors' device, not the current one."""
    names = gpu.devices()
    if len(names) < 2:
        raise Skip(f"there is one device, {names[0]}")
    criterion = MultiSimilarityLoss(impl=impl)
    found = [value_and_gradient(criterion, *data.batch(name)) for name in names]
    for name, one in zip(names[1:], found[1:], strict=True):
        same(one, found[0], name)


def compiled(gpu: Accelerator, impl: str, data: Data) -> None:
    """torch.compile takes the criterion as one graph, and the result is as near to float64 as plain PyTorch."""
    x, labels = data.batch(gpu.device)
    x = torch.nn.functional.normalize(x.float())

    def of(criterion: Any, rows: Tensor) -> dict[str, Tensor]:
        return dict(zip(("value", "gradient"), value_and_gradient(criterion, rows, labels), strict=True))

    whole = torch.compile(MultiSimilarityLoss(impl=impl), fullgraph=True, backend=data.compiler)
    reference = MultiSimilarityLoss(impl="reference")
    verdict = compare(of(whole, x), of(reference, x), of(reference, x.double()), "float32")
    if not verdict["right"]:
        raise Wrong(f"compiled, it is off by {verdict['gradient']}")


def names(plan: Plan, impl: str) -> list[str]:
    """Of the cases that an implementation's Triton kernels are compiled ahead in, and their types after them."""
    types = dict.fromkeys((plan.truth_dtypes[0], "float32"))
    return [f"launches {impl} {dtype}" for dtype in types] if impl != "onchip" else []


def ahead(plan: Plan, impl: str, dtype: torch.dtype) -> None:
    """The kernels of the checks, on CPU tensors, for the compile stage."""
    x, labels = Data(plan).batch("cpu")
    value_and_gradient(MultiSimilarityLoss(impl=impl), x.to(dtype), labels)


CHECKS: tuple[Check, ...] = (graphs, streams, devices, compiled)


def run(stage: Stage) -> None:
    gpu, data = accelerator(stage.plan, stage.work), Data(stage.plan)
    kernels, patience = Kernels(), Patience(stage)
    patience.wait_for("build")
    gpu.built()
    for check in CHECKS:
        for impl in stage.plan.launches:
            about: dict[str, Any] = {"check": check.__name__, "impl": impl}
            if reasons := unsupported_reasons(impl, torch.device(gpu.device)):
                stage.say(**about, skipped="; ".join(reasons))
                continue
            if dropped := [why for name in names(stage.plan, impl) if (why := patience.wait(name))]:
                stage.say(**about, failed=dropped[0])
                continue
            try:
                check(gpu, impl, data)
                gpu.synchronize()
            except Skip as why:
                stage.say(**about, skipped=str(why))
            except Exception as error:
                stage.say(**about, failed=reason(error))
                if fatal(error):
                    raise
            else:
                stage.say(**about, right=True, compiled=kernels.take(), **gpu.by(impl, check.__name__))
