"""A compiler that the caller names is that one or an error, never a silent install without kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "csrc/compilers.py"


@pytest.fixture
def compilers():
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("flashpair_compilers", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_named_compiler_that_is_missing_is_an_error(compilers, monkeypatch):
    monkeypatch.delenv("FLASHPAIR_PURE_PYTHON", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(RuntimeError, match=r"CXX must be .* got 'no-such-compiler -m64', which is not found"):
        compilers.cpp()
    monkeypatch.setenv("FLASHPAIR_PURE_PYTHON", "1")
    assert compilers.cpp()[1]["reason"] == "FLASHPAIR_PURE_PYTHON is set"


def test_no_compiler_at_all_is_pure_python(compilers, monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHPAIR_PURE_PYTHON", raising=False)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compilers.cpp()[0] == "" and "no C++ compiler" in compilers.cpp()[1]["reason"]
