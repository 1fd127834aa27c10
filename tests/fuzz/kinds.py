"""The kinds of cases: each draws one from a seed and runs it. A run's result is empty, or what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import losses, memories, neighbours, oracles, reductions
from .case import Case
from .compare import failure


class Kind(NamedTuple):
    draw: Callable[[int, tuple[str, ...]], Case]
    run: Callable[[Case], str]


def run_loss(case: Case) -> str:
    given = losses.inputs(case)
    found = losses.evaluate(case, given, case.impl)

    def sample(batch):  # type: ignore[no-untyped-def]
        return losses.evaluate(
            case.with_(dtype="float64" if batch.x.dtype == torch.float64 else "float32"), batch, "reference"
        )

    truths = {"the reference": losses.evaluate(case, given, "reference", wide=True)}
    if oracles.knows(case, given):
        of = {k: v for k, v in truths["the reference"].items() if k.startswith("scale")}
        truths["the formula"] = {**oracles.evaluate(case, given), **of}
    for name, truth in truths.items():
        if words := failure(case, given, found, truth, sample):
            return f"against {name}, {words}"
    return ""


KINDS = {
    "losses": Kind(losses.draw, run_loss),
    "reduce": Kind(reductions.draw, reductions.run),
    "neighbours": Kind(neighbours.draw, neighbours.run),
    "memories": Kind(memories.draw, memories.run),
}


def run(case: Case) -> str:
    """What is wrong with the case's result, an error among it."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return KINDS[{"loss": "losses"}.get(case.kind, case.kind)].run(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(before)
