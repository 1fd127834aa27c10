"""One run: for each size try, check, measure. A variant that fails is recorded, and the run goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ..studies.family_cases import FAMILY
from . import gpu, machine, sandbox
from .cases import Batch, Case, live_share, make_batch
from .check import Truth, Verdict, find_truth, judge, only_rounds
from .gemm_bound import bound_products, describe, is_small
from .measure import Times, interleave
from .options import GEMM_BOUND, GEMM_BOUND_TWO, GEMM_BOUNDS, Options
from .progress import Progress
from .report import BUSY
from .units import duration, size
from .variants import Step, make_step
from .worker import is_memory, reason

Record = dict[str, Any]
BASELINES = ("pytorch-metric-learning",)
LASTING = ("over_memory", "over_time", "not_there")  # a larger size would end the same way


def _at(case: Case) -> str:
    return f"N = {case.n:,}, D = {case.d}"


def _names(options: Options) -> list[str]:
    names = list(options.variants)
    if GEMM_BOUND in names and options.ref is not None and options.backward:
        names.append(GEMM_BOUND_TWO)
    return names


def _attempt(case: Case, variant: str, earlier: Record | None, progress: Progress) -> Record:
    if earlier is not None and earlier["status"] in LASTING:
        since = earlier.get("since_n", earlier["n"])
        return {"n": case.n, "status": earlier["status"], "words": earlier["words"], "since_n": since}
    if variant in GEMM_BOUNDS and is_small(case):
        return {"n": case.n, "status": "ok", "words": ""}
    if case.options.device == "cuda":
        progress.doing(f"{_at(case)}: {variant}, once")
        found = gpu.attempt(case, variant)
    else:
        progress.doing(f"{_at(case)}: {variant} in a process of its own")
        found = sandbox.attempt(case, variant)
    record: Record = {"n": case.n, "status": found.status, "words": found.words}
    if found.ok:
        record["worker_seconds"] = found.seconds
        if found.extra is not None:
            linear = (case.n + (case.centres or case.m)) * case.d * case.options.torch_dtype.itemsize
            record["memory"] = {
                "peak_extra": found.extra, "gradient": found.gradient, "inputs": found.inputs,
                "method": found.method, "over_linear": found.extra / linear, "process_peak": found.highest,
            }  # fmt: skip
    return record


def _fail(record: Record, error: Exception) -> None:
    record.update(status="over_memory" if is_memory(error) else "failed", words=reason(error))


def _steps(case: Case, batch: Batch, records: dict[str, Record]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for variant, record in records.items():
        if record["status"] == "ok":
            try:
                steps[variant] = make_step(variant, case, batch)
            except Exception as error:
                _fail(record, error)
    return steps


def _difference(verdict: Verdict, case: Case, variant: str) -> Record:
    """The record of a result that is not right. A baseline is still timed if the reason is known."""
    if variant in BASELINES and FAMILY[case.options.loss].differs:
        return {"differs": FAMILY[case.options.loss].differs}
    if variant in BASELINES and only_rounds(verdict, case, variant):
        return {"differs": f"{case.options.dtype} rounds more than in eager code, in float64 it is the same"}
    return {"status": "wrong", "words": verdict.words}


def _check(steps: dict[str, Step], records: dict[str, Record], case: Case, batch: Batch, progress: Progress) -> None:
    """Removes from `steps` the variants that are wrong or cannot be checked."""
    checked = [v for v in steps if v not in GEMM_BOUNDS]
    if not checked:
        return
    progress.doing(f"{_at(case)}: the truth in float64")
    truth: Truth | Exception
    try:
        truth = find_truth(case.whole_step, batch)
    except Exception as error:
        truth = RuntimeError(f"no truth to check against: {reason(error)}")
    for variant in checked:
        progress.doing(f"{_at(case)}: is {variant} right?")
        record = records[variant]
        try:
            if isinstance(truth, Exception):
                raise truth
            step = steps[variant] if truth.case == case else make_step(variant, truth.case, truth.batch)
            verdict = judge(step, truth)
            record["check"] = verdict.record(truth)
            if not verdict.right:
                record.update(_difference(verdict, truth.case, variant))
        except Exception as error:
            _fail(record, error)
        if record["status"] != "ok":
            del steps[variant]


def _time(steps: dict[str, Step], records: dict[str, Record], case: Case, progress: Progress) -> None:
    progress.doing(f"{_at(case)}: timing {', '.join(steps) or 'nothing'}")
    share = len(records) / (case.options.warmup + case.options.repeats)
    for variant, times in interleave(steps, case.options, lambda: progress.advance(share)).items():
        if isinstance(times, Times):
            records[variant]["seconds"] = times.record()
        else:
            _fail(records[variant], times)
    if "seconds" in records.get(GEMM_BOUND, {}):
        bound = records[GEMM_BOUND]["seconds"]["median"]
        for record in records.values():
            if "seconds" in record:
                record["fraction_of_gemm_bound"] = bound / record["seconds"]["median"]
                record["tflops_of_gemm_bound"] = (
                    describe(case, bound_products(case, GEMM_BOUND))["flop"] / record["seconds"]["median"] / 1e12
                )


def _told(variant: str, record: Record) -> str:
    if record["status"] != "ok":
        return f"{variant}: {record['words']}"
    memory = f", {size(record['memory']['peak_extra'])}" if "memory" in record else ""
    return f"{variant}: {duration(record['seconds']['median'])}{memory}"


def run_case(case: Case, earlier: dict[str, Record], progress: Progress) -> Record:
    """`earlier`: the records of the next smaller size."""
    names = _names(case.options)
    records: dict[str, Record] = {}
    for variant in names:
        records[variant] = _attempt(case, variant, earlier.get(variant), progress)
        progress.advance()
    torch.compiler.reset()  # after a few shapes the compiler would silently fall back to eager
    batch = make_batch(case)
    steps = _steps(case, batch, records)
    _check(steps, records, case, batch, progress)
    others = machine.OtherLoad()
    _time(steps, records, case, progress)
    busy = others.cores()
    if busy is not None and busy > BUSY:
        progress.say(f"{_at(case)}: other processes kept {busy:.1f} cores busy during this")
    for variant, record in records.items():
        progress.say(f"{_at(case)}: {_told(variant, record)}")
    return {
        "n": case.n, "m": case.m, "d": case.d, "classes": case.classes,
        "gemm_bound": {v: describe(case, bound_products(case, v)) for v in GEMM_BOUNDS if v in names},
        "live_share_of_negatives": live_share(batch) if case.options.loss == "ms" else None,
        "cores_used_by_others": busy,
        "variants": records,
    }  # fmt: skip


def new_document(options: Options) -> Record:
    """The JSON document before its first case."""
    return {
        "what": "flashpair bench: one training step (forward and backward)",
        "units": "seconds; bytes; peak_extra: beyond inputs and gradient; process_peak: of the process "
        "that took one step, all included; over_linear: peak_extra in copies "
        "of the (N + M) D embeddings; fraction_of_gemm_bound: the bare products' median / this median; "
        "tflops_of_gemm_bound: 10^12 of the bare products' flop a second",
        "machine": machine.describe(),
        "options": asdict(options),
        "cases": [],
    }


def run(options: Options, progress: Progress, save: Callable[[Record], object] = lambda document: None) -> Record:
    """The whole document; `save` gets it after each size, in case of an interruption."""
    document = new_document(options)
    progress.start(2 * len(options.dims) * len(options.sizes) * len(_names(options)))
    for d in options.dims:
        earlier: dict[str, Record] = {}
        for n in options.sizes:
            result = run_case(Case(options, n, d), earlier, progress)
            earlier = result["variants"]
            document["cases"].append(result)
            save(document)
            gc.collect()
    return document
