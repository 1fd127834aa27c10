"""What proves the executor itself: kernels as text, run on numpy arrays."""

from __future__ import annotations

import numpy as np

from .control import assemble
from .machine import launch
from .tensors import Region, Tensors

HEAD = ".version 8.4\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
DECLARED = (
    ".reg .pred %p<20>;\n.reg .b16 %h<20>;\n.reg .b32 %r<200>;\n.reg .b64 %d<60>;\n"
    "ld.param.u64 %d0, [first];\nld.param.u64 %d1, [second];\nmov.u32 %r0, %tid.x;\n"
    "mul.wide.u32 %d2, %r0, 4;\nadd.s64 %d0, %d0, %d2;\nadd.s64 %d1, %d1, %d2;\nshl.b32 %r1, %r0, 2;\n"
)
"""%r0 is the thread; %d0, %d1 its words of the two arrays; %r1 its word of shared memory."""


def kernel(body: str, threads: int) -> str:
    """The text of a kernel of two arrays, which is `body` after DECLARED."""
    parameters = "\n.param .u64 .ptr .global .align 1 first,\n.param .u64 .ptr .global .align 1 second\n"
    return f"{HEAD}.visible .entry kernel({parameters})\n.reqntid {threads}\n{{\n{DECLARED}{body}\nret;\n}}\n"


def memory(first: np.ndarray, second: np.ndarray) -> tuple[bytes, list[Region]]:
    """Its parameters, and the arrays that they name."""
    arrays = {"first": first, "second": second}
    regions = [Region(name, a.ctypes.data, a.nbytes, a.itemsize) for name, a in arrays.items()]
    return np.array([a.ctypes.data for a in arrays.values()], np.uint64).tobytes(), regions


def run(
    body: str, first: np.ndarray, second: np.ndarray, threads: int = 64, blocks: int = 1, shared: int = 4096
) -> None:
    parameters, regions = memory(first, second)
    program = assemble(kernel(body, threads), "kernel", threads)
    launch(program, (blocks, 1, 1), Tensors(regions), parameters, shared)
