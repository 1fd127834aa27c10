"""`onchip` as nvcc compiles it: its PTX, run by the executor in place of a cooperative launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from flashpair.backends import extension
from flashpair.backends.cuda import onchip
from flashpair.engine import small_batch

from . import launch as record
from .control import assemble
from .machine import launch
from .tensors import Region, Tensors

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = 256
SOURCES = ("csrc/cuda", "csrc/small_batch")
PROCESSORS, SHARED = 6, 227 * 1024  # so few that small batches have several rows a block
ITEMSIZE = (8, 4, 2, 2)  # of embeddings, by csrc/small_batch/spec.h's Number
NONE = 2  # the averaging of a loss of each row


@functools.cache
def ptx(arch: str) -> str:
    """onchip.cu's, compiled unless it is in build/."""
    files = sorted(f for folder in SOURCES for f in (ROOT / folder).glob("*"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    out = ROOT / f"build/ptx/onchip-{arch}-{digest}.ptx"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [
            "nvcc",
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-ptx",
            f"-arch={arch}",
            "csrc/cuda/onchip.cu",
            "-o",
            str(new := out.with_suffix(f".{os.getpid()}")),
        ]
        subprocess.run(command, check=True, cwd=ROOT)
        new.rename(out)
    return out.read_text()


def missing() -> str:
    """Why it cannot be had here; empty if it can."""
    return "" if shutil.which("nvcc") else "no nvcc on the PATH"


@functools.cache
def _host() -> Any:
    from ..support import emulated  # not above: pytest has this package as `ptx`, which has nothing beside it

    library = emulated.build("onchip_parameters.so", ("tests/ptx/onchip_parameters.cpp",), "-fPIC -shared")
    return ctypes.CDLL(str(library)).onchip_parameters


class Launch:
    """What flashpair._onchip.Launch is, over the executor."""

    threads = THREADS

    def __init__(
        self, arch: str, shape: tuple[int, ...], code: tuple[int, ...], numbers: tuple[float, ...], want_dy: bool
    ) -> None:
        self.arch, self.shape, self.code, self.numbers, self.want_dy = arch, shape, code, numbers, want_dy
        n, m, d, number, _ = shape
        rows, self.itemsize = code[0], 8 if number == 0 else 4
        others, width = (-(-v // 4) * 4 for v in (max(n, m), d))
        self.blocks = max(1, -(-n // rows)) + (-(-m // rows) if want_dy else 0)
        numbers_of_a_block = rows * (others + width + onchip.ROW_NUMBERS) + onchip.SCRATCH
        self.shared = self.itemsize * numbers_of_a_block + rows * others
        self.workspace = self._pack([0] * 10)[1]

    def _pack(self, addresses: list[int]) -> tuple[bytes, int]:
        out, workspace = ctypes.create_string_buffer(1024), ctypes.c_int64()
        _host()(
            (ctypes.c_int * 5)(*self.shape), (ctypes.c_int * 7)(*map(int, self.code)),
            (ctypes.c_double * 5)(*self.numbers), ctypes.c_bool(self.want_dy),
            (ctypes.c_void_p * 10)(*addresses), out, ctypes.byref(workspace),
        )  # fmt: skip
        return out.raw, workspace.value

    def __call__(self, *addresses: int) -> None:
        n, m, d, number, square = self.shape
        wide, given = self.itemsize, ITEMSIZE[number]
        loss = n if self.code[2] == NONE else 1
        sizes = {
            "x": (n * d, given), "y": (m * d, given), "labels": (n, 8), "ref_labels": (m, 8), "upstream": (n, wide),
            "loss": (loss, wide), "share": (1, wide), "dx": (n * d, wide), "dy": (m * d, wide),
            "workspace": (self.workspace // wide, wide),
        }  # fmt: skip
        regions = [
            Region(name, at, count * item, item)
            for (name, (count, item)), at in zip(sizes.items(), addresses, strict=False)
            if at and count and not (square and name in ("y", "ref_labels"))
        ]
        barrier = np.zeros(4, np.uint32)
        at = barrier.ctypes.data
        regions.append(Region("the grid's barrier", at, 16, 4))
        text = ptx(self.arch)
        letters = ("d" if number == 0 else "f") + f"Li{self.code[0]}E"
        name = next(n for n in re.findall(r"\.entry (\w+)\(", text) if f"loss_and_gradientI{letters}" in n)
        special = {"%envreg1": at >> 32, "%envreg2": at & 0xFFFFFFFF}
        start = time.perf_counter()
        program, grid = assemble(text, name, THREADS), (self.blocks, 1, 1)
        launch(program, grid, Tensors(regions, self.blocks), self._pack([*addresses[:10]])[0], self.shared, special)
        record.launched.append(("onchip", grid, time.perf_counter() - start))


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[None]:
    """Until it ends, impl="onchip" on CPU tensors is the kernel compiled for that architecture."""
    module = SimpleNamespace(
        emulated=True,
        limits=lambda device: (PROCESSORS, SHARED, True),
        Launch=lambda device, *rest: Launch(arch, *rest),
    )
    caches = (onchip._limits, onchip._launch, small_batch._compiled_plan)
    with mock.patch.object(extension, "onchip", lambda: module):
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
