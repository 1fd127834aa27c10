"""Confidence intervals of a mean over repeated runs. Needs SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..core.extras import extra


class Interval(NamedTuple):
    """``mean`` plus or minus ``half_width``, in the units of the runs; the result of `confidence_interval`.

    Attributes:
        mean: of the runs.
        half_width: half the interval's width; NaN for a single run.
    """

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if math.isnan(self.half_width) else f"{self.mean:.2f} ± {self.half_width:.2f}"


def confidence_interval(runs: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent runs: mean +- t s / sqrt(n), with s their standard deviation.

    Args:
        runs: two or more numbers; a single one has no interval (NaN).
        confidence: above 0 and below 1.

    Shape:
        - runs: n numbers.
        - output: `Interval`, two numbers.

    Returns:
        An `Interval`.

    Raises:
        TypeError: runs is not a sequence.
        ValueError: no runs, or a confidence out of its range.
        ImportError: SciPy is not installed.

    Examples:
        >>> str(flashpair.metrics.confidence_interval([68.0, 67.0, 69.0]))
        '68.00 ± 2.48'
    """
    with extra("metrics", "confidence_interval"):
        from scipy import stats

    if isinstance(runs, (str, bytes, dict)) or not isinstance(runs, Iterable):
        raise TypeError(f"runs must be a sequence of numbers, got {runs!r}")
    runs = [float(run) for run in runs]
    if not len(runs) or not 0 < confidence < 1:
        raise ValueError(f"runs must not be empty and confidence between 0 and 1, got {list(runs)} and {confidence}")
    if len(runs) == 1:
        return Interval(float(runs[0]), math.nan)
    t = stats.t.ppf((1 + confidence) / 2, len(runs) - 1)
    return Interval(statistics.fmean(runs), float(t) * statistics.stdev(runs) / math.sqrt(len(runs)))
