"""Stage: losses and gradients against the float64 reference, by the project's rule: no further off than twice what
plain PyTorch is at the same precision, and one rounding of it. One pair on an edge is forgiven, see edges.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashpair.engine.dispatch import unsupported_reasons
from flashpair.tools.check import value_and_gradients

from .accelerator import Accelerator, accelerator
from .cases import Kernels, Patience, TruthCase, onchip_cases, truth_cases
from .child import Stage, fatal, reason
from .edges import noted, other_sides, own_side

FACTOR = 2.0


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    off, size = (found.double() - truth.double()).norm().item(), truth.double().norm().item()
    return off / size if size else off


def worst_row(found: Tensor, truth: Tensor) -> float:
    """The largest error of a row, relative to the typical row."""
    off = torch.linalg.vector_norm(found.double() - truth.double(), dim=1)
    typical = torch.linalg.vector_norm(truth.double(), dim=1).square().mean().sqrt().clamp_min(1e-300)
    return (off.max() / typical).item()


def compare(
    found: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], dtype: str,
    other: dict[str, Tensor] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Errors and bounds of the value, which is never rounded to 16 bits, and of every gradient, whose weights are, once
    a pair, as test_gpu.py has it. other: a truth that errors are held against, by the bounds of the first."""
    against = truth if other is None else other
    record: dict[str, Any] = {"right": True}
    eps = {name: torch.finfo(getattr(torch, name)).eps for name in ("float32", dtype)}
    for what, exact in truth.items():
        once = eps[dtype] if what != "value" and eps[dtype] > eps["float32"] else 0.0
        bound = FACTOR * (relative(eager[what], exact) + eps["float32"]) + once
        error = relative(found[what], against[what])
        record[what] = {"error": error, "bound": bound}
        record["right"] &= error <= bound  # NaN is not
    record["worst_row"] = worst_row(found["gradient"], against["gradient"])
    record["finite"] = all(bool(t.isfinite().all()) for t in found.values())
    return record


def judge(case: TruthCase, gpu: Accelerator) -> dict[str, Any]:
    x, labels = case.batch(gpu.device)
    found = value_and_gradients(case.criterion(case.impl).to(gpu.device), x, labels)
    return held(found, case.criterion("reference").to(gpu.device), x, labels, case.dtype)


def held(found: dict[str, Tensor], criterion: Any, x: Tensor, labels: Tensor, dtype: str) -> dict[str, Any]:
    """What was found, beside the reference; `forgiven`: the one pair that stands on the other side of an edge."""

    def exact() -> dict[str, Tensor]:
        return value_and_gradients(criterion, x.double(), labels)

    truth, z = noted(exact)
    eager, rounded = noted(lambda: value_and_gradients(criterion, x, labels))
    if z is None or rounded is None:
        return compare(found, eager, truth, dtype)
    side = own_side(exact, eager, truth, z, rounded)
    record = compare(found, eager, side, dtype, truth)
    if record["right"] or not record["finite"]:
        return record
    for pair, other in other_sides(exact, found, truth, z, rounded):
        again = compare(found, eager, side, dtype, other)
        if again["right"]:
            return {**again, "forgiven": pair}
    return record


def run(stage: Stage) -> None:
    gpu, kernels, patience = accelerator(stage.plan, stage.work), Kernels(), Patience(stage)
    wrong = 0
    for case in [*truth_cases(stage.plan), *onchip_cases(stage.plan)]:
        if case.impl == "onchip":
            patience.wait_for("build")
            gpu.built()
            if reasons := unsupported_reasons("onchip", torch.device(gpu.device)):
                stage.say(case=case.name, skipped="; ".join(reasons))
                continue
        elif dropped := patience.wait(case.name):
            wrong += 1
            stage.say(case=case.name, right=False, failed=dropped)
            continue
        try:
            found = judge(case, gpu)
        except Exception as error:
            wrong += 1
            stage.say(case=case.name, right=False, failed=reason(error), compiled=kernels.take())
            if fatal(error):
                raise
            continue
        wrong += not found["right"]
        stage.say(case=case.name, **found, compiled=kernels.take(), **gpu.by(case.impl))
        gpu.free()
    stage.say(wrong=wrong)
