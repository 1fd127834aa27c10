"""What the loss costs over a whole training, first step to last: `python -m bench training`.

Two networks are trained with flashpair's mined Multi-Similarity (training_data.py). At some steps the embeddings are
copied. On them the live pairs are counted, loss and gradient of every variant are checked against float64, and forward
and backward of the loss alone are timed, with the variants taking turns. A wrong result stops the study.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashpair
from flashpair import Bound, Reduction

from ..harness import machine, report, sandbox
from ..harness.arguments import add_common, add_table, options_of
from ..harness.cases import Batch, Case
from ..harness.check import find_truth, judge
from ..harness.measure import Times, interleave
from ..harness.options import Options
from ..harness.progress import Progress
from ..harness.variants import make_step
from . import training_report
from .training_data import PER_CLASS, Training, digits, synthetic

Record = dict[str, Any]
OURS = ("flashpair", "flashpair-tiled")
BASELINE = "pytorch-metric-learning"
BASELINE_POINTS = 5  # of the logged steps: it takes seconds a step
EPSILON = 0.1


class Wrong(Exception):
    """A variant of flashpair is less accurate than float32 allows."""


def logged_steps(steps: int, count: int) -> list[int]:
    """About `count` steps of 0 ... steps, with the first and the last, and closer together at the start."""
    return sorted({round(steps * (k / max(count - 1, 1)) ** 2) for k in range(count)} | {steps})


@torch.no_grad()
def exact_live_share(embeddings: Tensor, labels: Tensor) -> float:
    """The share of all negatives of embeddings (N, D) that mining keeps, counted by the reference."""
    lowest = Reduction("min", "positives", detach=True)
    count = Reduction("count", "negatives", lower=Bound(lowest, -EPSILON))
    unit = torch.nn.functional.normalize(embeddings)
    _, kept = flashpair.row_reduce(unit, labels, lowest, count)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    return kept.sum(dtype=torch.float64).item() / (len(labels) - sizes[classes]).sum().item()


def measure(case: Case, embeddings: Tensor, labels: Tensor, variants: tuple[str, ...]) -> Record:
    """The measurements on embeddings (N, D), for the JSON. The embeddings are not changed.

    Raises:
        Wrong: a result is wrong, or cannot be checked.
    """
    batch = Batch(embeddings.detach().clone().requires_grad_(), labels, None, None)
    truth = find_truth(case, batch)
    if truth.batch is not batch:
        raise Wrong(f"N = {case.n:,} cannot be checked as a whole within the memory limit and without the extension")
    steps = {variant: make_step(variant, case, batch) for variant in variants}
    checks: Record = {}
    for variant in variants:
        verdict = judge(steps[variant], truth)
        checks[variant] = verdict.record(truth)
        if not verdict.right and variant in OURS:
            raise Wrong(f"{variant}: {verdict.words}")
        if not verdict.right:
            del steps[variant]
    with flashpair.screening() as seen:
        steps[OURS[0]]()
    others = machine.OtherLoad()
    times = interleave(steps, case.options)
    return {
        "live_share": exact_live_share(embeddings, labels),
        "screening": asdict(seen),
        "checks": checks,
        "seconds": {v: t.record() for v, t in times.items() if isinstance(t, Times)},
        "cores_used_by_others": others.cores(),
    }


def over_the_run(points: list[Record], variant: str) -> float | None:
    """Seconds that the loss takes in all steps, linearly interpolated between the points that have `variant`."""
    found = [(p["step"], p["seconds"][variant]["median"]) for p in points if variant in p["seconds"]]
    if len(found) < 2:
        return None
    at, seconds = zip(*found, strict=True)
    return torch.trapezoid(torch.tensor(seconds, dtype=torch.float64), torch.tensor(at)).item()


def run(training: Training, steps: int, count: int, options: Options, progress: Progress) -> Record:
    """Trains for so many steps and measures at about `count` of them."""
    case = Case(replace(options, per_class=training.per_class), training.n, training.d)
    logged = logged_steps(steps, count)
    with_baseline = {logged[round(k * (len(logged) - 1) / (BASELINE_POINTS - 1))] for k in range(BASELINE_POINTS)}
    progress.doing(f"{training.title}: {BASELINE} in a process of its own")
    baseline = sandbox.attempt(case, BASELINE)
    if not baseline.ok:
        progress.say(f"{training.title}: without {BASELINE}: {baseline.words}")
    criterion = flashpair.MultiSimilarityLoss(epsilon=EPSILON)
    optimizer = torch.optim.Adam(training.net.parameters(), lr=training.learning_rate)
    points: list[Record] = []
    before = training.evaluate(training.net)
    for step, (inputs, labels) in zip(range(steps + 1), training.batches, strict=False):
        progress.doing(f"{training.title}: step {step:,} of {steps:,}")
        embeddings = training.net(inputs)
        loss = criterion(embeddings, labels)
        if step in logged:
            variants = (*OURS, BASELINE) if baseline.ok and step in with_baseline else OURS
            found = measure(case, embeddings, labels, variants)
            points.append({"step": step, "loss": loss.item(), **found})
            progress.say(f"{training.title}: {training_report.told(points[-1])}")
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress.advance()
    return {
        "title": training.title, "n": training.n, "d": training.d, "per_class": training.per_class, "steps": steps,
        "learning_rate": training.learning_rate,
        "retrieval": {"before": before, "after": training.evaluate(training.net)},
        "baseline": "" if baseline.ok else baseline.words,
        "run_seconds": {v: over_the_run(points, v) for v in (*OURS, BASELINE)},
        "points": points,
    }  # fmt: skip


def study(
    trainings: dict[str, tuple[Training, int]],
    count: int,
    options: Options,
    progress: Progress,
    save: Callable[[Record], object] = lambda document: None,
) -> Record:
    """The document that becomes the JSON, of trainings with their steps; `save` gets it after each."""
    document: Record = {
        "what": "flashpair bench: mined Multi-Similarity alone, forward and backward, over whole trainings",
        "units": "seconds; live_share: of the negatives of all anchors; run_seconds: of the loss in all steps together",
        "kind": "training",
        "machine": machine.describe(),
        "options": asdict(options),
        "runs": {},
    }
    progress.start(sum(steps + 1 for _, steps in trainings.values()))
    for name, (training, steps) in trainings.items():
        document["runs"][name] = run(training, steps, count, options, progress)
        save(document)
    return document


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench training", description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=400, help="of either training (400)")
    p.add_argument("--logged", type=int, default=30, metavar="COUNT", help="steps to measure at, about (30)")
    p.add_argument("--batch", type=int, default=4096, metavar="N", help="of the synthetic training (4096)")
    add_common(p, Options(1, 1, warmup=0, time_limit=10.0))
    p.add_argument("--plot", type=Path, metavar="FILE.json", help="only redraw the PNG beside this file")
    add_table(p)
    return p


def main(arguments: list[str] | None = None) -> None:
    p = parser()
    given = vars(p.parse_args(arguments))
    if given["table"]:
        print(training_report.markdown(report.read(given["table"])))
        return
    if given["plot"]:
        print(training_report.draw(report.read(given["plot"]), given["plot"].with_suffix(".png")))
        return
    steps, count, n, seed = given["steps"], given["logged"], given["batch"], given["seed"]
    if steps < 1 or count < 2 or n < 2 * PER_CLASS or n % PER_CLASS:
        p.error(f"takes steps from 1, logged from 2 and a batch of whole classes, got {steps}, {count} and {n}")
    options = options_of(p, given)
    trainings = {"digits": (digits(steps + 1, seed), steps), "synthetic": (synthetic(n, seed), steps)}
    with Progress() as progress:
        document = study(trainings, count, options, progress, lambda document: report.write(document, given["out"]))
    path = report.write(document, given["out"])
    training_report.print_table(document)
    print(path)
    print(training_report.draw(document, path.with_suffix(".png")))
