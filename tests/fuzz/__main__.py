"""``python -m tests.fuzz --minutes 60``: random cases until the time is up, one line a failure; 1 if there was any."""

from __future__ import annotations

import argparse
import collections
import random
import subprocess
import sys
import time

from flashpair.engine.dispatch import interpreted

from .case import Case, read
from .kinds import KINDS, run
from .shrink import shrink


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the same seed gives the same cases")
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds, of {', '.join(KINDS)}")
    parser.add_argument(
        "--impls",
        default="auto,tiled,screened",
        help="implementations; with TRITON_INTERPRET=1 some tiny cases are drawn by fused, too",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with seeds of its own")
    parser.add_argument("--cases", type=int, help="so many of them, instead of minutes")
    parser.add_argument("--case", help="one case as a failure's line has it, and nothing else")
    parser.add_argument("--no-shrink", action="store_true", help="print failing cases as they were drawn")
    return parser.parse_args()


def session(options: argparse.Namespace) -> int:
    kinds, impls = options.only.split(","), tuple(options.impls.split(","))
    tried: collections.Counter[str] = collections.Counter()
    failed: collections.Counter[str] = collections.Counter()
    end, at = time.monotonic() + 60 * options.minutes, options.seed
    while time.monotonic() < end if options.cases is None else at < options.seed + options.cases:
        kind = random.Random(at).choice(kinds)
        case = KINDS[kind].draw(at, impls)
        at += 1
        tried[kind] += 1
        if refused(words := run(case)):
            continue
        if words:
            failed[kind] += 1
            report(case, words, options.no_shrink)
    for kind in sorted(tried):
        sys.stdout.write(f"{kind}: {tried[kind]} cases, {failed[kind]} failed\n")
    sys.stdout.write(f"all: {tried.total()} cases, {failed.total()} failed\n")
    return int(bool(failed))


def refused(words: str) -> bool:
    """Whether an implementation that was named has said that it cannot run."""
    return words.startswith("RuntimeError: impl=") and "cannot run" in words


def report(case: Case, words: str, whole: bool) -> None:
    sort = words.partition(":")[0]
    small = case if whole else shrink(case, lambda one: run(one).startswith(sort))
    sys.stdout.write(f"FAIL {case.kind} {case.name} {run(small) or words}\n     --case '{small.json()}'\n")
    sys.stdout.flush()


def main() -> int:
    options = arguments()
    if interpreted():
        from ..support.interpreter import patch_once_a_launch

        patch_once_a_launch()
    if options.case:
        words = run(read(options.case))
        sys.stdout.write(f"{words or 'right'}\n")
        return int(bool(words))
    if options.jobs == 1:
        return session(options)
    each = [sys.executable, "-m", "tests.fuzz", "--minutes", str(options.minutes), "--only", options.only]
    each += ["--impls", options.impls] + ["--no-shrink"] * options.no_shrink
    jobs = [subprocess.Popen([*each, "--seed", str(options.seed + k * 10**8)]) for k in range(options.jobs)]
    return max([job.wait() for job in jobs])


if __name__ == "__main__":
    sys.exit(main())
