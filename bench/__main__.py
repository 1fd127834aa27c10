"""The command line: `python -m bench STUDY [options]`; `python -m bench` lists the studies."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

STUDIES = {
    "step": "studies.step", "family": "studies.family", "live_pairs": "studies.live_pairs",
    "training": "studies.training", "large_batch": "studies.large_batch", "memory_bank": "studies.memory_bank",
    "stream": "studies.stream", "ranks": "studies.ranks", "metrics": "studies.metrics",
    "class_mining": "studies.class_mining", "launch_overhead": "studies.launch_overhead",
    "weights": "studies.weights", "pictures": "studies.pictures",
    "demo": "demo.train", "gpu_cost": "gpu_cost",
}  # fmt: skip


def usage() -> str:
    """The list of studies, each with the first line of its file."""
    lines = ["usage: python -m bench STUDY [options]", ""]
    for name, module in STUDIES.items():
        file = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
        said = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
        lines.append(f"  {name:16}{said.split(': `')[0].rstrip('.')}")
    lines += ["", "python -m bench STUDY --help tells a study's options; python -m bench.gpu_proof OUT is for a GPU."]
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in STUDIES:
        print(f"{usage()}\n\nno study {words[0]!r}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"bench.{STUDIES[words[0]]}").main(words[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
