"""The demo: train on the digits 0-4, retrieve the digits 5-9: `python -m bench demo`.

Each training digit in each of eight orientations is a class of its own, 40 in all; the unseen digits are
shown as they are. A small convolutional network is trained with the Multi-Similarity loss, once with the
implementation that flashpair chooses and again with the dense reference, from the same weights and batches.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flashpair
from flashpair.engine import dispatch
from flashpair.metrics import retrieval

from ..harness import report
from . import plot as demo_plot

ROOT = Path(__file__).resolve().parents[2]
BASELINES = "flashpair,reference,pytorch-metric-learning,gemm_bound"
BENCHMARK = ("--sizes", "1024,3072,8192", "--variants", BASELINES, "--repeats", "2", "--time-limit", "6")
PER_CLASS = 8
LEARNING_RATE = 3e-3
MEANING = """\
[bold]P@1[/]          how often the nearest image shows the same digit
[bold]R-Precision[/]  how many of the R nearest do, R being all there are of that digit
[bold]MAP@R[/]        the same, with mistakes near the top costing more
[bold]difference[/]   of the loss from the reference's: the largest over all steps, relative
[bold]nudged[/]       started with every weight one rounding away"""


class Digits(NamedTuple):
    """Args:
    classes: the 40 training classes, (n, 1, 8, 8) float32 each, between 0 and 1.
    images, labels: the unseen digits, (N, 1, 8, 8) float32 and (N,) int64.
    """

    classes: list[Tensor]
    images: Tensor
    labels: Tensor


class Setting(NamedTuple):
    """One training run; `nudged`: it starts with every weight one rounding away."""

    impl: str
    dtype: torch.dtype
    nudged: bool = False

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        chosen = implementation()
        auto = chosen if chosen != "reference" else "auto (the reference)"
        return f"{auto if self.impl == 'auto' else self.impl}{' nudged' * self.nudged}, {self.precision}"


SETTINGS = (
    Setting("auto", torch.float32),
    Setting("reference", torch.float32),
    Setting("reference", torch.float32, nudged=True),
    Setting("auto", torch.float64),
    Setting("reference", torch.float64),
)


def implementation() -> str:
    """What ``impl="auto"`` is on this machine's CPU."""
    return dispatch.route_pairs("auto", torch.empty(1, 1), None).backend


@contextmanager
def one_thread() -> Iterator[None]:
    """The network is too small to gain from more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load() -> Digits:
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (pixels / 16).float().view(-1, 1, 8, 8)
    seen = [images[labels == digit] for digit in range(5)]
    turned = [x.rot90(k, (2, 3)) for x in seen + [x.flip(3) for x in seen] for k in range(4)]
    return Digits(turned, images[labels >= 5], labels[labels >= 5])


def batches(classes: list[Tensor], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches, PER_CLASS of each class, moved by up to a pixel: images (B, 1, 8, 8), labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(classes)).repeat_interleave(PER_CLASS)
    for _ in range(steps):
        picked = [x[torch.randperm(len(x), generator=generator)[:PER_CLASS]] for x in classes]
        windows = nn.functional.pad(torch.cat(picked), (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
        down, right = torch.randint(3, (2, len(labels)), generator=generator)
        yield windows[torch.arange(len(labels)), :, down, right], labels


def network(seed: int, nudged: bool = False) -> nn.Module:
    """A network of images (B, 1, 8, 8) to embeddings (B, 64)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, 64)),
        )
        for weight in net.parameters() if nudged else ():
            weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.randn_like(weight).sign())
    return net


@torch.no_grad()
def evaluate(net: nn.Module, digits: Digits, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return judged(net(digits.images.to(dtype)), digits.labels)


def judged(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """P@1, R-Precision and MAP@R, as JSON takes them."""
    found = retrieval(embeddings, labels)._asdict()
    return {name: found[name] for name in demo_plot.METRICS}


def train(digits: Digits, setting: Setting, steps: int, seed: int, tick: Callable[[str], object]) -> dict[str, Any]:
    """One run, as JSON takes it; `tick` gets its name after each step.

    ``losses``, one a step, are those trained on; ``eager`` and ``truth`` are the reference's on the same
    embeddings, as they are and in float64; ``after`` is the retrieval of the unseen digits.
    """
    net = network(seed, setting.nudged).to(setting.dtype)
    criterion = flashpair.MultiSimilarityLoss(impl=setting.impl)
    reference = flashpair.MultiSimilarityLoss(impl="reference")
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    curves: dict[str, list[float]] = {"losses": [], "eager": [], "truth": []}
    for images, labels in batches(digits.classes, steps, seed):
        embeddings = net(images.to(setting.dtype))
        loss = criterion(embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fixed = embeddings.detach()
        curves["losses"].append(loss.item())
        curves["eager"].append(reference(fixed, labels).item())
        curves["truth"].append(reference(fixed.double(), labels).item())
        tick(setting.name)
    return {**curves, "after": evaluate(net, digits, setting.dtype)}


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves over the steps."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) / max(abs(b), sys.float_info.min) for a, b in pairs)


@one_thread()
def study(digits: Digits, steps: int, seed: int, tick: Callable[[str], object]) -> dict[str, Any]:
    """All runs and what they start from, as JSON takes it."""
    runs = {s.name: train(digits, s, steps, seed, tick) for s in SETTINGS}
    for setting in SETTINGS:
        run = runs[setting.name]
        run["reference"] = Setting("reference", setting.dtype).name
        run["difference"] = difference(run["losses"], runs[run["reference"]]["losses"])
    start = {"raw pixels": evaluate(nn.Flatten(), digits), "untrained": evaluate(network(seed), digits)}
    return {
        "versions": {"flashpair": flashpair.__version__, "torch": torch.__version__},
        "implementation": implementation(),
        "steps": steps,
        "seed": seed,
        "start": start,
        "runs": runs,
    }


def run_study(console: Console, digits: Digits, steps: int, seed: int) -> dict[str, Any]:
    """`study` with a bar for each run."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {s.name: progress.add_task(s.name, total=steps) for s in SETTINGS}
        return study(digits, steps, seed, lambda name: progress.advance(tasks[name]))


def table(document: dict[str, Any]) -> Table:
    """Retrieval of the unseen digits before and after, and how far the curves are apart."""
    found = Table("", "P@1", "R-Precision", "MAP@R", "last loss", "difference", box=None, pad_edge=False)
    for column in found.columns[1:]:
        column.justify = "right"
    for name, before in document["start"].items():
        found.add_row(name, *(f"{value:.3f}" for value in before.values()))
    for name, run in document["runs"].items():
        apart = "" if name == run["reference"] else f"{run['difference']:.1e}"
        after = (f"{value:.3f}" for value in run["after"].values())
        found.add_row(name, *after, f"{run['losses'][-1]:.3f}", apart)
    return found


def explain(console: Console, document: dict[str, Any]) -> None:
    """The table and what its differences say."""
    console.print(table(document), "", MEANING, "", sep="\n")
    chosen = document["implementation"]
    if chosen == "reference":
        console.print("Both curves are the reference's: they agree, and say nothing about the kernels.")
        return
    own, _, nudged, double, _ = (document["runs"][setting.name] for setting in SETTINGS)
    eps = torch.finfo(torch.float32).eps
    console.print(
        f"Given the same embeddings in float32, {chosen} and the reference differ by "
        f"[bold]{difference(own['losses'], own['eager']):.1e}[/] at most, at any step; "
        f"one rounding of float32 is {eps:.1e}.\n"
        f"Each training on its own, they differ by [bold]{double['difference']:.1e}[/] in float64 and by "
        f"{own['difference']:.1e} in float32, where a rounding may turn a ReLU, a pooling or a mining decision: "
        f"the nudged reference differs by {nudged['difference']:.1e} from itself."
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=100, help="training steps of each run (100)")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    p.add_argument("--out", type=Path, default=Path("demo-results"), metavar="FOLDER", help="(demo-results)")
    p.add_argument("--no-bench", action="store_true", help="skip the large batches")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Exit status: the benchmark's, 0 without it."""
    p = parser()
    given = p.parse_args(arguments)
    if given.steps < 1:
        p.error(f"--steps must be at least 1, got {given.steps}")
    console, began, digits = Console(highlight=False), time.perf_counter(), load()
    given.out.mkdir(parents=True, exist_ok=True)

    console.rule("[bold]flashpair: digits never seen in training", align="left")
    console.print(
        f"Training on the digits 0-4, {sum(map(len, digits.classes)) // 8} images in 8 orientations, 40 "
        f"classes; retrieving the digits 5-9, {len(digits.images)} images.\n"
        f"Multi-Similarity loss, {given.steps} steps of {len(digits.classes) * PER_CLASS} images."
    )
    reasons = "; ".join(dispatch.unsupported_reasons("tiled", digits.images.device))
    why = f", the slow path: {reasons}" if reasons else ""
    console.print(f'impl="auto" is [bold]{implementation()}[/] here{why}.\n')
    document = run_study(console, digits, given.steps, given.seed)
    explain(console, document)
    report.save(document, given.out / "demo.json")
    demo_plot.draw(document, given.out / "demo.png")
    console.print(f"\nPicture: {given.out / 'demo.png'}, numbers: {given.out / 'demo.json'}")

    status = 0
    if not given.no_bench:
        console.rule("[bold]Large batches on this machine", align="left")
        command = [sys.executable, "-m", "bench", "step", *BENCHMARK, "--out", str(given.out.resolve())]
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            console.print(f"[red]The benchmark failed with status {status}.[/]")
    console.print(f"\nTook {time.perf_counter() - began:.0f} s in all.")
    return status
