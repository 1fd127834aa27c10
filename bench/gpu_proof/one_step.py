"""What ncu and compute-sanitizer run: `python -m bench.gpu_proof.one_step PLAN CASE`, two steps of one of its cases,
the second one between the marks that a profiler looks for."""

from __future__ import annotations

import sys

import torch

from .accelerator import accelerator
from .cases import main_cases
from .plan import PLANS


def main() -> int:
    plan = PLANS[sys.argv[1]]
    every = [case for n in (plan.counters_n, plan.sanitizer_n) for case in main_cases(plan, n)]
    case = next(case for case in every if case.name == sys.argv[2])
    gpu = accelerator(plan)
    step = case.step(gpu.device)
    step()
    gpu.synchronize()
    with gpu.profiled():
        found = step()
        gpu.synchronize()
    return 0 if all(bool(torch.isfinite(t).all()) for t in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
