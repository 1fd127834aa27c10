"""Which kernels a step asks Triton to compile, for a chip that is not there: `python compilations.py`.

Prints a line for each kernel and each case: at which N it is new. Nothing is compiled.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

import torch
from aot import Chip, compile_step
from flashpair.backends.triton.kernels import configs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashpair.backends.triton import fused, screened, tiled

SIZES = (1000, 1001, 4000, 65537)
BLOCKED = (4097, 1000, 1001, 5000)  # the first, with a pair of blocks that serve each other, has all of its kernels
CASES = [
    ("mined", torch.bfloat16, 128, False, "dot", fused, SIZES),
    ("logsumexps", torch.bfloat16, 128, True, "euclidean", fused, SIZES[:3]),
    ("lifted", torch.float32, 33, False, "dot", fused, SIZES),
    ("learned", torch.float64, 128, True, "dot", fused, SIZES[:3]),
    ("programs", torch.float32, 128, False, "squared_euclidean", fused, SIZES[:3]),
    ("mined", torch.bfloat16, 768, False, "dot", tiled, BLOCKED),
    ("mined", torch.bfloat16, 128, False, "dot", screened, SIZES),
    ("hinges", torch.bfloat16, 128, True, "euclidean", screened, SIZES[:3]),
]


def main() -> None:
    asked: set[Any] = set()

    def ask(kernel: Any, key: Any, *args: Any, **more: Any) -> None:
        asked.add((kernel.__name__, str(key)))

    JITFunction._do_compile = ask
    driver.set_active(Chip("90", 0))
    configs.family = lambda device: configs.HOPPER  # type: ignore[assignment]
    report = []
    for name, dtype, d, references, distance, schedule, sizes in CASES:
        new: dict[str, list[int]] = defaultdict(list)
        known: set[Any] = set()
        for n in sizes:
            asked.clear()
            compile_step(name, dtype, d, references, distance, schedule, n)
            for kernel, _ in asked - known:
                new[kernel].append(n)
            known |= asked
        report.append({"case": f"{name} {dtype} {schedule.__name__}", "sizes": sizes, "new": new})
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
