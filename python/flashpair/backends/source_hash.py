"""What tells one state of the CPU kernels' C++ from another. The build runs this file before torch is there."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(csrc: Path) -> str:
    """Of the C++ of the CPU kernels under that folder, in hexadecimal; empty if there is none."""
    files = sorted(f for f in csrc.rglob("*") if f.suffix in (".h", ".cpp") and "cuda" not in f.parts)
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16] if files else ""
