"""Stage: tiles, warps, stages and registers of the two main kernels, each candidate right before it is timed.

The row that comes out has one tile, and for each pass the warps, stages and registers that were the fastest on all
losses together; it is run once more as a whole. configs.txt has it as a row of kernels/configs.py.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch

from flashpair.tools.check import value_and_gradients

from .accelerator import Accelerator, accelerator
from .cases import Kernels, Patience, TruthCase
from .child import Stage, fatal, reason
from .plan import Tile
from .truth import compare
from .tuning import BACKWARD, FORWARD, candidate_name, candidates, chosen, gates, row, timed_kernels

Times = dict[str, float]  # of FORWARD and BACKWARD


class Loss:
    """A loss that is tuned on: what is right for it, and how long a candidate takes."""

    def __init__(self, stage: Stage, gpu: Accelerator, gate: TruthCase) -> None:
        self.gpu, self.gate, self.name = gpu, gate, gate.loss
        self.repeats = stage.plan.sweep_repeats
        x, labels = gate.batch(self.gpu.device)
        reference = gate.criterion("reference")
        self.truth = value_and_gradients(reference, x.double(), labels)
        self.eager = value_and_gradients(reference, x, labels)
        self.small = gate.step(self.gpu.device)
        self.large = gate._replace(n=stage.plan.sweep_n[1]).step(self.gpu.device)

    def judge(self) -> dict[str, Any]:
        return compare(self.small(), self.eager, self.truth, self.gate.dtype)

    def time(self) -> Times:
        """Median seconds of each kernel in a step."""
        self.large()
        found = []
        with timed_kernels(self.gpu) as take:
            for _ in range(self.repeats):
                self.gpu.synchronize()
                self.gpu.hold()
                self.large()
                found.append(take())
        return {name: statistics.median(f[name] for f in found) for name in (FORWARD, BACKWARD)}


def try_one(stage: Stage, loss: Loss, forward: Tile | None, backward: Tile | None = None) -> Times | None:
    """The times of a candidate that is right; says what came of it."""
    shown = None if forward is None else (forward, backward or forward)
    try:
        with chosen(forward, backward):
            verdict = loss.judge()
            times = loss.time() if verdict["right"] else None
    except Exception as error:
        stage.say(loss=loss.name, tile=shown, dropped=reason(error))
        if fatal(error):
            raise
        return None
    stage.say(
        loss=loss.name, tile=shown, right=verdict["right"], times=times, gradient=verdict["gradient"],
        **loss.gpu.by("fused", "times"),
    )  # fmt: skip
    return times


def best(found: dict[Tile, list[Times]], shipped: list[Times]) -> tuple[Tile, Tile] | None:
    """Of each tile the launches that are the fastest in each pass, and of these the tile that is; None without any."""

    def score(tile: Tile, kernel: str) -> float:
        return math.prod(times[kernel] / base[kernel] for times, base in zip(found[tile], shipped, strict=True))

    rows = []
    for _, tiles in itertools.groupby(sorted(found), key=lambda tile: tile[:2]):
        same = list(tiles)
        forward, backward = (min(same, key=lambda t, k=kernel: score(t, k)) for kernel in (FORWARD, BACKWARD))
        pairs = zip(found[forward], found[backward], shipped, strict=True)
        whole = [(f[FORWARD] + b[BACKWARD]) / sum(base.values()) for f, b, base in pairs]
        rows.append((math.prod(whole), forward, backward))
    return min(rows)[1:] if rows else None


def report(stage: Stage, losses: list[Loss], pick: tuple[Tile, Tile], shipped: list[Times]) -> None:
    """Runs the row as a whole, says it, and writes it down as kernels/configs.py has it."""
    from flashpair.backends.triton.kernels import configs

    whole = [try_one(stage, loss, *pick) for loss in losses]
    if not all(whole):
        stage.say(failed="the best launches of both passes are not right, or do not run, together")
        return
    case = losses[0].gate
    device = torch.device(losses[0].gpu.device)
    family, dtype = configs.family(device), getattr(torch, case.dtype)
    made = row(configs.choose(family, dtype, case.d), *pick)
    ratios = {
        loss.name: sum(new.values()) / sum(old.values()) for loss, new, old in zip(losses, whole, shipped, strict=True)
    }
    words = f"({case.d}, {made!r}),  # {family}, {case.dtype}"
    stage.say(best=words, of_shipped=ratios, faster=math.prod(ratios.values()) < 1)
    with (stage.out / "configs.txt").open("a", encoding="utf-8") as file:
        shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        file.write(f"# time of both kernels, shipped row = 1: {shown}\n{words}\n")


def run(stage: Stage) -> None:
    kernels, patience = Kernels(), Patience(stage)
    gpu = accelerator(stage.plan, stage.work)
    losses = [Loss(stage, gpu, gate) for gate in gates(stage.plan)]
    found: dict[Tile, list[Times]] = {}
    shipped: list[Times] = []
    for tile in candidates(stage.plan):
        names = [candidate_name(loss.name, tile) for loss in losses]
        dropped = [why for name in names if (why := patience.wait(name) or patience.late(name))]
        if dropped and tile is not None:
            stage.say(tile=tile, dropped=dropped[0])
            continue
        times = [try_one(stage, loss, tile) for loss in losses]
        if kernels.compiled:
            stage.say(tile=tile, compiled=kernels.take())
        if tile is None:
            shipped = [t for t in times if t]
            if len(shipped) < len(losses):
                raise RuntimeError("the shipped row is not right, or does not run: nothing to tune against")
        elif all(times):
            found[tile] = [t for t in times if t]
            stage.say(
                tile=tile, of_shipped=[sum(t.values()) / sum(s.values()) for t, s in zip(times, shipped, strict=True)]
            )
    if pick := best(found, shipped):
        report(stage, losses, pick, shipped)
    else:
        stage.say(failed="no candidate is right and runs")
