"""What ncu and compute-sanitizer run: `python -m bench.gpu_proof.one_step PLAN WORK CASE`, two steps of one of a plan's
cases, the second one between the marks that a profiler looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .accelerator import accelerator
from .cases import main_cases
from .plan import PLANS


def main() -> int:
    plan, work, name = PLANS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3]
    every = [case for n in (plan.counters_n, plan.sanitizer_n) for case in main_cases(plan, n)]
    case = next(case for case in every if case.name == name)
    gpu = accelerator(plan, work)
    step = case.step(gpu.device)
    step()
    gpu.synchronize()
    with gpu.profiled():
        found = step()
        gpu.synchronize()
    return 0 if all(bool(torch.isfinite(t).all()) for t in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
