"""What the stages ask of a GPU, and what stands in for one on the host: the seam between them.

On the host tensors are the CPU's, and kernels are run as compiled for the GPU, by tests/ptx. That is no GPU where time,
graphs, streams or devices are asked of it: a graph is the step itself, a stream is none, and times are the host's.
Lines say what they are `by`, where it is not a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .child import Skip
from .plan import Plan
from .site import marker, of_tests

Step = Callable[[], Any]
SLEEP_CYCLES = 20_000_000  # 10 ms or so: the host is done with launching before the GPU begins
WARM_UP = 3
EXECUTOR = "executor"  # of compiled PTX, on the CPU
EMULATED = "emulated"  # the CUDA C++, compiled for the CPU
STAND_IN = "stand-in"  # what answers, and proves nothing of a GPU
ONCHIP_PTX = "onchip.ptx"  # a marker


class Cuda:
    """The current CUDA device."""

    device = "cuda"

    def by(self, impl: str, what: str = "") -> dict[str, str]:
        """Fields of a line about the kernels of `impl`, and times or the like: what stood in for a GPU."""
        return {}

    def built(self) -> None:
        """The build stage is over: `onchip` is asked for from now on."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, step: Step, count: int = 1) -> float:
        """Of one of `count` steps back to back, from the host's launch to the GPU's end."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def watch(self) -> Callable[[], Callable[[], float]]:
        """Begins a measurement of what is launched next; what it returns ends it, and what that returns reads it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()

        def stop() -> Callable[[], float]:
            end.record()
            return lambda: start.elapsed_time(end) / 1e3

        return stop

    def hold(self) -> None:
        """Keeps the GPU busy while the host launches."""
        torch.cuda._sleep(SLEEP_CYCLES)

    def graph(self, step: Step) -> tuple[Step, Any]:
        """A step that replays what this one launches, and what this one returned, which a replay writes anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = step()
        return captured.replay, result

    def late(self, target: Tensor, source: Tensor, step: Step) -> Any:
        """The step on a side stream that fills `target` only after a while, without the host waiting."""
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10 * SLEEP_CYCLES)
            target.copy_(source)
            found = step()
        torch.cuda.synchronize()
        return found

    def peak(self, step: Step) -> int:
        """Bytes that a step adds to what was allocated before it, its gradient included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, step: Step) -> dict[str, tuple[float, int]]:
        """Seconds and launches of each kernel of a step, by torch's profiler."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        events = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {e.key: (e.self_device_time_total / 1e6, e.count) for e in events if e.self_device_time_total > 0}

    def profiled(self) -> contextlib.AbstractContextManager[Any]:
        """Where ncu looks (--profile-from-start off)."""
        return torch.cuda.profiler.profile()

    def devices(self) -> list[str]:
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())]

    def free(self) -> None:
        torch.cuda.empty_cache()


class Host:
    """The CPU in a GPU's place, and the executor under Triton until the process ends."""

    device = "cpu"

    def __init__(self, plan: Plan, work: Path) -> None:
        self.arch, self.compiled_onchip, self.ptx = f"sm_{plan.arch}", False, marker(work, ONCHIP_PTX)
        self.life = contextlib.ExitStack()
        self.life.enter_context(of_tests("ptx.engine").gpu(self.arch))

    def built(self) -> None:
        if self.ptx.exists() and not self.compiled_onchip:
            self.life.enter_context(of_tests("ptx.onchip").gpu(self.arch))
            self.compiled_onchip = True

    def by(self, impl: str, what: str = "") -> dict[str, str]:
        own = EMULATED if impl == "onchip" and not self.compiled_onchip else EXECUTOR
        return {"by": f"{own}, {what}: {STAND_IN}" if what else own}

    def synchronize(self) -> None:
        pass

    def seconds(self, step: Step, count: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count

    def watch(self) -> Callable[[], Callable[[], float]]:
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - start
            return lambda: seconds

        return stop

    def hold(self) -> None:
        pass

    def graph(self, step: Step) -> tuple[Step, Any]:
        result = step()

        def replay() -> None:
            for kept, new in zip(result, step(), strict=True):
                kept.copy_(new)

        return replay, result

    def late(self, target: Tensor, source: Tensor, step: Step) -> Any:
        target.copy_(source)
        return step()

    def peak(self, step: Step) -> int:
        step()
        return 0

    def kernels(self, step: Step) -> dict[str, tuple[float, int]]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
        return {e.key: (e.self_cpu_time_total / 1e6, e.count) for e in seen.key_averages()}

    def profiled(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def devices(self) -> list[str]:
        return ["cpu"]

    def free(self) -> None:
        pass


Accelerator = Cuda | Host


def accelerator(plan: Plan, work: Path) -> Accelerator:
    if not plan.on_host:
        return Cuda()
    try:
        return Host(plan, work)
    except ImportError as error:
        raise Skip(f"the executor needs Triton: {error}") from error


def stand_in(plan: Plan) -> dict[str, str]:
    """Fields of a line about what only a GPU, or a tool for it, can do."""
    return {"by": STAND_IN} if plan.on_host else {}
