"""What a user names on the command line: FILE.py:Name or module:Name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .criteria.base import Criterion


def named(target: str) -> Any:
    """The object of that name.

    Raises:
        ValueError: the target is not of this form, or the file, module or name is not there.
    """
    where, _, name = target.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"must be FILE.py:Name or module:Name, got {target!r}")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None or not Path(where).is_file():
            raise ValueError(f"there is no file {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"there is no module {where}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{where} has no {name}")
    return getattr(module, name)


def criterion(target: str) -> type[Criterion]:
    """A subclass of `Criterion` of that name.

    Raises:
        ValueError: it is not there, or is none.
    """
    kind = named(target)
    if not (isinstance(kind, type) and issubclass(kind, Criterion)):
        raise ValueError(f"{target} must be a subclass of flashpair.Criterion, got {kind!r}")
    return kind
