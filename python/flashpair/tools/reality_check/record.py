"""The files of a run, and the checks that they belong to it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import torch

from ..import_target import stem


def source_of(of: Any) -> str:
    """Identifies a user's class or function: its name and a digest of its file."""
    name = f"{stem(getattr(of, '__module__', ''))}.{getattr(of, '__qualname__', repr(of))}"
    try:
        text = Path(inspect.getsourcefile(of) or "").read_bytes()
    except (TypeError, OSError):
        return name
    return f"{name} {hashlib.sha256(text).hexdigest()[:16]}"


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a folder's results; raises ValueError if they belong to other settings."""
    before = read(path)
    if before is None:
        write(path, settings)
    elif before != settings:
        other = [name for name in settings if before.get(name) != settings[name]]
        raise ValueError(
            f"{path.parent} has results of another run, with other {', '.join(other)}; give another folder"
        )


def read(path: Path, *keys: str) -> Any:
    """A document with these keys that `write` wrote; None if it does not exist.

    Raises:
        ValueError: the file is no such document; the message names it.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, error) from error
    if not isinstance(found, dict) or (missing := [key for key in keys if key not in found]):
        raise _broken(path, f"it has no {', '.join(missing)}" if isinstance(found, dict) else "it is no JSON object")
    return found


def embedded(path: Path) -> Any:
    """The tensors that torch.save wrote there, or None. Raises ValueError, which names the file, if it is broken."""
    if not path.exists():
        return None
    try:
        found = torch.load(path)
        found["values"], found["embeddings"]
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, TypeError
        raise _broken(path, error) from error
    return found


def opened(path: Path, name: str) -> Any:
    """The optuna study of that name in a file, made if it is not there. Raises ValueError: the file is of another kind.

    The file is opened by its path: in a URL of it a question mark would end the path, and the file be elsewhere.
    """
    import optuna
    import sqlalchemy

    creator = functools.partial(sqlite3.connect, str(path.resolve()), check_same_thread=False)
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite://", engine_kwargs={"creator": creator, "poolclass": sqlalchemy.pool.NullPool}
        )
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise _broken(path, str(error.__cause__ or error).partition("\n")[0]) from error


def _broken(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is not what a run has left there: {why}; delete it to do that part again")


def write(path: Path, document: Any) -> None:
    """Writes the whole file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def seed_of(*of: object) -> int:
    """A different seed for each name."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:4], "big") >> 1
