"""`python -m flashpair info`: what is built, what can run here, and every reason why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from .. import __version__
from ..backends import extension
from ..engine.dispatch import IMPLEMENTATIONS, unsupported_reasons


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
    from ..backends import runtime
    from ..backends.cpu import screened

    found = [name for name, address in runtime.addresses().items() if address]
    missing = [name for name in runtime.SYMBOLS if name not in found]
    lines = [
        f"extension: built with {record.get('compiler') or 'an unrecorded compiler'}",
        f"  file: {module.__file__}",
        f"  instruction sets this processor runs: {', '.join(module.instruction_sets())};"
        f" used: {extension.instruction_set()}",
        f"  taken from torch: {', '.join(found) or 'nothing'}",
        f"  screened: int8 products by {extension.instruction_set()}; auto screens mined pairs from"
        f" N x M = {screened.WORTH_PAIRS:,} and D = {screened.WORTH_DEPTH} on (with flashpair.screening() as seen: ..."
        " tells the share of live ones)",
    ]
    if missing:
        lines.append(f"  not found, so flashpair's own (slower) code stands in: {', '.join(missing)}")
    return lines


def _onchip_lines() -> list[str]:
    """The chips that the CUDA kernel was built for, and the largest batch of each device."""
    module = extension.onchip()
    if isinstance(module, str):
        return [f"onchip: not built: {module}"]
    found = [f"onchip: built with {extension.build_record().get('cuda') or 'an unrecorded compiler'}"]
    if unsupported_reasons("onchip", torch.device("cuda")):
        return found
    from ..backends.cuda import onchip

    for k in range(torch.cuda.device_count()):
        of = onchip.limits(k)
        if isinstance(of, str):
            found.append(f"  cuda:{k}: {of}")
            continue
        sizes = ", ".join(f"N = {onchip.largest_batch(d, of):,} at D = {d:,}" for d in (128, 1024))
        shared = f"{of.shared // 1024} KB of shared memory a block"
        found.append(f"  cuda:{k} takes up to {sizes} ({of.processors} multiprocessors, {shared})")
    return found


def lines() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    found = [
        f"flashpair {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"{platform.platform()}, {torch.get_num_threads()} threads",
        *_extension_lines(),
        *_onchip_lines(),
        f"devices: {', '.join(devices)}",
        "implementations:",
    ]
    for impl in IMPLEMENTATIONS:
        for device in ("cpu", "cuda") if len(devices) > 1 else ("cpu",):
            reasons = unsupported_reasons(impl, torch.device(device))
            found.append(f"  {impl} on {device}: {'runs' if not reasons else 'cannot run: ' + '; '.join(reasons)}")
    return found


def main() -> int:
    sys.stdout.write("\n".join(lines()) + "\n")
    return 0
