"""Times, interleaved: every variant once a round, so that a machine that slows down slows them all."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .options import Options
from .variants import Step

SAMPLE_SECONDS = 0.005  # shorter steps are repeated within a sample, up to MOST times
MOST = 50
APART = 5  # steps of a sample of launch or device time: few enough for a GPU's queue of launches
CYCLES_A_SECOND = 2e9  # of a GPU, about
LONGEST_SLEEP = 0.5  # seconds


class Times(NamedTuple):
    """Seconds of a step in each timed round, each a mean of `steps` back to back."""

    samples: list[float]
    steps: int

    def record(self) -> dict[str, Any]:
        low, middle, high = quartiles(self.samples)
        return {
            "median": middle,
            "q1": low,
            "q3": high,
            "samples": self.samples,
            "steps_per_sample": self.steps,
        }


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def _finish() -> None:
    """Waits until the GPU has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Waits(Exception):
    """A step whose launch and device times cannot be told apart."""


def _apart(step: Step, count: int, before: float) -> tuple[float, float]:
    """Seconds that the CPU takes to launch a step, and that the GPU takes to run what was launched.

    The GPU sleeps first, so that the CPU is done before the GPU begins.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _finish()
    torch.cuda._sleep(int(CYCLES_A_SECOND * min(LONGEST_SLEEP, 0.02 + 4 * count * before)))
    start.record()
    began = time.perf_counter()
    for _ in range(count):
        step()
    launched = time.perf_counter() - began
    waited = start.query()
    end.record()
    end.synchronize()
    if waited:
        raise Waits("it waits for the GPU before it is launched as a whole")
    return launched / count, start.elapsed_time(end) / 1e3 / count


def _sample(step: Step, count: int, phase: str = "step", before: float = 0.0) -> float:
    if phase in ("launch_overhead", "device"):
        return _apart(step, count, before)[phase == "device"]
    _finish()
    start = time.perf_counter()
    for _ in range(count):
        step()
    _finish()
    return (time.perf_counter() - start) / count


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """Excludes existing objects from garbage collections inside, which would otherwise take longer than a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_quick_collection()
def interleave(
    steps: dict[str, Step], options: Options, tick: Callable[[], None] = lambda: None
) -> dict[str, Times | Exception]:
    """Rounds over `steps`, each starting one variant later.

    A variant that has used up the time limit gets no further round, but at least one timed round. A variant that fails
    is dropped, and its error is its result.
    """
    counts: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, Exception] = {}
    spent = dict.fromkeys(steps, 0.0)
    names = list(steps)
    wall: dict[str, float] = {}
    for name in names:  # how many steps make a sample; a warm-up too
        try:
            wall[name] = _sample(steps[name], 1)
            most = MOST if options.phase in ("step", "forward") else APART
            counts[name] = min(most, max(1, round(SAMPLE_SECONDS / max(wall[name], 1e-9))))
        except Exception as error:
            failed[name] = error
    for turn in range(options.warmup + options.repeats):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            timed = turn >= options.warmup
            if name in failed or (spent[name] > options.time_limit and (found[name] or not timed)):
                continue
            gc.collect()
            try:
                seconds = _sample(steps[name], counts[name], options.phase, wall[name])
            except Exception as error:
                failed[name] = error
                continue
            spent[name] += seconds * counts[name]
            if timed:
                found[name].append(seconds)
        tick()
    return {name: failed.get(name) or Times(found[name], counts[name]) for name in names}
