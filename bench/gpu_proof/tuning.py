"""Candidates for a row of kernels/configs.py: how one is put in place of the shipped row, and timed by kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .accelerator import Accelerator
from .cases import TruthCase, main_cases
from .plan import Plan, Tile

FORWARD, BACKWARD = "reduce_rows", "backward_rows"  # the kernels that tiles are chosen for


def candidates(plan: Plan) -> list[Tile | None]:
    """None: the row that is shipped."""
    return [None, *plan.sweep]


def candidate_name(loss: str, tile: Tile | None) -> str:
    return f"sweep {loss} " + ("shipped" if tile is None else "x".join(map(str, tile)))


def gates(plan: Plan) -> list[TruthCase]:
    """What a candidate has to be right on. Its kernels are those of the batch that is timed: both sizes are multiples
    of 16 in all that kernels are specialised by."""
    return main_cases(plan, plan.sweep_n[0])


def row(shipped: Any, forward: Tile, backward: Tile) -> Any:
    """The shipped Config with a candidate's tile, each pass with its own warps, stages and registers."""
    return shipped._replace(
        rows=forward.rows, cols=forward.cols, forward=(forward.warps, forward.stages),
        backward=(backward.warps, backward.stages), registers=(forward.registers, backward.registers),
    )  # fmt: skip


@contextlib.contextmanager
def chosen(forward: Tile | None, backward: Tile | None = None) -> Iterator[None]:
    """The engine takes this candidate (of one, in both passes) for every width; None: what is shipped.

    Columns are not shared among programs, as in a large batch, so that a small one is served by the same kernels.
    """
    from flashpair.backends.triton.kernels import configs

    from flashpair.backends.triton import launch

    before, splits = configs.choose, launch.choose_splits
    launch.choose_splits = lambda *of: 1
    if forward is not None:
        configs.choose = lambda *of: row(before(*of), forward, backward or forward)
    try:
        yield
    finally:
        configs.choose = before
        launch.choose_splits = splits


@contextlib.contextmanager
def timed_kernels(gpu: Accelerator) -> Iterator[Callable[[], dict[str, float]]]:
    """Seconds of each of the two kernels, all launches together, since the last time that it was asked."""
    from flashpair.backends.triton import launch

    before, seen = launch.run, list[tuple[str, Callable[[], float]]]()

    def run(kernel: Any, *args: Any, **more: Any) -> Any:
        stop = gpu.watch()
        found = before(kernel, *args, **more)
        seen.append((kernel.fn.__name__, stop()))
        return found

    def take() -> dict[str, float]:
        gpu.synchronize()
        total = {FORWARD: 0.0, BACKWARD: 0.0}
        for name, read in seen:
            if name in total:
                total[name] += read()
        seen.clear()
        return total

    launch.run = run
    try:
        yield take
    finally:
        launch.run = before
