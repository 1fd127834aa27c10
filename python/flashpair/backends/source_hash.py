"""A hash of the C++ sources of the CPU kernels. The build runs this file before torch is installed."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(csrc: Path) -> str:
    """The hash of the CPU kernels' C++ sources in a folder, in hexadecimal; empty if there are none."""
    files = sorted(f for f in csrc.rglob("*") if f.suffix in (".h", ".cpp") and "cuda" not in f.parts)
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16] if files else ""
