"""One of the processes that ranks.py times: its share of the batch, its steps, and their results."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashpair.distributed import gather
from flashpair.distributed.global_loss import slice_of

from ..harness import machine
from ..harness.cases import Batch, Case, make_batch
from ..harness.check import Truth, find_truth, judge
from ..harness.measure import Times
from ..harness.memory import peak_of
from ..harness.options import Options
from ..harness.variants import criterion
from . import traffic
from .family_cases import FAMILY

SCHEDULES = ("all_gather", "ring")
ONE, TILED = "one process", "one process, tiled"
LIMIT = datetime.timedelta(minutes=30)  # others wait while the first process computes the truth
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    """The plan that every process gets: options, losses, and the numbers of processes that take turns."""

    options: Options
    losses: tuple[str, ...]
    worlds: tuple[int, ...]

    @property
    def variants(self) -> dict[str, tuple[int, str]]:
        """Name, how many processes, and how: by a schedule of `gather`, or an implementation in one process."""
        many = {f"{s}, {w} processes": (w, s) for w in self.worlds if w > 1 for s in SCHEDULES}
        return {ONE: (1, "auto"), TILED: (1, "tiled"), **many}

    def case(self, loss: str) -> Case:
        return Case(replace(self.options, loss=loss), self.options.sizes[0], self.options.dims[0])


def together(values: Any) -> list[Any]:
    """The values of all processes, on every process."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return found


def pin(rank: int) -> None:
    """Pins each process to a core, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


class Runner:
    """The steps of one loss on this process; None for variants in which it takes no part."""

    def __init__(self, plan: Plan, loss: str, groups: dict[int, Any]) -> None:
        self.plan, self.case, self.rank = plan, plan.case(loss), dist.get_rank()
        self.whole = make_batch(self.case)
        self.parts = {world: self._part(world) for world in plan.worlds if self.rank < world}
        self.steps = {name: self._step(*what, groups) for name, what in plan.variants.items()}

    def _part(self, world: int) -> Batch:
        first, last = slice_of(self.case.n, world, self.rank)
        x = self.whole.x.detach()[first:last].clone().requires_grad_()
        return Batch(x, self.whole.labels[first:last].clone(), None, None)

    def _step(self, world: int, how: str, groups: dict[int, Any]) -> Step | None:
        if self.rank >= world:
            return None
        batch, call = self.parts[world], criterion(self.case, how if world == 1 else "auto")
        if world > 1:
            call = gather(call, schedule=how, gradients="sum", group=groups[world])

        def run() -> Tensor:
            batch.x.grad = None
            loss = call(batch.x, batch.labels)
            loss.backward()
            return loss.detach()

        return run

    def truth(self) -> Truth | None:
        """On the first process.

        Raises:
            ValueError: a batch that is too large for it.
        """
        if self.rank:
            return None
        found = find_truth(self.case, self.whole)
        if found.case != self.case:
            raise ValueError(f"N = {self.case.n:,} is too large for a truth in float64")
        return found

    def check(self, name: str, truth: Truth | None) -> dict[str, Any]:
        """The verdict on a variant, whose gradient comes to the first process in parts.

        Raises:
            RuntimeError: on every process, if it is wrong.
        """
        step, (world, _) = self.steps[name], self.plan.variants[name]
        loss = None if step is None else step()
        gradients = together(None if step is None else self.parts[world].x.grad)
        record: dict[str, Any] = {}
        if truth is not None and loss is not None:
            gradient = torch.cat([g for g in gradients if g is not None])

            def found() -> Tensor:
                truth.batch.x.grad = gradient
                return loss

            record = judge(found, truth).record(truth)
        (record, *_) = together(record)
        if not record["right"]:
            raise RuntimeError(f"{name} is {record['words']}")
        return record

    def cost(self, name: str) -> dict[str, Any]:
        """Bytes sent by the first process, and the peak memory of the one that needs most."""
        step = self.steps[name]
        with traffic.counted() as count:
            if step is not None:
                step()
        dist.barrier()
        every = together((count.record(), 0 if step is None else peak_of(step).extra))
        return {"traffic": every[0][0], "memory": {"peak_extra": max(peak for _, peak in every)}}

    def time(self, name: str) -> tuple[float, float]:
        """Seconds of the slowest process, and processor seconds of the busiest. On an idle machine they differ only by
        the time that processes wait for each other."""
        step = self.steps[name]
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        if step is not None:
            step()
        mine = time.perf_counter() - start, time.process_time() - used
        every = together(mine if step is not None else (0.0, 0.0))
        return max(wall for wall, _ in every), max(own for _, own in every)

    def rounds(self, say: Callable[[str], None]) -> tuple[dict[str, list[Times]], float | None]:
        """Interleaved times of every variant, by clock and processor, and how many cores other processes kept busy."""
        o, found = self.case.options, {name: list[tuple[float, float]]() for name in self.steps}
        began, load, used = time.monotonic(), machine.OtherLoad(), time.process_time()
        names = list(self.steps)
        for turn in range(o.warmup + o.repeats):
            say(f"round {turn + 1} of {o.warmup + o.repeats}")
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                sample = self.time(name)
                if turn >= o.warmup:
                    found[name].append(sample)
        seconds, own = time.monotonic() - began, time.process_time() - used
        others, every = load.cores(), together(own)
        if others is not None:  # without the other processes of this run
            others = round(max(0.0, others - sum(every[1:]) / seconds), 2)
        times = {name: [Times(list(t), 1) for t in zip(*samples, strict=True)] for name, samples in found.items()}
        return times, others


def run_case(plan: Plan, loss: str, groups: dict[int, Any], say: Callable[[str], None]) -> dict[str, Any]:
    shown = FAMILY[loss].shown
    runner = Runner(plan, loss, groups)
    case = runner.case
    say(f"{shown}: the truth in float64")
    truth, records = runner.truth(), {}
    for name, (world, how) in plan.variants.items():
        say(f"{shown}: is {name} right?")
        records[name] = {"processes": world, "how": how, "check": runner.check(name, truth), **runner.cost(name)}
        if world > 1:
            size = case.options.torch_dtype.itemsize
            records[name]["traffic"]["formula"] = traffic.formula(how, loss, world, case.n // world, case.d, size)
    del truth
    times, others = runner.rounds(lambda what: say(f"{shown}: {what}"))
    one, one_used = (t.record()["median"] for t in times[ONE])
    for name, record in records.items():
        record["seconds"], record["processor_seconds"] = (t.record() for t in times[name])
        record["throughput"] = case.n / record["seconds"]["median"]
        record["speedup"] = one / record["seconds"]["median"]
        record["processor_speedup"] = one_used / record["processor_seconds"]["median"]
    return {
        "loss": loss, "shown": shown, "n": case.n, "d": case.d, "classes": case.classes,
        "cores_used_by_others": others, "variants": records,
    }  # fmt: skip


def work(rank: int, plan: Plan, where: str, save: Callable[[dict[str, Any]], object], say: Callable[..., None]) -> None:
    """The main function of a process; the first process reports and saves."""
    described = machine.describe()
    pin(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=max(plan.worlds), timeout=LIMIT)
    groups = {world: dist.new_group(list(range(world)), timeout=LIMIT) for world in plan.worlds if world > 1}
    document = {
        "what": "flashpair bench: one training step (forward and backward) of a batch that processes share",
        "units": "seconds of the slowest process; throughput: rows of the global batch a second; speedup: over the one "
        "process; processor_seconds, processor_speedup: the same of the processor's time of the process that used "
        "most; peak_extra: bytes that a step adds to the process that needs most; traffic: bytes sent by the "
        "first process, of collectives what their best algorithm sends (traffic.py)",
        "kind": "ranks", "machine": described, "options": asdict(replace(plan.options, loss="all")),
        "worlds": list(plan.worlds), "cases": [],
    }  # fmt: skip
    for loss in plan.losses:
        document["cases"].append(run_case(plan, loss, groups, say if rank == 0 else lambda what: None))
        if rank == 0:
            save(document)
    dist.barrier()
    dist.destroy_process_group()
