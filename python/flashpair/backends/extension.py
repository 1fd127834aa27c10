"""The compiled kernels, loaded at first use and never at import."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.expression import OPS as STEP_OPS
from ..core.problem import AVERAGINGS, NUMBERS
from ..core.reduction import BUILT_IN, OPS, SIDES
from ..core.row_formula import FORMULAS
from .source_hash import source_hash

PACKAGE = Path(__file__).parents[1]  # where the build puts its files
CSRC = PACKAGE.parents[1] / "csrc"  # of a checkout; an installation has none
# Enumerations that C++ has in the same order. The compiled modules export their words, and `same_words` compares.
WORDS: dict[str, tuple[str, ...]] = {
    "op": OPS, "side": SIDES, "transform": BUILT_IN, "step": STEP_OPS, "loss": FORMULAS,
    "averaging": AVERAGINGS[:-1],  # the last one is Python's alone
    "number": tuple(str(dtype).removeprefix("torch.") for dtype in NUMBERS),
}  # fmt: skip
OTHER_SOURCES = "it was built from other sources than these (pip install . again)"


def build_record() -> dict[str, Any]:
    """The record of the build: ``extension``, ``reason``, ``compiler``, ``isas``, ``cuda``, ``cuda_reason``."""
    path = PACKAGE / "_build.json"
    if path.is_file():
        return json.loads(path.read_text())
    never = "this source tree was never built (pip install .)"
    return {"extension": False, "reason": never, "cuda": "", "cuda_reason": never}


def _load(name: str, variable: str, missing: str) -> ModuleType | str:
    """The compiled module flashpair.<name>, or the reason why there is none.

    It is the file in this package, never that of another installation.

    Args:
        name: the name of the module.
        variable: an environment variable that may name another file.
        missing: the reason if the file is missing.
    """
    other = os.environ.get(variable)
    if other:
        spec = importlib.util.spec_from_file_location(f"flashpair.{name}", other)
    else:
        spec = PathFinder.find_spec(f"flashpair.{name}", [str(PACKAGE)])
    if spec is None or spec.loader is None:
        return f"{variable}={other} is no extension module" if other else missing or "the build's file is missing"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return str(error)
    return module


def same_words(module: ModuleType) -> bool:
    """Whether a compiled module has the same enumerations as `WORDS`."""
    exported = getattr(module, "WORDS", {})
    words = {kind: tuple(text.lower().replace("_of", "").split(", ")) for kind, text in exported.items()}
    return bool(words) and all(WORDS.get(kind) == names for kind, names in words.items())


@functools.cache
def load() -> ModuleType | str:
    """The CPU kernels, or the reason why there are none. FLASHPAIR_EXTENSION may name another file."""
    module = _load("_C", "FLASHPAIR_EXTENSION", build_record()["reason"])
    if isinstance(module, str):
        return module
    built_from = getattr(module, "SOURCES", "")
    known = [source_hash(CSRC), "" if os.environ.get("FLASHPAIR_EXTENSION") else build_record().get("sources", "")]
    if any(built_from != other for other in known if other) or not built_from or not same_words(module):
        return OTHER_SOURCES
    from . import runtime

    runtime.connect(module)
    return module


@functools.cache
def onchip() -> ModuleType | str:
    """The CUDA kernel, or the reason why there is none. FLASHPAIR_ONCHIP may name another file (an emulated build)."""
    module = _load("_onchip", "FLASHPAIR_ONCHIP", build_record().get("cuda_reason", ""))
    return module if isinstance(module, str) or same_words(module) else OTHER_SOURCES


def emulated() -> bool:
    """Whether the CUDA kernel is built for the CPU, and so takes CPU tensors."""
    return getattr(onchip(), "emulated", False)


def require() -> ModuleType:
    """The CPU kernels; RuntimeError if there are none."""
    module = load()
    if isinstance(module, str):
        raise RuntimeError(f"flashpair's compiled kernels are not available: {module}")
    return module


@functools.cache
def instruction_set() -> str:
    """The best instruction set of this processor, or the one that FLASHPAIR_ISA names."""
    return os.environ.get("FLASHPAIR_ISA") or require().instruction_sets()[0]
