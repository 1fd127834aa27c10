"""Stage: the time of a training step, eager and as a CUDA graph, beside others; its memory; the time of each kernel.

Two floors stand beside it: the bare products of the same shapes, by torch.mm (gemm_bound.py), which memory may bound,
and 6 N M D flop at the rate that a large product reaches here.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from flashpair.engine.dispatch import WIDEST_FUSED

from ..harness.baselines import NotThere
from ..harness.cases import Batch, make_batch
from ..harness.gemm_bound import make_gemm_bound
from ..harness.variants import REGISTRY, TrainingStep, make_step
from ..harness.worker import is_memory
from .accelerator import Step, accelerator, stand_in
from .cases import Kernels, Patience, bench_case, schedule, table_name
from .child import Skip, Stage, fatal, reason
from .plan import TableCase
from .site import marker
from .truth import relative

SAMPLE_SECONDS = 0.005  # shorter steps are repeated within a sample
MOST = 50
DENSE_BYTES = 40  # a pair, that plain PyTorch takes at least
SHOWN = 12  # kernels of a profile


class Table:
    """The stage's state: the chip, and what its product ceiling is."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.plan = stage, stage.plan
        self.gpu = accelerator(stage.plan, stage.work)
        self.kernels, self.patience = Kernels(), Patience(stage)
        self.rates = rates(stage)
        self.agreed = set[str]()

    def make(self, case: TableCase, variant: str, batch: Batch) -> Step:
        """A variant's step; raises Skip or NotThere with the reason."""
        made = bench_case(case, self.gpu.device)
        if variant == "floor":
            return make_gemm_bound(made, batch)
        if variant == "reference" and made.n**2 * DENSE_BYTES > made.options.memory_limit:
            raise Skip(f"{DENSE_BYTES} bytes a pair are over the memory")
        if variant == "compiled":
            criterion = REGISTRY["reference"](made)
            return TrainingStep(torch.compile(criterion, dynamic=False, backend=self.plan.compiler), batch)
        if self.plan.on_host and variant == "flashpair":
            variant = schedule(self.plan, case)
        return make_step(variant, made, batch)

    def graph(self, step: Step, batch: Batch) -> Step:
        """The step as one graph, whose bits are those of the step."""

        def whole() -> tuple[Any, Any]:
            return step(), batch.x.grad

        eager = [t.clone() for t in whole()]
        replay, kept = self.gpu.graph(whole)
        for t in kept:
            t.detach().fill_(torch.nan)
        replay()
        self.gpu.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(eager, kept, strict=True)):
            raise RuntimeError("wrong: a replayed graph gives other bits than the step")
        return replay

    def run(self, case: TableCase) -> None:
        name = table_name(case)
        if any(v.startswith(("flashpair", "graph")) for v in case.variants):
            if dropped := self.patience.wait(name):
                self.stage.say(case=name, variant="flashpair", failed=dropped)
                return
        batch = make_batch(bench_case(case, self.gpu.device))
        steps: dict[str, Step] = {}
        for variant in case.variants:
            batch.x.grad = None
            try:
                source = steps.get("flashpair") if variant == "graph" else None
                if variant == "graph" and source is None:
                    raise Skip("there is no step to capture")
                step = self.graph(source, batch) if source else self.make(case, variant, batch)
                peak = self.first(step, variant, batch)
            except (Skip, NotThere) as why:
                self.stage.say(case=name, variant=variant, skipped=str(why))
            except Exception as error:
                self.failed(name, variant, error)
            else:
                steps[variant] = step
                found = {"peak": peak, "compiled": self.kernels.take()}
                self.stage.say(case=name, variant=variant, **found, **stand_in(self.plan))
        if "flashpair" in steps and case.d <= WIDEST_FUSED and name not in self.agreed:
            self.agree(case, name, steps["flashpair"], batch)
        self.time(case, name, steps)
        if case.profiled and "flashpair" in steps:
            self.profile(name, steps["flashpair"])

    def agree(self, case: TableCase, name: str, step: Step, batch: Batch) -> None:
        """The step beside `tiled`, whose products are the vendor's: both round weights and gradients to their type. At
        any size, where float64 has no room."""
        self.agreed.add(name)
        try:
            found, other = taken(step, batch), taken(self.make(case, "flashpair-tiled", batch), batch)
        except Exception as error:
            self.failed(name, "flashpair-tiled", error)
            return
        errors = {what: relative(found[what], other[what]) for what in found}
        bound = 2 * torch.finfo(getattr(torch, case.dtype)).eps
        right = all(error <= bound for error in errors.values()) if case.dtype != "float32" else None
        verdict: dict[str, Any] = {} if right is None else {"right": right, "bound": bound}
        verdict |= {"compiled": self.kernels.take(), **self.gpu.by("fused")}
        self.stage.say(case=name, against="tiled", **errors, **verdict)

    def first(self, step: Step, variant: str, batch: Batch) -> int | None:
        """The memory of a second step, the first one having compiled; a gradient that is not finite is an error."""
        step()
        self.gpu.synchronize()
        if isinstance(step, TrainingStep) and not bool(batch.x.grad.isfinite().all()):
            raise RuntimeError("wrong: the gradient is not finite")
        if variant in ("floor", "graph"):
            return None
        batch.x.grad = None
        return self.gpu.peak(step)

    def failed(self, name: str, variant: str, error: Exception) -> None:
        over = is_memory(error)
        if "cannot run" in str(error):  # an implementation's own words, where it is not built
            self.stage.say(case=name, variant=variant, skipped=reason(error))
            return
        self.stage.say(
            case=name, variant=variant, **({"skipped": "over memory"} if over else {"failed": reason(error)})
        )
        gc.collect()
        self.gpu.free()
        if fatal(error):
            raise error

    def time(self, case: TableCase, name: str, steps: dict[str, Step]) -> None:
        """Medians of rounds over all variants, each round starting with another."""
        counts = {v: max(1, min(MOST, round(SAMPLE_SECONDS / self.gpu.seconds(step)))) for v, step in steps.items()}
        samples: dict[str, list[float]] = {v: [] for v in steps}
        names = list(steps)
        for turn in range(self.plan.rounds):
            first = turn % max(1, len(names))
            for variant in names[first:] + names[:first]:
                samples[variant].append(self.gpu.seconds(steps[variant], counts[variant]))
        alone = marker(self.stage.work, "compile.end").exists()
        flop = 6 * case.n**2 * case.d
        rate = self.rates.get(f"product {case.dtype}")
        if case.dtype == "float32":  # three products of tf32 stand for one
            rate = self.rates.get("product tf32", 0.0) / 3
        for variant, found in samples.items():
            self.stage.say(
                case=name, variant=variant, seconds=statistics.median(found), lowest=min(found), highest=max(found),
                steps=counts[variant], arithmetic_floor=flop / rate if rate else None,
                alone=alone, **stand_in(self.plan),
            )  # fmt: skip

    def profile(self, name: str, step: Callable[[], Any]) -> None:
        try:
            found = self.gpu.kernels(step)
        except RuntimeError as error:
            self.stage.say(case=name, kernels=None, skipped=f"torch's profiler: {reason(error)}")
            return
        shown = sorted(found.items(), key=lambda item: -item[1][0])[:SHOWN]
        total = sum(seconds for seconds, _ in found.values())
        kernels = {key: [s, count] for key, (s, count) in shown}
        self.stage.say(case=name, kernels=kernels, all_kernels=total, **stand_in(self.plan))


def taken(step: Step, batch: Batch) -> dict[str, torch.Tensor]:
    """Loss and gradient of a step, which leaves none."""
    value = step()
    assert batch.x.grad is not None
    found = {"value": value.detach().clone(), "gradient": batch.x.grad.clone()}
    batch.x.grad = None
    return found


def rates(stage: Stage) -> dict[str, float]:
    """The product ceilings that were measured, by the proof's own lines."""
    found = {}
    for line in (stage.out / "proof.jsonl").read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        if said["stage"] == "ceilings" and "flop_per_second" in said:
            found[said["ceiling"]] = said["flop_per_second"]
    return found


def run(stage: Stage) -> None:
    table = Table(stage)
    for case in stage.plan.table:
        try:
            table.run(case)
        except torch.OutOfMemoryError as error:
            stage.say(case=table_name(case), skipped=reason(error))
        gc.collect()
        table.gpu.free()
