"""The child of sandbox.py: one variant, one size, one measured step in a fresh process. It prints lines of JSON.

python -m bench.harness.worker OPTIONS_JSON N D VARIANT
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import memory
from .cases import Case, make_batch
from .options import GB, GEMM_BOUNDS, Options
from .variants import NotThere, TrainingStep, make_step

TINY = 64
COMPILER_BYTES = 2 * GB  # what a compiler may take beside the step


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def reason(error: BaseException) -> str:
    """The most telling line of an error's message, cut to fit a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or [""]
    return f"{type(error).__name__}: {telling[0]}"[:200]


def is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("allocate memory", "not enough memory", "bad_alloc", "out of memory")
    )


def attempt(case: Case, variant: str) -> None:
    compiles = variant.startswith("compiled")
    if not compiles:  # load libraries and start threads before anything is counted
        ref = None if case.square else min(case.m, TINY)
        few = min(case.options.num_classes, TINY)
        tiny = Case(replace(case.options, ref=ref, num_classes=few), min(case.n, TINY), case.d)
        warm = make_step(variant, tiny, make_batch(tiny))
        warm()
        warm()
        del warm
    batch = make_batch(case)
    step = make_step(variant, case, batch)
    if compiles:  # a compiler works for one shape: the first step compiles, the second is measured
        memory.limit_growth(case.options.memory_limit + COMPILER_BYTES)
        say("compile", resident=memory.resident())
        step()
        step.forget()
        memory.give_back()
    memory.limit_growth(case.options.memory_limit)
    say("step", resident=memory.resident())
    peak = memory.peak_of(step)
    gradient = step.gradient_bytes() if isinstance(step, TrainingStep) else 0
    inputs = sum(t.nbytes for t in batch if t is not None)
    extra = None if variant in GEMM_BOUNDS else max(0, peak.extra - gradient)
    highest = memory.status_bytes("VmHWM") if peak.method == "VmHWM" else None
    found = {"method": peak.method, "gradient": gradient, "inputs": inputs, "highest": highest}
    say("done", extra=extra, seconds=peak.seconds, **found)


def main() -> None:
    options, n, d, variant = sys.argv[1:]
    case = Case(Options.of(json.loads(options)), int(n), int(d))
    torch.set_num_threads(case.options.threads)
    with contextlib.suppress(OSError):  # if the machine runs out of memory, this process is killed first
        Path("/proc/self/oom_score_adj").write_text("1000")
    say("ready")
    try:
        attempt(case, variant)
    except NotThere as error:
        say("not_there", why=str(error))
    except Exception as error:
        say("over_memory" if is_memory(error) else "failed", why=reason(error))


if __name__ == "__main__":
    main()
