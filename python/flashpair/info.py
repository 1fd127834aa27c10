"""`python -m flashpair info`: what is built, what can run here, and every reason why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, extension
from .dispatch import IMPLEMENTATIONS, obstacles


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension_lines() -> list[str]:
    record = extension.build_record()
    module = extension.load()
    if isinstance(module, str):
        lines = [f"pure Python, without the compiled extension: {module}"]
        if record["extension"]:
            lines.append(f"  it was built, with {record['compiler']}")
        return lines
    from . import runtime

    found = [name for name, address in runtime.addresses().items() if address]
    missing = [name for name in runtime.SYMBOLS if name not in found]
    lines = [
        f"extension: built with {record.get('compiler') or 'an unrecorded compiler'}",
        f"  file: {module.__file__}",
        f"  instruction sets this processor runs: {', '.join(module.instruction_sets())};"
        f" used: {extension.instruction_set()}",
        f"  taken from torch: {', '.join(found) or 'nothing'}",
    ]
    if missing:
        lines.append(f"  not found, so flashpair's own (slower) code stands in: {', '.join(missing)}")
    return lines


def lines() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    found = [
        f"flashpair {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"{platform.platform()}, {torch.get_num_threads()} threads",
        *_extension_lines(),
        f"devices: {', '.join(devices)}",
        "implementations:",
    ]
    for impl in IMPLEMENTATIONS:
        for device in ("cpu", "cuda") if len(devices) > 1 else ("cpu",):
            reasons = obstacles(impl, torch.device(device))
            found.append(f"  {impl} on {device}: {'runs' if not reasons else 'cannot run: ' + '; '.join(reasons)}")
    return found


def main() -> int:
    sys.stdout.write("\n".join(lines()) + "\n")
    return 0
