"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import emulated
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks once
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "FLASHPAIR_ONCHIP" not in os.environ and (module := emulated.module()):
        os.environ["FLASHPAIR_ONCHIP"] = str(module)
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.patch_once_a_launch()

from flashpair import extension, onchip, whole

needs_extension = pytest.mark.skipif(
    isinstance(extension.load(), str), reason=f"no compiled extension: {extension.load()}"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile's caches are per code object, and all criteria share one forward."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def chip(monkeypatch):
    """Makes the emulated device one of so many multiprocessors, with so much shared memory a block."""

    def make(processors, shared=227 * 1024, cooperative=1):
        for name, value in (("PROCESSORS", processors), ("SHARED", shared), ("COOPERATIVE", cooperative)):
            monkeypatch.setenv(f"CUDA_ON_HOST_{name}", str(value))
        forget()

    def forget():
        onchip._limits.cache_clear()
        whole._plan.cache_clear()

    yield make
    monkeypatch.undo()
    forget()


class Compiling:
    """tests/aot.py on some chips, in processes that run beside the other tests: two minutes of a core for each chip."""

    WORKERS = 2

    def __init__(self, chips):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = ["nice", sys.executable, str(Path(__file__).parent / "aot.py")]
        self.running = []
        for k in range(self.WORKERS):
            out = tempfile.TemporaryFile("w+")
            self.running.append(
                (subprocess.Popen([*command, *chips[k :: self.WORKERS]], stdout=out, env=environment), out)
            )

    def report(self):
        found = []
        for process, out in self.running:
            assert process.wait() == 0
            out.seek(0)
            found += json.load(out)
        return found


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_aot.py")


def pytest_collection_finish(session):
    modules = {item.module for item in session.items if item.path.name == "test_aot.py"}
    if modules and not session.config.option.collectonly:
        session.config.stash[COMPILING] = Compiling(modules.pop().CHIPS)


def pytest_sessionfinish(session):
    for process, _ in getattr(session.config.stash.get(COMPILING, None), "running", ()):
        process.kill()


COMPILING = pytest.StashKey[Compiling]()


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """What tests/aot.py reports of each chip."""
    return pytestconfig.stash[COMPILING].report()


@pytest.fixture(scope="session")
def team():
    """Processes that share a batch."""
    import ranks_harness

    made = ranks_harness.Team()
    yield made
    made.close()
