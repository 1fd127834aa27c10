"""What a step adds to a process's memory, and limits on it.

Linux keeps the high-water mark of resident memory (VmHWM) and resets it on request, so the peak of one step is exact,
whoever allocates. On other systems a thread samples. Pages of program files that a step touches first are subtracted:
they are code, not data.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.002


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A memory field of /proc/PID/status in bytes; None where there is none."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def available_bytes() -> int | None:
    """What the machine can still give to new processes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident() -> int:
    """Resident bytes of this process; where /proc is missing its highest so far."""
    found = status_bytes("VmRSS")
    if found is not None:
        return found
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Returns freed memory to the system, so that it is not counted as there before the step."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    high, now = status_bytes("VmHWM"), status_bytes("VmRSS")
    return high is not None and now is not None and high <= now + 2**21


def limit_growth(extra: int) -> None:
    """Makes allocations fail once this process has mapped `extra` bytes more than now, if the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        mapped = status_bytes("VmSize")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if mapped is not None and (hard == resource.RLIM_INFINITY or hard > mapped + extra):
            resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, hard))


class Peak(NamedTuple):
    """Bytes beyond what was resident before, and seconds, of one call; how the bytes were found."""

    extra: int
    seconds: float
    method: str


def peak_of(step: Callable[[], object]) -> Peak:
    give_back()
    before, files = resident(), status_bytes("RssFile") or 0
    exact = _reset_high_water()
    highest, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            highest[0] = max(highest[0], resident())

    sampler = threading.Thread(target=sample, daemon=True)
    if not exact:
        sampler.start()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    if exact:
        high = status_bytes("VmHWM") or 0
    else:
        done.set()
        sampler.join()
        high = max(highest[0], resident())
    new_files = max(0, (status_bytes("RssFile") or 0) - files)
    return Peak(max(0, high - before - new_files), seconds, "VmHWM" if exact else f"sampled every {SAMPLE_SECONDS} s")
