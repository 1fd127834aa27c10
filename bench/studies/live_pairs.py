"""What a step of mined Multi-Similarity costs over the share of pairs that mining leaves: `python -m bench live_pairs`.

Each share is one case of suite.py: `trained` data of cases.py, whose noise is found by bisection. The last case is
random data. The time of a variant of ONCE hardly depends on the share, so it is measured at the two ends only.
`python -m bench step --plot FILE.json` draws the JSON of this, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace

from ..harness import plot, report, suite
from ..harness.arguments import add_batches, add_common, add_table, options_of
from ..harness.cases import Case, live_share, make_batch
from ..harness.options import GEMM_BOUND, Options
from ..harness.progress import Progress
from ..harness.report import Document, percent

SHARES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)
ONCE = ("pytorch-metric-learning",)
VARIANTS = ("flashpair", "flashpair-tiled", *ONCE, GEMM_BOUND)
INTRINSIC = 32  # with 8, as elsewhere, centres alone are near enough to leave 0.05 % of the pairs
NOISES = (0.01, 100.0)
HALVINGS = 40
CLOSE, NEAR = 0.01, 0.2  # relative to the share: where the search ends, and what it may end with


def find_noise(case: Case, share: float) -> Case:
    """`case` with the noise at which mining leaves that share of the negatives, as `live_share` samples them.

    Raises:
        ValueError: there is none.
    """
    low, high = NOISES
    for _ in range(HALVINGS):
        noise = math.sqrt(low * high)
        found = case._replace(options=replace(case.options, noise=noise))
        had = live_share(make_batch(found))
        if abs(had / share - 1) < CLOSE:
            break
        low, high = (noise, high) if had < share else (low, noise)
    if abs(had / share - 1) > NEAR:
        raise ValueError(f"no noise leaves {percent(share)} of the pairs of N = {case.n:,}: the nearest {percent(had)}")
    return found


def cases(options: Options, shares: tuple[float, ...]) -> list[tuple[float | None, Case]]:
    """Of each width and size the shares, ascending, then None for random data; between these ends none of ONCE."""
    between = replace(options, variants=tuple(v for v in options.variants if v not in ONCE))
    found: list[tuple[float | None, Case]] = []
    for d in options.dims:
        for n in options.sizes:
            found += [(s, find_noise(Case(options if s == shares[0] else between, n, d), s)) for s in shares]
            found.append((None, Case(replace(options, data="random"), n, d)))
    return found


def run(
    options: Options,
    shares: tuple[float, ...],
    progress: Progress,
    save: Callable[[Document], object] = lambda document: None,
) -> Document:
    """As suite.run, with `shares` (ascending) beside the options, and each case's data, noise and share asked for."""
    points = cases(options, shares)
    document = suite.new_document(options)
    document.update(kind="live_pairs", shares=list(shares))
    progress.start(sum(2 * len(case.options.variants) for _, case in points))
    earlier: dict[str, suite.Record] = {}
    before = (0, 0)
    for share, case in points:
        if (case.n, case.d) != before:
            before, earlier = (case.n, case.d), {}
        result = suite.run_case(case, earlier, progress)
        earlier = {**earlier, **result["variants"]}
        result["share_asked_for"] = share
        result["data"], result["noise"] = case.options.data, None if share is None else case.options.noise
        document["cases"].append(result)
        save(document)
    return document


def percents(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) / 100 for part in text.split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes numbers with commas between them, got {text!r}") from error
    if not 0 < found[0] <= found[-1] < 0.5:
        raise argparse.ArgumentTypeError(f"takes shares over 0 and under 50 %, got {text!r}")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench live_pairs", description=__doc__.split("\n")[0])
    default = Options(1, 1, data="trained", intrinsic=INTRINSIC, sizes=(8192,), variants=VARIANTS)
    add_batches(p, default)
    p.add_argument("--shares", type=percents, default=SHARES, metavar="%,%", help="of live pairs (0.001 to 30)")
    add_common(p, default)
    add_table(p)
    return p


def main(arguments: list[str] | None = None) -> None:
    p = parser()
    given = vars(p.parse_args(arguments))
    if given["table"]:
        print(report.markdown(report.read(given["table"])))
        return
    options = options_of(p, {**given, "data": "trained", "intrinsic": INTRINSIC})
    with Progress() as progress:
        try:
            document = run(options, given["shares"], progress, lambda document: report.write(document, given["out"]))
        except ValueError as error:
            p.error(str(error))
    plot.publish(document, given["out"])
