"""A chip that is not there, whose kernels run here: what Triton launches on it goes to the executor, on CPU tensors.

    with chip("sm_90"):
        kernel[grid](...)

Kernels are compiled to PTX and no further, into Triton's cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .control import Program, assemble
from .machine import launch
from .tensors import Region, Tensors

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have
APART = 2**48  # of a kernel's tensors: what is past one's end is not in another
PACK = {"i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1", "u16": "u2", "u32": "u4"}
PACK |= {"u64": "u8", "fp32": "f4", "f32": "f4", "fp64": "f8"}


def region(name: str, tensor: torch.Tensor) -> Region:
    """The memory of a tensor's own elements, from its first to its last."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    span = span if tensor.numel() else 0
    return Region(name, tensor.data_ptr(), span * tensor.element_size(), tensor.element_size())


def flatten(kinds: Any, values: Any, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Type, name and value of each argument that a kernel gets."""
    for k, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        own = f"{name}{getattr(values, '_fields', range(len(values)))[k]}"
        if isinstance(kind, tuple):
            yield from flatten(kind, value, f"{own}.")
        elif kind != "constexpr":
            yield kind, own, value


def pack(arguments: list[tuple[str, str, Any]]) -> tuple[bytes, list[Region]]:
    """The parameters as they lie in memory, and the tensors among them, each at an address far from the others'."""
    merged = _merged([region(name, value) for kind, name, value in arguments if kind.startswith("*")])
    packed = bytearray()
    for kind, _, value in arguments:
        if kind.startswith("*"):
            at = value.data_ptr()
            own = next((k for k, r in enumerate(merged) if r.start <= at < r.stop), -1)
            data = np.array(at + (own + 1) * APART, "u8").tobytes()
        else:
            data = np.array(value, PACK[kind]).tobytes()
        packed += b"\0" * (-len(packed) % len(data)) + data
    apart = [r.shifted((k + 1) * APART) for k, r in enumerate(merged)]
    return bytes(packed + b"\0" * (-len(packed) % 8) + b"\0" * 16), apart  # and no scratch memory


def _merged(regions: list[Region]) -> list[Region]:
    """Each memory once, so that what is passed twice races with itself; of two that overlap, their union."""
    found: list[Region] = []
    for new in sorted(regions, key=lambda r: (r.start, -r.stop)):
        last = found[-1] if found else None
        if last and new.start < last.stop:
            grain, name = min(last.grain, new.grain), last.name if new.stop <= last.stop else f"{last.name}, {new.name}"
            found[-1] = Region(name, last.start, max(last.stop, new.stop) - last.start, grain)
        elif new.stop > new.start:
            found.append(new)
    return found


class Launch(NamedTuple):
    """A kernel about to run: its text, name, blocks, and what they get."""

    text: str
    name: str
    threads: int
    grid: tuple[int, int, int]
    shared: int
    parameters: bytes
    regions: list[Region]

    @property
    def program(self) -> Program:
        return assemble(self.text, self.name, self.threads)

    def run(self, program: Program | None = None) -> None:
        """Its own program, or another one on the same memory."""
        tensors = Tensors([r.fresh() for r in self.regions])
        launch(program or self.program, self.grid, tensors, self.parameters, self.shared)


class Launcher:
    """What Triton calls for a launch, in place of a driver's."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = [source.signature[name] for name in source.fn.arg_names]
        self.names, self.metadata = source.fn.arg_names, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        named = [(kind, self._name(name), value) for kind, name, value in flatten(self.kinds, rest[4:])]
        parameters, regions = pack(named)
        m = self.metadata
        one = Launch(function, m.name, 32 * m.num_warps, (x, y, z), m.shared, parameters, regions)
        start = time.perf_counter()
        execute[0](one)
        launched.append((m.name, one.grid, time.perf_counter() - start))

    def _name(self, name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{self.names[int(first)]}{dot}{rest}"


execute: list[Callable[[Launch], None]] = [Launch.run]  # what becomes of a launch
launched: list[tuple[str, tuple[int, int, int], float]] = []  # name, grid, seconds


class Chip:
    """Triton's driver for it. A kernel's handle is its PTX."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (None, kernel.decode(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED[arch]},
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _no_cubin(backend: Any = None, stages: Any = None, *rest: Any) -> tuple[str, str]:
    """The last stage leaves the PTX, which ptxas would take a while to turn into machine code."""
    if stages is not None:
        stages["cubin"] = lambda source, metadata: source.encode()
    return "no cubin", "no cubin"


@contextlib.contextmanager
def to_ptx() -> Iterator[None]:
    """Triton compiles as far as `chip` has it, and into the same places of its cache."""
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _no_cubin
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


@contextlib.contextmanager
def chip(name: str) -> Iterator[None]:
    """Triton launches run here, as compiled for sm_80 or sm_90."""
    active = driver._active
    driver.set_active(Chip(int(name.removeprefix("sm_"))))
    try:
        with to_ptx():
            yield
    finally:
        driver._active = active
