"""The batches that stages share: how they are named, made and run, and the wait for their kernels."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpair.losses.registry import CRITERIA
from flashpair.tools.check import batch, value_and_gradients

from ..harness.cases import Case, make_batch
from ..harness.options import GB, Options
from ..harness.variants import Step, make_step
from . import site
from .child import Stage
from .plan import Plan, TableCase

PER_CLASS = 4
UNIT_ONLY = ("AngularLoss(form='hinge')",)  # which refuse normalize=False
SHOWN = 5


class TruthCase(NamedTuple):
    """One loss on one batch of unit rows, rounded to their dtype once, so that every implementation starts alike.

    random: rows without classes, of which mining leaves many pairs alive; else clusters, of which it leaves few.
    """

    loss: str
    dtype: str
    n: int
    d: int
    impl: str
    random: bool = False

    @property
    def name(self) -> str:
        return f"{self.loss} {self.dtype} n={self.n} d={self.d} {self.impl}{' random' * self.random}"

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        x, labels = batch(self.n, self.d, PER_CLASS, torch.float32)
        if self.random:
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        unit = torch.nn.functional.normalize(x.double()).to(getattr(torch, self.dtype))
        return unit.to(device), labels.to(device)

    def criterion(self, impl: str) -> Any:
        return CRITERIA[self.loss](impl=impl, **({} if self.loss in UNIT_ONLY else {"normalize": False}))

    def step(self, device: str) -> Callable[[], Any]:
        x, labels = self.batch(device)
        criterion = self.criterion(self.impl)
        return lambda: value_and_gradients(criterion, x, labels)


def truth_cases(plan: Plan) -> list[TruthCase]:
    return _cases(plan, "fused", plan.truth_losses, plan.truth_sizes)


def onchip_cases(plan: Plan) -> list[TruthCase]:
    return _cases(plan, "onchip", plan.onchip_losses, plan.onchip_sizes)


def _cases(plan: Plan, impl: str, losses: Sequence[str], sizes: Sequence[int]) -> list[TruthCase]:
    """Whole batch sizes first, so that whatever ends the run, all losses have been there."""
    return [
        TruthCase(loss, dtype, n, plan.width, impl) for n in sizes for loss in losses for dtype in plan.truth_dtypes
    ]


def main_cases(plan: Plan, n: int) -> list[TruthCase]:
    """The losses that are tuned on, looked at by ncu and by the sanitizer, on random rows of the main type."""
    return [TruthCase(loss, plan.truth_dtypes[0], n, plan.width, "fused", random=True) for loss in plan.sweep_losses]


def bench_case(case: TableCase, device: str) -> Case:
    whole = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else GB
    options = Options(
        memory_limit=int(0.85 * whole), threads=1, loss=case.loss, dtype=case.dtype, device=device, data=case.data,
        per_class=PER_CLASS, variants=("flashpair",),
    )  # fmt: skip
    return Case(options, case.n, case.d)


def table_name(case: TableCase) -> str:
    return f"{case.loss} {case.dtype} n={case.n} d={case.d} {case.data}"


def schedule(plan: Plan, case: TableCase) -> str:
    """The variant that launches Triton kernels for a case, whatever `auto` would take."""
    return "flashpair-fused" if case.d <= 256 or plan.on_host else "flashpair-tiled"


def own_steps(plan: Plan, case: TableCase, device: str) -> list[Step]:
    """A case's steps by Triton kernels: the one that is timed, and the one that it is held against."""
    made = bench_case(case, device)
    found = make_batch(made)
    return [make_step(variant, made, found) for variant in dict.fromkeys((schedule(plan, case), "flashpair-tiled"))]


TESTED = (("float64", "float32", "bfloat16", "float16"), ((800, 128), (333, 100)), ("fused", "tiled"))


def tested_steps() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What most kernels of the tests are compiled for: test_gpu.py's every criterion against float64."""
    for loss, dtype, (n, d), impl in itertools.product(CRITERIA, *TESTED):
        case = TruthCase(loss, dtype, n, d, impl)
        if (loss, impl) == ("SoftTripleLoss", "fused"):
            continue  # it has no kernel of its own
        yield f"tests {case.name}", lambda case=case: case.step("cpu")()


class Kernels:
    """How many kernels this process has compiled itself, because the compile stage had not, or not the same."""

    def __init__(self) -> None:
        self.compiled = self.shown = 0
        try:
            from triton import knobs
        except ImportError:
            return
        knobs.compilation.listener = self._heard

    def _heard(self, *, src: Any, cache_hit: bool, **other: Any) -> None:
        if cache_hit:
            return
        self.compiled += 1
        self.shown += 1
        if self.shown <= SHOWN:  # in the log: what was asked for, to be held against what the compile stage noted
            words = (getattr(src, name, None) for name in ("signature", "attrs", "constants"))
            sys.stderr.write(f"not compiled ahead: {src.name} {' '.join(map(str, words))}\n")

    def take(self) -> int:
        """Since the last call."""
        found, self.compiled = self.compiled, 0
        return found


class Patience:
    """Waits for the stages in the background, all together no longer than the plan has patience for."""

    def __init__(self, stage: Stage) -> None:
        self.work, self.left = stage.work, stage.plan.patience

    def wait(self, name: str) -> str:
        """Until a case is compiled, or all are. Empty, or why a kernel of it could not be compiled: not to be tried
        again, for it may have crashed the compiler."""
        marker = site.marker(self.work, name)
        self._wait([marker, site.marker(self.work, "compile.end")])
        return marker.read_text(encoding="utf-8") if marker.exists() else ""

    def wait_for(self, stage: str) -> None:
        self._wait([site.marker(self.work, f"{stage}.end")])

    def late(self, name: str) -> str:
        """Empty, or that the compile stage is still on its way to a case."""
        there = site.marker(self.work, name).exists() or site.marker(self.work, "compile.end").exists()
        return "" if there else "it was not compiled in time"

    def _wait(self, files: list[Path]) -> None:
        began = time.monotonic()
        while self.left > time.monotonic() - began and not any(file.exists() for file in files):
            time.sleep(0.1)
        self.left -= time.monotonic() - began
