"""Tries a variant once on the GPU, in this process: there, running out of memory is only an exception."""

from __future__ import annotations

import gc
import time

import torch

from .cases import Case, make_batch
from .options import GEMM_BOUNDS
from .sandbox import Attempt, over_memory
from .units import duration
from .variants import NotThere, make_step
from .worker import is_memory, reason


def attempt(case: Case, variant: str) -> Attempt:
    """The first step compiles; the second is timed, and its peak is the allocator's own count."""
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_allocated() + case.options.memory_limit) / torch.cuda.mem_get_info()[1])
    )
    try:
        batch = make_batch(case)
        step = make_step(variant, case, batch)
        step()
        batch.x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gradient = 0 if batch.x.grad is None else batch.x.grad.nbytes
        extra = None if variant in GEMM_BOUNDS else max(0, torch.cuda.max_memory_allocated() - before - gradient)
        if seconds > case.options.time_limit:
            return Attempt("over_time", f"over {duration(case.options.time_limit)}")
        inputs = sum(t.nbytes for t in batch if t is not None)
        return Attempt("ok", seconds=seconds, extra=extra, method="torch.cuda", gradient=gradient, inputs=inputs)
    except NotThere as error:
        return Attempt("not_there", str(error))
    except Exception as error:
        return over_memory(case.options.memory_limit) if is_memory(error) else Attempt("failed", reason(error))
    finally:
        gc.collect()
        torch.cuda.empty_cache()
