"""What bench.gpu_proof compiles ahead, beside what a launch asks for: `python ahead.py`, not under
TRITON_INTERPRET.

Nothing is compiled: the compiler is replaced by one that notes the source's and the options' hashes, which are what a
kernel is found by in Triton's cache. Prints a list of kernels that a launch asks for, each with whether it was there.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler

from bench.gpu_proof import launches
from bench.gpu_proof.cases import TruthCase
from bench.gpu_proof.compile import Job, Wanted, pretended
from bench.gpu_proof.plan import GPU, Tile
from bench.gpu_proof.tuning import chosen, gates
from flashpair.backends.triton import launch

MACHINE = {"capability": [9, 0], "processors": 132}
noted: dict[str, str] = {}  # place in the cache: kernel


def note(source: Any, target: Any = None, options: Any = None, **other: Any) -> Any:
    """In the compiler's place."""
    key = f"{source.hash()} {sorted(options.items())}"
    noted[key] = source.name
    nothing = SimpleNamespace(run=lambda *args: None, launch_metadata=lambda *args: None, function=None, asm={})
    nothing.packed_metadata = None
    return nothing


def cases() -> list[Job]:
    """Of every kind of case one, sizes that are and are no multiples of a tile."""
    plan = GPU
    found = [
        Job(f"{n}", TruthCase("MultiSimilarityLoss", "bfloat16", n, 128, "fused").step("cpu")) for n in (333, 1000)
    ]
    found.append(Job("split", TruthCase("NTXentLoss", "float32", 4096, 128, "fused").step("cpu")))
    for impl in ("tiled", "screened"):
        found.append(Job(impl, lambda impl=impl: launches.ahead(plan, impl, torch.bfloat16)))
    tuned = gates(plan)[0].step("cpu")

    def candidate() -> None:
        with chosen(Tile(64, 32, 4, 2, 128)):
            tuned()

    return [*found, Job("candidate", candidate)]


def main() -> None:
    torch.set_num_threads(1)
    triton.compiler.compile = note
    real, wanted = launch.run, list[Wanted]()
    with pretended(MACHINE, wanted.append):
        for job in cases():
            job.run()
    for one in wanted:
        one.compile()
        one.kernel.device_caches.clear()
    ahead = dict(noted)
    noted.clear()
    with pretended(MACHINE, wanted.append):
        launch.run = real
        for job in cases():
            job.run()
    json.dump([[name, key in ahead] for key, name in noted.items()], sys.stdout)


if __name__ == "__main__":
    main()
