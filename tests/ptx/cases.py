"""Losses to run through the executor, and whether they are right: `python -m tests.ptx`.

The rule is the project's: the error against the float64 reference is at most twice what eager code of the same
precision has, and one rounding. float64 is held to a thousand roundings of the largest entry.

Where the kernels normalise 16-bit embeddings, they round the rows to 16 bits, for tensor cores take no more. A loss of
rounded rows is off by a rounding of 16 bits, 1e-3, whatever computes it, and a bound that forgives that would hide all
else. So two things are asked: the rows are the exact ones rounded once, in every entry; and of these rows, taken as
they are, loss and gradients obey the rule. (`onchip` keeps its rows in float32: no rounding is forgiven.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from flashpair.backends import reference
from flashpair.core.similarity import l2_normalize
from flashpair.losses.registry import CRITERIA, OfClasses
from flashpair.tools.check import batch

from . import engine, launch, onchip
from .matrix import cut

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
ARCHS = ("sm_80", "sm_90")
DENSE = reference.dense_pairs
RANK = 6  # of the embeddings, but for noise: at any width, windows then leave some pairs and drop others


class Case(NamedTuple):
    """m: references, 0 for a square problem; unit: the kernels normalise; full: embeddings of full rank."""

    schedule: str
    arch: str
    dtype: str
    criterion: str
    n: int
    d: int
    m: int = 0
    unit: bool = False
    full: bool = False

    @property
    def batches(self) -> list[tuple[int, int]]:
        """How many embeddings, and references if there are any; and the seed of each."""
        return [(self.n, 1 if self.full else self.n), *([(self.m, self.m + 1)] if self.m else [])]

    def __str__(self) -> str:
        refs = f"-m{self.m}" if self.m else ""
        return (
            f"{self.schedule}-{self.arch}-{self.dtype}-{self.criterion}-n{self.n}-d{self.d}{refs}{'-unit' * self.unit}"
            f"{'-full' * self.full}"
        )


def embeddings(case: Case, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, d), of unit norm, or to be normalised, and labels (n,)."""
    d, dtype = case.d, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(100)
    rank = d if case.full else min(d, RANK)
    x, labels = batch(n, rank, 4, torch.float64, seed)
    spread = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.nn.functional.normalize(x if case.full else x @ spread / rank**0.5 + 0.2 * noise)
    return (x * 3 if case.unit else x).to(dtype), labels


def on_tensor_cores(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """`dense_pairs` of 16-bit numbers as eager code on a GPU has it: its products' sums truncate, see matrix.py."""
    exact = DENSE(x, y, distance)
    if distance != "dot":
        return exact
    a, b = (t.detach().double().numpy() for t in (x, y))
    total = np.zeros(exact.shape, np.float32)
    for k in range(0, a.shape[1], 16):
        total = cut(total + a[:, k : k + 16] @ b[:, k : k + 16].T)
    return exact + (torch.from_numpy(total) - exact).detach()


def _made(case: Case, impl: str, unit: bool) -> Any:
    criterion = CRITERIA[case.criterion](impl=impl, normalize=unit)
    if isinstance(criterion, OfClasses):
        torch.manual_seed(0)
        criterion = criterion.of_width(case.d)
    return criterion


def _as_kept(x: Tensor, rows: Tensor) -> Tensor:
    """`rows` (N, D), which are x's normalised ones rounded to their dtype, with the gradient of normalisation.

    In float64 for an x in float64, else in the rows' dtype.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    exact = l2_normalize(wide)
    held = exact + (rows.to(wide.dtype) - exact).detach()
    return held if x.dtype == torch.float64 else held.to(rows.dtype)


def step(case: Case, impl: str, dtype: torch.dtype, rows: list[Tensor] | None = None) -> list[Tensor]:
    """Loss, and gradients of embeddings, references and parameters under an upstream gradient that is not 1.

    rows: what stands for the normalised embeddings, and references; None: the criterion normalises them.
    """
    batches = [embeddings(case, n, seed) for n, seed in case.batches]
    wanted = [x.to(dtype).requires_grad_() for x, _ in batches]
    taken = wanted if rows is None else [_as_kept(x, y) for x, y in zip(wanted, rows, strict=True)]
    criterion = _made(case, impl, case.unit and rows is None)
    more = {"ref_emb": taken[1], "ref_labels": batches[1][1]} if case.m else {}
    loss = criterion(taken[0], batches[0][1], **more)
    upstream = torch.tensor(1.7, dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def rounded_once(rows: Tensor, x: Tensor) -> bool:
    """Whether rows (N, D) are x's (N, D) normalised, as rounding makes them of numbers that float32 can tell apart."""
    exact = l2_normalize(x.double())
    near = [exact * (1 + sign * 4 * torch.finfo(torch.float32).eps) for sign in (-1, 1)]
    low, high = torch.stack([n.to(rows.dtype) for n in near]).double().aminmax(dim=0)
    return bool(((rows.double() >= low) & (rows.double() <= high)).all())


def relative(found: Tensor, truth: Tensor) -> float:
    size = truth.double().norm().item()
    off = (found.double() - truth.double()).norm().item()
    return off / size if size else off


def double_bound(truth: Tensor) -> float:
    """In the norm that `relative` takes, a thousand roundings of the largest entry each."""
    size = truth.norm().item()
    return (
        1000 * torch.finfo(torch.float64).eps * truth.abs().max().item() * truth.numel() ** 0.5 / (size or 1.0) + 1e-16
    )


def execute(case: Case) -> tuple[list[Tensor], list[Tensor] | None, str]:
    """Loss and gradients; the rows that the kernels rounded, if they did; and the fault, if there is one."""
    dtype = DTYPES[case.dtype]
    launch.launched.clear()
    engine.kept.clear()
    try:
        with (onchip if case.schedule == "onchip" else engine).gpu(case.arch), uninitialised_is_nan():
            found = step(case, case.schedule, dtype)
    except Exception as error:  # every fault is a line of the report
        return [], None, f"{type(error).__name__}: {error}"
    if not (case.unit and dtype.itemsize == 2 and case.schedule != "onchip"):
        return found, None, ""
    rows = engine.kept[::-1]  # the references' come first
    batches = [embeddings(case, n, seed)[0] for n, seed in case.batches]
    good = len(rows) == len(batches) and all(map(rounded_once, rows, batches))
    return found, rows, "" if good else "normalised rows are not the exact ones, rounded once"


def run(case: Case) -> dict[str, Any]:
    """What is found of a case: right or not, errors and bounds of loss and gradients, seconds, or the fault."""
    dtype = DTYPES[case.dtype]
    start = time.perf_counter()
    found, rows, fault = execute(case)
    seconds = time.perf_counter() - start
    truth = step(case, "reference", torch.float64, rows)
    with mock.patch.object(reference, "dense_pairs", on_tensor_cores if dtype.itemsize == 2 else DENSE):
        eager = step(case, "reference", dtype, rows)
    errors = [relative(f, t) for f, t in zip(found, truth, strict=False)]
    if dtype == torch.float64:
        bounds = [double_bound(t) for t in truth]
    else:
        bounds = [2 * (relative(e, t) + torch.finfo(e.dtype).eps) for e, t in zip(eager, truth, strict=True)]
    alive = min((t != 0).any(1).double().mean().item() for t in truth[1:])
    good = not fault and len(errors) == len(bounds) and all(e <= b for e, b in zip(errors, bounds, strict=True))
    return {
        "case": str(case), "good": good and alive >= 0.2, "alive": round(alive, 3),
        "errors": [float(f"{e:.2e}") for e in errors], "bounds": [float(f"{b:.2e}") for b in bounds],
        "seconds": round(seconds, 2), "executed": round(sum(took for *_, took in launch.launched), 2),
        "launches": len(launch.launched), "fault": fault,
    }  # fmt: skip


class uninitialised_is_nan:
    """What torch.empty gives is NaN meanwhile. (torch.use_deterministic_algorithms would import the compiler.)"""

    def __enter__(self) -> None:
        torch._C._set_deterministic_algorithms(True)

    def __exit__(self, *error: Any) -> None:
        torch._C._set_deterministic_algorithms(False)


MINED, PLAIN = "MultiSimilarityLoss", "NTXentLoss"
OTHERS = [
    "ContrastiveLoss", "MarginLoss", "CircleLoss", "LiftedStructureLoss", "TripletMarginLoss(triplets='hard')",
    "GeneralizedLiftedStructureLoss(distance='euclidean')", "NCALoss", "LiftedStructureStarLoss(epsilon=0.1)",
    "TupletMarginLoss", "NPairsLoss", "SupConLoss",
]  # fmt: skip


def quick() -> Iterator[Case]:
    """A few of everything."""
    if not onchip.missing():
        yield Case("onchip", "sm_80", "f32", MINED, 20, 9, unit=True)
    for arch in ARCHS:
        for dtype in DTYPES:
            yield Case("fused", arch, dtype, MINED, 65, 33, unit=True)
        yield Case("fused", arch, "f32", MINED, 65, 33, unit=True, full=True)
        yield Case("fused", arch, "bf16", MINED, 131, 100, 70)
        yield Case("fused", arch, "bf16", PLAIN, 65, 128)
        yield Case("fused", arch, "f32", "ContrastiveLoss", 33, 40)
        yield Case("tiled", arch, "bf16", MINED, 150, 300)
        yield Case("screened", arch, "bf16", MINED, 300, 64)


def whole() -> Iterator[Case]:
    """Of onchip, where there is an nvcc: embeddings of each type, several rows a block, both kinds of barrier."""
    if onchip.missing():
        return
    for arch in ARCHS:
        for dtype in DTYPES:
            yield Case("onchip", arch, dtype, MINED, 20, 9, unit=True)
            yield Case("onchip", arch, dtype, "NPairsLoss", 33, 20)
        for n, d, m in ((17, 8, 16), (40, 19, 9)):
            yield Case("onchip", arch, "f32", "LiftedStructureStarLoss(epsilon=0.1)", n, d, m)
        for dtype in ("f32", "f64"):
            for n, m in ((5, 8), (6, 5), (9, 33)):  # 2, 4 and 8 rows a block, of anchors alone or of references alone
                yield Case("onchip", arch, dtype, MINED, n, 9, m, unit=n == 9)
        yield Case("onchip", arch, "f32", "GeneralizedLiftedStructureLoss", 5, 33)
        yield Case("onchip", arch, "f32", "GeneralizedLiftedStructureLoss(distance='euclidean')", 40, 19, unit=True)


def of_full_rank() -> Iterator[Case]:
    """Rows that nothing relates: similarities are small and windows cut through the middle of them."""
    for arch in ARCHS:
        for dtype in DTYPES:
            for unit in (False, True):
                yield Case("fused", arch, dtype, MINED, 62, 33, unit=unit, full=True)
                yield Case("tiled", arch, dtype, MINED, 131, 64, unit=unit, full=True)
                yield Case("screened", arch, dtype, MINED, 130, 40, 260, unit=unit, full=True)
            yield Case("screened", arch, dtype, MINED, 300, 100, full=True)
        for dtype in ("bf16", "f32"):
            yield Case("fused", arch, dtype, "MarginLoss", 65, 40, full=True)
            yield Case("fused", arch, dtype, "TripletMarginLoss(triplets='hard')", 65, 40, unit=True, full=True)
            yield Case("fused", arch, dtype, "GeneralizedLiftedStructureLoss(distance='euclidean')", 65, 40, full=True)


def matrix() -> Iterator[Case]:
    """Every schedule and dtype, D and N around the edges of tiles, with and without references, other criteria."""
    yield from quick()
    yield from whole()
    yield from of_full_rank()
    for arch in ARCHS:
        for dtype in DTYPES:
            for d in (8, 31, 32, 64, 65, 127, 128, 129, 256, 257, 300):
                yield Case("fused", arch, dtype, MINED, 65, d)
            for n in (16, 31, 64, 127, 129):
                yield Case("fused", arch, dtype, MINED, n, 33)
            for n, m in ((16, 130), (129, 31)):
                yield Case("fused", arch, dtype, MINED, n, 48, m)
            yield Case("fused", arch, dtype, PLAIN, 5, 33)  # too few for a window to leave any
            yield Case("fused", arch, dtype, PLAIN, 1, 48, 5)
            yield Case("fused", arch, dtype, PLAIN, 65, 33)
            yield Case("fused", arch, dtype, PLAIN, 40, 130, 70, unit=True)
            for d in (64, 300):
                yield Case("tiled", arch, dtype, MINED, 131, d)
            yield Case("tiled", arch, dtype, PLAIN, 64, 300, 150)
            yield Case("screened", arch, dtype, MINED, 300, 100)
            yield Case("screened", arch, dtype, MINED, 130, 40, 260)
        for dtype in ("bf16", "f32"):
            for name in OTHERS:
                yield Case("fused", arch, dtype, name, 65, 40)
