"""What a run keeps on disk, and how it knows whose it is."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any


def source_of(of: Any) -> str:
    """What a user's own class or function is: its name and a digest of its file."""
    name = f"{getattr(of, '__module__', '')}.{getattr(of, '__qualname__', repr(of))}"
    try:
        text = Path(inspect.getsourcefile(of) or "").read_bytes()
    except (TypeError, OSError):
        return name
    return f"{name} {hashlib.sha256(text).hexdigest()[:16]}"


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Notes what a folder's results are of, or finds that they are of something else."""
    before = read(path)
    if before is None:
        write(path, settings)
    elif before != settings:
        other = [name for name in settings if before.get(name) != settings[name]]
        raise ValueError(
            f"{path.parent} has results of another run, with other {', '.join(other)}; give another folder"
        )


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, document: Any) -> None:
    """Wholly, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(unfinished, path)


def seed_of(*of: object) -> int:
    """A seed of its own for everything that is named."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:4], "big") >> 1
