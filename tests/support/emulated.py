"""Builds csrc/cuda for the host: the kernel's own source, over cuda_on_host, as flashpair._onchip.

`python tests/support/emulated.py` prints the module's path, for FLASHPAIR_ONCHIP.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ON_HOST = "tests/support/cuda_on_host"
THREADS = 64  # of a block: two warps, so that both kinds of exchange are run
SOURCES = ("csrc/cuda/onchip.cu", "csrc/cuda/bindings.cpp")
FLAGS = f"-std=c++17 -O1 -g -pthread -Wall -Wextra -Wno-unknown-pragmas -Werror -DONCHIP_THREADS={THREADS}"


def compiler() -> list[str]:
    """Its command, empty if there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if shutil.which(command[0]) else []


def build(name: str, sources: tuple[str, ...], flags: str = "", root: Path = ROOT) -> Path:
    """build/emulated/<name> under `root`, compiled unless sources, headers and flags are those it was compiled from."""
    import pybind11

    include = [
        root / ON_HOST,
        root / "csrc/cuda",
        sysconfig.get_path("include"),
        pybind11.get_include(),
    ]
    command = [*compiler(), *FLAGS.split(), *flags.split()]
    command += [f"-I{folder}" for folder in include]
    command += ["-x", "c++", *(str(root / source) for source in sources)]
    headers = (f for folder in ("csrc/cuda", "csrc/small_batch", ON_HOST) for f in root.glob(f"{folder}/*"))
    files = [*(root / source for source in sources), *headers]
    digest = hashlib.sha256(b"".join(sorted({f.read_bytes() for f in files})) + repr(command).encode()).hexdigest()
    out = root / "build/emulated" / f"{digest[:16]}-{name}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        new = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(new)], check=True)
        new.rename(out)
    return out


LAUNCH = ("tests/support/cuda_on_host/launch.cpp", "csrc/cuda/onchip.cu")


def sanitized(sanitizer: str) -> Path:
    """The kernel and tests/support/cuda_on_host/launch.cpp as a program, under "thread" or "address,undefined"."""
    return build(f"launch-{sanitizer}", LAUNCH, f"-fsanitize={sanitizer} -fno-sanitize-recover=all")


def module() -> Path | None:
    """flashpair._onchip for CPU tensors; None where it cannot be compiled: no compiler, or no Linux."""
    if not compiler() or sys.platform != "linux":
        return None
    return build("_onchip.so", SOURCES, "-fPIC -shared -DONCHIP_EMULATED")


if __name__ == "__main__":
    print(module())
