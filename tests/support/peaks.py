"""Peaks of resident memory, of a script in a fresh process.

There malloc takes everything of 128 KiB or more from the system, and gives it back when it is freed: a peak is of what
lives at a time. As malloc is otherwise, that limit grows with what is freed, and a peak differs by half from run to run
with where the holes are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

THRESHOLD = 2**17  # bytes
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import sys, torch, flashpair
from bench.harness.memory import peak_of, resident
"""

only_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the kernel's peak of resident memory"
)


def printed(script: str, *arguments: object) -> list[int]:
    """The numbers that `script` prints, whose sys.argv[1:] are the arguments."""
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(THRESHOLD)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
