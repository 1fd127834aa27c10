"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import emulated
import pytest

# Before torch's OpenMP looks: threads that wait for the next loop by spinning take the cores from other workers' tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks once
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "FLASHPAIR_ONCHIP" not in os.environ and (module := emulated.module()):
        os.environ["FLASHPAIR_ONCHIP"] = str(module)
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.patch_once_a_launch()

from flashpair.backends import extension
from flashpair.backends.cuda import onchip
from flashpair.engine import small_batch

needs_extension = pytest.mark.skipif(
    isinstance(extension.load(), str), reason=f"no compiled extension: {extension.load()}"
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Whatever ran before it, a test and the fixtures made for it draw the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile's caches are per code object, and all criteria share one forward."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def one_thread():
    """For networks so small that they gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chip(monkeypatch):
    """Makes the emulated device one of so many multiprocessors, with so much shared memory a block."""

    def make(processors, shared=227 * 1024, cooperative=1):
        for name, value in (("PROCESSORS", processors), ("SHARED", shared), ("COOPERATIVE", cooperative)):
            monkeypatch.setenv(f"CUDA_ON_HOST_{name}", str(value))
        forget()

    def forget():
        onchip._limits.cache_clear()
        small_batch._compiled_plan.cache_clear()

    yield make
    monkeypatch.undo()
    forget()


# What takes longest, in this order; the rest follows, so that no worker of pytest-xdist is left with a long one alone.
LONGEST = ("test_aot", "team", "test_fused", "test_screened_tiles", "test_packaging", "test_losses", "test_small_batch")
LONGEST += (
    "test_gpu_proof",
    "test_peak_memory",
    "test_races",
    "test_onchip",
    "test_examples",
    "test_cross_batch_memory",
    "test_losses_compiled",
    "test_cli",
)


def _group(nodeid):
    """Tests of one worker: a file's, whose fixtures and caches are made once, and all those that share a `team`."""
    name = Path(nodeid.partition("::")[0]).stem
    return "team" if name.startswith("test_distributed") or name == "test_shard_classes" else name


def pytest_collection_modifyitems(items):
    groups = {item: _group(item.nodeid) for item in items}
    items.sort(key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """In the order of collection; a chip of test_aot.py takes a minute or two, and is a group of its own."""

        def _split_scope(self, nodeid):
            group = _group(nodeid)
            return nodeid.rpartition("[")[2] if group == "test_aot" else group

    if config.option.dist == "worksteal":
        return None  # xdist's own: every test by itself, as bench.gpu_proof wants them
    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.fixture(scope="session")
def team():
    """Processes that share a batch."""
    import ranks_harness

    made = ranks_harness.Team()
    yield made
    made.close()
