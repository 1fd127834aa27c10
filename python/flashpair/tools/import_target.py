"""Imports what a user names on the command line: FILE.py:Name or module:Name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ..losses.base import Criterion

_STEMS: dict[str, str] = {}  # of modules that are files


def stem(module: str) -> str:
    """A module's name, without the suffix that tells files of one name apart."""
    return _STEMS.get(module, module)


def named(target: str) -> Any:
    """The object of that name.

    Raises:
        ValueError: the target has another form; the file, module or name does not exist; or loading it fails (the
            message gives the line).
    """
    where, _, name = target.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"must be FILE.py:Name or module:Name, got {target!r}")
    module = _loaded(Path(where)) if where.endswith(".py") else _imported(where)
    if not hasattr(module, name):
        raise ValueError(f"{where} has no {name}")
    return getattr(module, name)


def _loaded(file: Path) -> ModuleType:
    """The module of a file, under a name that no other module has."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    name = ""
    try:
        digest = hashlib.sha256(bytes(file.resolve()) + b"\0" + file.read_bytes()).hexdigest()[:12]
        if f"{file.stem}_{digest}" in sys.modules:
            return sys.modules[f"{file.stem}_{digest}"]
        name = f"{file.stem}_{digest}"
        spec = importlib.util.spec_from_file_location(name, file.resolve())
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        _STEMS[name] = file.stem
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise ValueError(f"{file} cannot be loaded{_line(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, file: Path) -> str:
    own = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file.resolve())]
    return f", at line {own[-1]}" if own else ""


def _imported(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {name}: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def criterion(target: str) -> type[Criterion]:
    """A subclass of `Criterion` of that name.

    Raises:
        ValueError: it does not exist, or is no subclass of `Criterion`.
    """
    kind = named(target)
    if not (isinstance(kind, type) and issubclass(kind, Criterion)):
        raise ValueError(f"{target} must be a subclass of flashpair.Criterion, got {kind!r}")
    return kind
