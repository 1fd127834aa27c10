"""Times, interleaved: every variant once a round, so that a machine that slows down slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .options import Options
from .variants import Step

SAMPLE_SECONDS = 0.005  # shorter steps are repeated within a sample, up to MOST times
MOST = 50


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
    """What was launched on a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _sample(step: Step, count: int) -> float:
    _finish()
    start = time.perf_counter()
    for _ in range(count):
        step()
    _finish()
    return (time.perf_counter() - start) / count


def interleave(
    steps: dict[str, Step], options: Options, tick: Callable[[], None] = lambda: None
) -> dict[str, Times | Exception]:
    """Rounds over `steps`, each starting one variant later.

    A variant that has used up the time limit sits out the rest, but not before one timed round; one that
    fails is dropped, and its error is its result.
    """
    counts: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, Exception] = {}
    spent = dict.fromkeys(steps, 0.0)
    names = list(steps)
    for name in names:  # how many steps make a sample; a warm-up too
        try:
            counts[name] = min(MOST, max(1, round(SAMPLE_SECONDS / max(_sample(steps[name], 1), 1e-9))))
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
                seconds = _sample(steps[name], counts[name])
            except Exception as error:
                failed[name] = error
                continue
            spent[name] += seconds * counts[name]
            if timed:
                found[name].append(seconds)
        tick()
    return {name: failed.get(name) or Times(found[name], counts[name]) for name in names}
