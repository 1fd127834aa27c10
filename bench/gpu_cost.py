"""What the GPU kernels cost, by their machine code, without a GPU: `python -m bench.gpu_cost [--json FILE]`.

Each kernel is compiled for a chip that is not there (support/aot.py), and the instructions of its loop over tiles are
counted by the pipe of a multiprocessor that runs them. A tile takes as long as the pipe with the most work; where there
is one block a multiprocessor, the tensor cores' work comes on top, because its warps wait for it together. The floor
is the tensor cores' work alone. A model, not a measurement: latencies, memory and the clock are not in it.

Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from flashpair.backends.triton.kernels import configs
from triton.runtime import driver

from flashpair.backends.triton import fused, launch
from flashpair.core.reduction import OPS, SIDES

from . import sass
from .gpu_proof import site

aot = site.load("tests/support/aot.py")


class Chip(NamedTuple):
    """Of a multiprocessor: multiply-adds of its tensor cores a clock, and KB of shared memory."""

    products: dict[torch.dtype, int]
    shared: int


_HALF, _SINGLE = torch.bfloat16, torch.float32
CHIPS = {"80": Chip({_HALF: 1024, _SINGLE: 512}, 164), "90": Chip({_HALF: 2048, _SINGLE: 1024}, 228)}
CYCLES = {"issue": 1, "alu": 2, "fma": 1, "imad": 1, "ex2": 8}  # of one of four parts, for one instruction of a warp
PARTS = 4
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
CASES = [
    ("90", "mined", _HALF, 128), ("90", "logsumexps", _HALF, 128), ("90", "mined", _HALF, 256),
    ("90", "mined", _SINGLE, 128), ("80", "mined", _HALF, 128), ("80", "mined", _SINGLE, 128),
]  # fmt: skip


def words(kernel: Any, args: tuple[Any, ...], more: dict[str, Any]) -> str:
    """What a launch computes: its reductions, and whether one exponential serves both ends of a pair."""
    reductions = [r for r in args[-2] if r.OP.value >= 0]
    found = [f"{OPS[r.OP.value]} {SIDES[r.SIDE.value]}" for r in reductions]
    one = ", one exponential" if more.get("WANTED") else ""
    return f"{kernel.__name__}: {' + '.join(found)}{one}"


def cost(kernel: Any, chip: Chip, dtype: torch.dtype, d: int, form: dict[str, Any]) -> dict[str, Any]:
    """Registers, blocks a multiprocessor, and cycles of a tile by pipe."""
    cubin, warps = kernel.asm["cubin"], kernel.metadata.num_warps
    used = sass.resources(cubin)
    once, along = sass.hot(sass.read(sass.dump(cubin, "-sass")))
    chunks = math.ceil(d / form["BLOCK_K"])
    instructions = sass.count(once)
    for pipe, number in sass.count(along).items():
        instructions[pipe] += chunks * number
    total = sum(number for pipe, number in instructions.items() if pipe != "imad")
    work = {**instructions, "issue": total}
    cycles = {pipe: round(work.get(pipe, 0) * each * warps / PARTS) for pipe, each in CYCLES.items()}
    cycles["fma"] += cycles.pop("imad")
    cycles["lsu"] = instructions["lsu"] * warps
    passes = (3 if dtype == _SINGLE else 1) * (2 if "BLOCK_D" in form else 1)
    products = form["BLOCK_ROWS"] * form["BLOCK_COLS"] * chunks * form["BLOCK_K"] * passes
    tensor = products // chip.products[dtype]
    registers = math.ceil(used["registers"] / 8) * 8
    blocks = min(
        REGISTERS // (registers * 32 * warps), chip.shared * 1024 // (kernel.metadata.shared + 1024),
        THREADS // (32 * warps),
    )  # fmt: skip
    most = max(cycles, key=lambda pipe: cycles[pipe])
    predicted = max(tensor, cycles[most]) if blocks > 1 else tensor + cycles[most]
    return {
        **used,
        "blocks": blocks,
        "instructions": total,
        "cycles": {"tensor": tensor, **cycles},
        "binds": "tensor" if blocks > 1 and tensor >= cycles[most] else most,
        "of_floor": round(tensor / predicted, 3),
    }


def report() -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    place: dict[str, Any] = {}
    run, seen = launch.run, set()

    def recorded(kernel: Any, *args: Any, **more: Any) -> Any:
        compiled = run(kernel, *args, **more)
        if (
            kernel.__name__ in ("reduce_rows", "backward_rows")
            and compiled.hash not in seen
            and not more["POSITIVES_ONLY"]
        ):
            seen.add(compiled.hash)
            form = {name: value.value for name, value in args[-1]._asdict().items() if value is not None}
            own_cost = cost(compiled, CHIPS[place["arch"]], getattr(torch, place["dtype"]), place["d"], form)
            found.append({**place, "kernel": words(kernel, args, more), **own_cost})
        return compiled

    launch.run = recorded
    try:
        for index, (arch, loss, dtype, d) in enumerate(CASES):
            driver.set_active(aot.Chip(arch, index))
            configs.family = lambda device, arch=arch: aot.FAMILIES[arch]
            place = {"arch": arch, "loss": loss, "dtype": str(dtype).removeprefix("torch."), "d": d}
            aot.compile_step(loss, dtype, d, False, "dot", fused)
    finally:
        launch.run = run
    return {"triton": triton.__version__, "kernels": found}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Triton {result['triton']}; cycles of a tile on one multiprocessor",
        "| chip | loss, dtype, D | kernel | registers (stack), blocks | instructions | tensor | issue | ALU | FMA "
        "| ex2 | LSU | binds | of the floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["kernels"]:
        pipes = " | ".join(f"{r['cycles'][pipe]:,}" for pipe in ("tensor", "issue", "alu", "fma", "ex2", "lsu"))
        what = f"sm_{r['arch']} | {r['loss']}, {r['dtype']}, {r['d']} | {r['kernel']}"
        held = f"{r['registers']} ({r['stack']}), {r['blocks']} | {r['instructions']}"
        lines.append(f"| {what} | {held} | {pipes} | {r['binds']} | {r['of_floor']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write it there, as bench/results/gpu-cost-VERSION.json has it")
    args = parser.parse_args(arguments)
    result = report()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
