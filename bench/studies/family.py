"""One table of every loss of the library, one training step each: `python -m bench family`.

It runs one case of suite.py for each row of family_cases.py: flashpair, its dense reference, pytorch-metric-learning's
loss of the same kind, and the GEMM bound. Each is tried in a process of its own, checked against float64, then timed by
turns. `--million` runs the losses against class weights: 512 embeddings, a million classes, the whole process's memory.
`--table FILE.json` only prints the table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..harness import report, suite
from ..harness.arguments import add_common, add_table, names, options_of
from ..harness.cases import Case
from ..harness.options import DATA, DTYPES, GEMM_BOUND, Options
from ..harness.progress import Progress
from ..harness.report import Document
from . import family_report
from .family_cases import FAMILY

OURS = ("flashpair", "reference")
BASELINE = "pytorch-metric-learning"
QUICK = {"n": 512, "repeats": 3, "time_limit": 5.0}
MILLION = {"n": 512, "num_classes": 1_000_000, "repeats": 3, "memory_limit": 6.0}
GROUPS = {
    "all": tuple(FAMILY),
    "pairs": tuple(name for name, family in FAMILY.items() if not family.centres),
    "classes": tuple(name for name, family in FAMILY.items() if family.centres),
}


def case_of(options: Options, loss: str) -> Case:
    """A baseline takes part only where it has the loss."""
    baselines = (BASELINE,) if FAMILY[loss].baseline else ()
    return Case(
        replace(options, loss=loss, variants=(*OURS, *baselines, GEMM_BOUND)), options.sizes[0], options.dims[0]
    )


def run(
    options: Options,
    losses: tuple[str, ...],
    progress: Progress,
    save: Callable[[Document], object] = lambda document: None,
) -> Document:
    """As suite.run, for the first size and width, with a case for each loss; `save` gets the document after each."""
    document = suite.new_document(replace(options, loss="all"))
    kind = "classes" if all(FAMILY[loss].centres for loss in losses) else "family"
    document.update(kind=kind, losses=list(losses), num_classes=options.num_classes)
    cases = {loss: case_of(options, loss) for loss in losses}
    progress.start(sum(2 * len(case.options.variants) for case in cases.values()))
    for loss, case in cases.items():
        progress.say(FAMILY[loss].shown)
        result = suite.run_case(case, {}, progress)
        family = FAMILY[loss]
        head = {
            "loss": loss,
            "shown": family.shown,
            "class_weights": family.centres > 0,
            "columns": case.pairs_shape[1],
        }
        document["cases"].append({**head, **result})
        save(document)
        gc.collect()
    return document


def some_losses(text: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in names(text):
        if name not in FAMILY and name not in GROUPS:
            raise argparse.ArgumentTypeError(f"takes {', '.join((*GROUPS, *FAMILY))}, got {name!r}")
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench family", description=__doc__.split("\n")[0])
    default = Options(1, 1)
    p.add_argument("--n", type=int, default=4096, help="batch size")
    p.add_argument("--dim", type=int, default=128, help="embedding width")
    p.add_argument("--per-class", type=int, default=default.per_class, help="samples of each class")
    p.add_argument(
        "--classes", dest="num_classes", type=int, default=default.num_classes, help="of losses with weights"
    )
    p.add_argument("--losses", type=some_losses, help=f"{', '.join(GROUPS)}, or names of bench/studies/family_cases.py")
    p.add_argument("--data", choices=DATA, default=default.data, help="trained: mining leaves few pairs")
    p.add_argument("--dtype", choices=DTYPES, default=default.dtype)
    add_common(p, default)
    p.add_argument("--quick", action="store_true", help=f"other defaults: {_said(QUICK)}")
    p.add_argument("--million", action="store_true", help=f"losses with weights, other defaults: {_said(MILLION)}")
    add_table(p)
    return p


def _said(defaults: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', '-')} {v:,}" for k, v in defaults.items())


def main(arguments: list[str] | None = None) -> None:
    p = parser()
    asked = p.parse_args(arguments)
    if asked.table:
        print(family_report.markdown(report.read(asked.table)))
        return
    p.set_defaults(**(MILLION if asked.million else {}) | (QUICK if asked.quick else {}))
    given = vars(p.parse_args(arguments))
    options = options_of(
        p, {**given, "sizes": (given["n"],), "dims": (given["dim"],), "variants": (*OURS, BASELINE, GEMM_BOUND)}
    )
    one = tuple(loss for loss in GROUPS["classes"] if FAMILY[loss].centres == 1)
    losses = given["losses"] or (one if asked.million else GROUPS["all"])
    with Progress() as progress:
        document = run(options, losses, progress, lambda document: report.write(document, given["out"]))
    path = report.write(document, given["out"])
    print(family_report.markdown(document))
    print(f"\n{path}")
