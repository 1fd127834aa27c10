"""What hard negative class mining is worth: `python -m bench class_mining` trains with random and with mined classes.

The classes are synthetic, so the answer is known. In one world they come in groups, as breeds do: groups differ much,
and two classes of a group differ little. A random batch has few classes of one group. In the other world all classes
are equally far apart. Recall@1 is measured on as many unseen classes of the same kind. Nothing is timed: the cost of
mining is that of embedding the candidates.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

import flashpair
from flashpair.metrics import confidence_interval, retrieval
from flashpair.samplers import ClassSampler, HardClassSampler, NPairsSampler

from ..harness import machine, report
from ..harness.arguments import RUNS, add_table

KINDS = ("random", "max", "sum")
WORLDS = {"groups of ten": (100, 10), "no groups": (1000, 1)}
INPUTS, EMBEDDING = 64, 32
WITHIN, FINE, NUISANCE = 0.15, 0.5, 0.5  # standard deviations: in a class, of classes in a group, of noise features


class Samples(NamedTuple):
    """Inputs (N, 64), and labels (N,)."""

    inputs: Tensor
    labels: Tensor


def world(groups: int, classes: int, each: int, seed: int) -> tuple[Samples, Samples]:
    """Samples to train on, and as many of other classes to test: `groups` of `classes` with `each` samples."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mix = torch.linalg.qr(random(INPUTS, INPUTS))[0]

    def some() -> Samples:
        labels = torch.arange(groups * classes).repeat_interleave(each)
        centres = torch.cat(
            [2 * random(groups, 8).repeat_interleave(classes, 0), FINE * random(groups * classes, 8)], 1
        )
        shown = centres[labels] + WITHIN * random(len(labels), 16)
        return Samples(torch.cat([shown, NUISANCE * random(len(labels), INPUTS - 16)], 1) @ mix, labels)

    return some(), some()


def recall(kind: str, seen: Samples, unseen: Samples, steps: int, batch: int, seed: int) -> float:
    """Recall@1 of unseen classes after a training on `batch` classes a step."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, EMBEDDING))
    sampler: ClassSampler = NPairsSampler(seen.labels, batch, batches=steps, seed=seed)
    if kind != "random":
        sampler = HardClassSampler(
            seen.labels, lambda places: network(seen.inputs[places]), batch, aggregate=kind, batches=steps, seed=seed
        )
    criterion = flashpair.NPairsLoss(l2_weight=1e-3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for places in sampler:
        loss = criterion(network(seen.inputs[places]), seen.labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return retrieval(network(unseen.inputs), unseen.labels, recall_at=(1,)).recall[1]


def markdown(document: dict[str, Any]) -> str:
    """Recall@1 by world and aggregate, the mean of the seeds, and what mining gains with its 95 % interval."""
    lines = ["| Recall@1, % | " + " | ".join(KINDS) + " | max less random |", "|---|" + "---:|" * (len(KINDS) + 1)]
    for name, of in document["recall"].items():
        gain = [100 * (a - b) for a, b in zip(of["max"], of["random"], strict=True)]
        cells = (f"{100 * statistics.fmean(of[kind]):.1f}" for kind in KINDS)
        lines.append(f"| {name} | {' | '.join(cells)} | {confidence_interval(gain)} |")
    steps, seeds = document["steps"], document["seeds"]
    return "\n".join([*lines, "", f"{steps} steps of {document['batch']} classes; the mean of {seeds} seeds."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench class_mining", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="classes in a batch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RUNS / "class-mining.json")
    add_table(parser)
    given = parser.parse_args(arguments)
    if given.table:
        print(markdown(report.read(given.table)))
        return 0
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in WORLDS}
    for seed in track(range(given.seeds), "seeds"):
        for name, (groups, classes) in WORLDS.items():
            seen, unseen = world(groups, classes, 4, seed)
            for kind in KINDS:
                found[name][kind].append(recall(kind, seen, unseen, given.steps, given.batch, seed))
    document: dict[str, Any] = {
        "what": "Recall@1 of unseen classes after N-pair training on random and on mined classes (Sohn 2016)",
        "machine": machine.describe(), "recall": found,
        **{name: getattr(given, name) for name in ("steps", "batch", "seeds")},
    }  # fmt: skip
    report.save(document, given.out)
    print(markdown(document))
    return 0
