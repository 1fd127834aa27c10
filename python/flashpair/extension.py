"""The compiled CPU kernels, loaded at first use and never at import."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def build_record() -> dict[str, Any]:
    """What the build wrote down: ``extension``, ``reason``, ``compiler`` and ``isas``."""
    path = Path(__file__).with_name("_build.json")
    if path.is_file():
        return json.loads(path.read_text())
    return {"extension": False, "reason": "this source tree was never built (pip install .)"}


@functools.cache
def load() -> ModuleType | str:
    """The extension module, or the reason why there is none.

    It is the file beside this one, never another installation's; FLASHPAIR_EXTENSION names another file to load instead
    (the sanitized build, say).
    """
    other = os.environ.get("FLASHPAIR_EXTENSION")
    if other:
        spec = importlib.util.spec_from_file_location("flashpair._C", other)
    else:
        spec = PathFinder.find_spec("flashpair._C", [str(Path(__file__).parent)])
    if spec is None or spec.loader is None:
        record = build_record()
        reason = f"FLASHPAIR_EXTENSION={other} is no extension module" if other else record["reason"]
        return reason or "the build's file is missing"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return str(error)
    from . import runtime

    runtime.connect(module)
    return module


def require() -> ModuleType:
    module = load()
    if isinstance(module, str):
        raise RuntimeError(f"flashpair's compiled kernels are not available: {module}")
    return module


@functools.cache
def instruction_set() -> str:
    """The best instruction set of this processor, or the one that FLASHPAIR_ISA names."""
    return os.environ.get("FLASHPAIR_ISA") or require().instruction_sets()[0]
