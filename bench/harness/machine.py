"""The machine that a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import flashpair
from flashpair.backends import extension

ROOT = Path(__file__).resolve().parents[2]


def memory_bytes() -> int:
    """The machine's memory, or a container's share of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total


def gpu_bytes() -> int:
    """The current GPU's memory, 0 without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OtherLoad:
    """How many cores other processes kept busy since it was made; None if unknown or too short to say."""

    def __init__(self) -> None:
        self.since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        idle, waiting = 3, 4
        ticks = sum(int(t) for k, t in enumerate(fields[:8]) if k not in (idle, waiting))
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()

    def cores(self) -> float | None:
        now = self._now()
        if self.since is None or now is None or now[2] - self.since[2] < 0.5:
            return None
        everyone, ours, seconds = (b - a for a, b in zip(self.since, now, strict=True))
        return round(max(0.0, everyone - ours) / seconds, 2)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _instruction_set() -> str | None:
    try:
        return extension.instruction_set()
    except RuntimeError:
        return None


def describe() -> dict[str, Any]:
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    loaded = extension.load()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_mkl": torch.backends.mkl.is_available(),
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        "flashpair": flashpair.__version__,
        "flashpair_extension": loaded if isinstance(loaded, str) else "built",
        "instruction_set": _instruction_set(),
        "git_revision": revision,
        "git_changed_files": None if changes is None else len(changes.splitlines()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def words(machine: dict[str, Any], threads: int, on_gpu: bool = False) -> str:
    """The machine in one line, for a caption."""
    memory = machine["memory_bytes"] / 1e9
    if on_gpu:
        return (
            f"{machine['gpu']}, CUDA {machine['cuda']}, torch {machine['torch']}, Triton {machine['triton']}, "
            f"{machine['date'][:10]}"
        )
    return (
        f"{machine['cpu']}, {threads} of {machine['cores']} cores, {memory:.0f} GB, "
        f"{machine['instruction_set'] or 'no extension'}, torch {machine['torch']}, {machine['date'][:10]}"
    )
