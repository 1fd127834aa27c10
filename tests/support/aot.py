"""Compiles what the engine launches, for chips that are not there: `python aot.py ARCH ... > report.json`.

The engine runs on CPU tensors over a driver that says it is that chip, compiles as on one, and launches nothing. So
each kernel is compiled with the arguments, types and options that a GPU would get. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from flashpair.backends.triton.kernels import configs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ttir import narrow_products

from flashpair.backends.triton import fused, launch, rows, screened, tiled
from flashpair.core.call import compile_call
from flashpair.core.label_order import make_label_order
from flashpair.core.problem import Operands, Problem
from flashpair.core.reduction import Reduction
from flashpair.losses.circle import _paced
from flashpair.losses.mining import _mined
from flashpair.losses.tuplet_margin import _slack

FAMILIES = {"80": configs.AMPERE, "90": configs.HOPPER, "100": configs.BLACKWELL, "gfx942": configs.CDNA}
FAMILIES |= dict.fromkeys(("86", "89", "120"), configs.SMALL)
TENSOR_CORES = {
    "80": "mma.sync",
    "90": "wgmma",
    "100": "tcgen05",
    "gfx942": "v_mfma",
    "86": "mma.sync",
    "89": "mma.sync",
}
TENSOR_CORES["120"] = "mma.sync"
INT8 = r"(mma\.sync|wgmma)\S*\.s8\.s8|tcgen05\.mma\S*kind::i8|v_mfma_i32\S*_i8"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RAGGED = 300  # a D of several chunks and slabs, the last ones cut


FORMS = [
    ("mined", True, "dot"),
    ("logsumexps", False, "euclidean"),
    ("lifted", False, "dot"),
    ("learned", False, "dot"),
    ("programs", False, "squared_euclidean"),
]
SCREENED = [
    ("mined", torch.bfloat16, 128, False, "dot"),
    ("mined", torch.float32, RAGGED, True, "euclidean"),
    ("hinges", torch.bfloat16, 128, True, "dot"),
    ("hinges", torch.float64, RAGGED, False, "euclidean"),
]


class Chip:
    """A driver for a chip that is not there."""

    def __init__(self, arch: str, index: int) -> None:
        self.target = GPUTarget("cuda", int(arch), 32) if arch.isdigit() else GPUTarget("hip", arch, 64)
        self.index = index
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
            get_device_properties=lambda device: {
                "max_shared_mem": 2**20
            },  # what a kernel asks for is judged by the test
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


def resources(kernel: Any) -> dict[str, int]:
    """Registers and stack bytes of a cubin, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        words = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", words)
    assert found, words
    return {"registers": int(found[1]), "stack": int(found[2])}


def describe(kernel: Any, arch: str) -> dict[str, Any]:
    assembly = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    record: dict[str, Any] = {"kernel": kernel.metadata.name, "shared": kernel.metadata.shared}
    record["tensor_cores"] = TENSOR_CORES[arch] in assembly
    record["by_warp"] = "mma.sync" in assembly
    record["int8"] = bool(re.search(INT8, assembly))
    record["narrow"] = narrow_products(kernel.asm["ttir"])
    if "cubin" in kernel.asm:
        return record | resources(kernel)
    spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    assert spilled and registers
    return record | {"registers": int(registers[1]), "stack": sum(map(int, spilled))}


def problem(n: int, dtype: torch.dtype, d: int, references: bool, distance: str) -> Problem:
    labels = torch.arange(n) // 4
    plan = make_label_order(labels, labels if references else None)
    x = torch.zeros(n, d, dtype=dtype)
    y = torch.zeros(n, d, dtype=dtype) if references else None
    return Problem(x, y, plan.lo, plan.hi, plan.end, plan.ref_order, distance)


def loss(name: str) -> tuple[Reduction, ...]:
    if name == "mined":
        return _mined(2.0, 50.0, 0.1)
    if name == "learned":
        scale = torch.ones(())
        return Reduction("sum", "negatives", "softplus", scale=scale), Reduction("max", "positives")
    if name == "hinges":
        scale, both = torch.ones(()), {"lower": -1.0, "upper": 1.0}
        hinge = Reduction("sum", "negatives", "hinge", scale=scale, offset=0.5, **both)
        return hinge, Reduction("max", "negatives", lower=-0.5, upper=0.5)
    if name == "programs":  # transforms whose jit functions are generated
        circle = Reduction("logsumexp", "negatives", _paced(3.0), scale=2.0, offset=1.0)
        return circle, Reduction("sum", "positives", _slack(16.0, 0.1), offset=torch.zeros(64))
    if name == "logsumexps":
        return Reduction("logsumexp", "positives", scale=-2.0), Reduction("logsumexp", "negatives", scale=50.0)
    offsets = {"offset": torch.zeros(64), "ref_offset": torch.zeros(64)}
    return (Reduction("sum", "positives", "lifted", **offsets),)


def compile_step(
    name: str, dtype: torch.dtype, d: int, references: bool, distance: str, schedule: Any = fused, n: int = 0
) -> None:
    """One training step of a loss of n rows, or of a few tiles, launched into nothing."""
    reductions = loss(name)
    call = compile_call(reductions, distance, "fused")
    terms = call.terms
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.ones(len(terms), dtype=wide) if name in ("learned", "hinges") else None
    n = n or (256 if schedule is screened else 64)  # the screen is of whole blocks
    given = Operands(scale, call.scales, [torch.zeros(n, dtype=wide) for _ in call.vectors])
    p = problem(n, dtype, d, references, distance)
    rows.scatter_rows(p.x, p.x, p.order, rows.gather_rows(p.x, p.order, True)[1], True)
    values, kept = schedule.forward(p, terms, given, True)
    grads = [None if t.detach else values[k] for k, t in enumerate(terms)]
    need = [True, True, scale is not None, bool(call.vectors), bool(call.vectors)]
    schedule.backward(p, terms, given, values, kept, grads, need)


def main(archs: list[str]) -> None:
    report: list[dict[str, Any]] = []
    compiled: set[Any] = set()
    place: dict[str, Any] = {}
    run = launch.run

    def recorded(*args: Any, **more: Any) -> Any:
        kernel = run(*args, **more)
        if kernel is not None and kernel.hash not in compiled:
            compiled.add(kernel.hash)
            report.append(place | describe(kernel, place["arch"]))
        return kernel

    def of_screen(kernel: Any, *args: Any, **more: Any) -> Any:
        """FORMS are enough of the kernels of all pairs."""
        return recorded(kernel, *args, **more) if kernel.fn.__module__.endswith((".screen", ".candidates")) else None

    for index, arch in enumerate(archs):
        driver.set_active(Chip(arch, index))
        launch.run = recorded
        configs.family = lambda device, found=FAMILIES[arch]: found
        for (of, dtype), table in configs.TABLE.items():
            name = str(dtype).removeprefix("torch.")
            for largest, config in table if of == FAMILIES[arch] else ():
                d = min(largest, RAGGED)
                place = {"arch": arch, "dtype": name, "d": d, "loss": "mined", "config": config}
                compile_step("mined", dtype, d, False, "dot")
        for name in {"80": ["bfloat16"], "90": ["bfloat16", "float32"], "100": ["bfloat16"]}.get(arch, []):
            for which, references, distance in FORMS:
                if which == "programs" and (arch, name) != ("90", "float32"):
                    continue  # for time: of the chips and types, the one with the fewest registers to spare
                config = configs.choose(FAMILIES[arch], DTYPES[name], 128)
                place = {"arch": arch, "dtype": name, "d": 128, "loss": which, "config": config}
                compile_step(which, DTYPES[name], 128, references, distance)
        if FAMILIES[arch] in (configs.AMPERE, configs.HOPPER, configs.BLACKWELL):
            config = configs.choose(FAMILIES[arch], torch.bfloat16, 768)
            place = {"arch": arch, "dtype": "bfloat16", "d": 768, "loss": "mined, tiled", "config": config}
            compile_step("mined", torch.bfloat16, 768, False, "dot", tiled)
        for which, dtype, d, references, distance in SCREENED:
            name, config = str(dtype).removeprefix("torch."), configs.choose(FAMILIES[arch], dtype, d)
            place = {"arch": arch, "dtype": name, "d": d, "loss": f"{which}, screened", "config": config}
            launch.run = recorded if which == "mined" else of_screen
            compile_step(which, dtype, d, references, distance, screened)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
