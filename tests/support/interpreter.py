"""Triton's interpreter without its waste: it patches triton.language anew at every call of a jit function.

A kernel's launch has done that already, and its end undoes it, so calls within a launch leave all as it is; it was half
of an interpreted kernel's time. What kernels compute is not touched.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch = getattr(interpreter, "_patch_lang", None)
_patched: set[int] = set()  # the modules, while a launch is on


def _patch_once(fn: Any) -> Any:
    known = (interpreter.tl, interpreter.tl.core)
    modules = {id(value) for value in fn.__globals__.values() if any(value is one for one in known)}
    if modules and modules <= _patched:
        return None  # nobody restores what a call within a launch has patched
    outermost = not _patched
    scope = _patch(fn)
    _patched.update(modules)
    if outermost:
        restore = scope.restore

        def end() -> None:
            _patched.clear()
            restore()

        scope.restore = end
    return scope


def patch_once_a_launch() -> None:
    """Where this version of Triton has what it takes: a scope that says when a launch is over."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once
