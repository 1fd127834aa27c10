"""`python -m flashpair reality-check`: compares losses on your own data, or on handwritten digits."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ...core import checks
from ...core.extras import extra
from ..import_target import named
from .losses import LOSSES
from .protocol import SAMPLERS, Protocol

NAME = "reality-check"
HELP = "compare losses fairly: cross-validation over classes, a search for each loss's settings, repeats with intervals"
FLAGS = {
    "trials": "settings tried for a loss", "repeats": "trainings with the best of them",
    "sampler": "optuna's sampler of settings", "folds": "partitions of the training classes",
    "embedding_size": "of a model", "batch_size": "samples of a step", "per_class": "of them of a class",
    "iterations": "steps of an epoch", "evaluate_every": "epochs between validations",
    "patience": "epochs without improvement that end a training", "max_epochs": "that a training has at most",
    "learning_rate": "of Adam", "seed": "of everything",
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="digits", help="digits (default), FILE.npz, or a folder of class folders")
    parser.add_argument(
        "--losses", default="contrastive,triplet_margin,multi_similarity,nt_xent,normalized_softmax", metavar="NAMES",
        help=f"with commas: {', '.join(LOSSES)}; or FILE.py:Name, a Criterion of your own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of results, to go on in (default: reality-check-DATA)")
    parser.add_argument("--network", help="FILE.py:Name, called with a sample's shape and the embedding size")
    parser.add_argument("--image-size", type=int, default=32, help="of a folder's images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="that networks are trained on (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the CPU; small networks gain nothing from more (default: %(default)s)",
    )
    for field in fields(Protocol):
        kind: Any = {"choices": SAMPLERS} if field.name == "sampler" else {"type": type(field.default)}
        flag, said = f"--{field.name.replace('_', '-')}", f"{FLAGS[field.name]} (default: %(default)s)"
        parser.add_argument(flag, default=field.default, help=said, **kind)


def main(given: argparse.Namespace) -> int:
    """Runs the command. Raises ValueError for invalid arguments or data, and ImportError that says what to install."""
    with extra("reality-check", "reality-check"):  # also what is needed only at the end
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
        import optuna  # noqa: F401
        import scipy  # noqa: F401
        from rich.console import Console
    from . import report
    from .data import load, usable
    from .networks import network
    from .progress import Bars
    from .study import run

    usable(given.device)
    protocol = Protocol(**{field.name: getattr(given, field.name) for field in fields(Protocol)})
    torch.set_num_threads(checks.integer(given.threads, "threads", at_least=1))
    console = Console(markup=False)  # names of files and losses are shown as they are
    out = given.out or Path(f"reality-check-{Path(given.data).resolve().stem or 'data'}")
    make = named(given.network) if given.network else network
    names = [name.strip() for name in given.losses.split(",") if name.strip()]
    if not names:
        raise ValueError(f"losses must name at least one, got {given.losses!r}")
    with Bars(console) as bars:
        data = load(given.data, given.image_size, lambda done, of: bars.at("images", done, of, given.data))
        data = replace(data, device=given.device)
        outcomes = run(data, names, protocol, out, make, bars)
    report.write(outcomes, data, protocol, out)
    console.print(f"{data.title}\nTest classes: mean of {protocol.repeats} repeats ± half of the 95 % interval\n")
    for table in (*report.tables(outcomes, protocol), report.settings_table(outcomes)):
        console.print(table, "")
    console.print(f"Numbers: {out / 'results.json'}, picture: {out / 'results.png'}", soft_wrap=True)
    return 0
