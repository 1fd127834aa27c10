"""The package as this checkout has it, where no installation is needed to import it, and the stages' environment."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(file: str) -> ModuleType:
    """A module by its file under the root, beside which it finds its own: no other of its name can come before it."""
    if str((ROOT / file).parent) not in sys.path:
        sys.path.append(str((ROOT / file).parent))
    spec = importlib.util.spec_from_file_location(f"flashpair_{Path(file).stem}", ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_tests(name: str) -> ModuleType:
    """A module of tests/, which is no package of its own, with what it imports beside it."""
    if "flashpair_tests" not in sys.modules:
        tests = ModuleType("flashpair_tests")
        tests.__path__ = [str(ROOT / "tests")]
        sys.modules["flashpair_tests"] = tests
    return importlib.import_module(f"flashpair_tests.{name}")


def package(work: Path) -> Path:
    return work / "site/flashpair"


def make(work: Path) -> None:
    """Copies the Python part and the kernels, and the C++ extension where one was built; onchip is the build stage's.

    Forgets which kernels an earlier run has seen compiled, but not what it compiled.
    """
    to = package(work)
    shutil.rmtree(to.parent, ignore_errors=True)
    shutil.rmtree(work / "compiled", ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", "_onchip.*")
    shutil.copytree(ROOT / "python/flashpair", to, ignore=skipped)
    shutil.copytree(ROOT / "kernels", to / "backends/triton/kernels", ignore=skipped)
    (work / "compiled").mkdir(parents=True)


def marker(work: Path, name: str) -> Path:
    """The file that says that a case is compiled, or a stage in the background over."""
    return work / "compiled" / re.sub(r"[^\w.=-]+", "_", name)


def ended(work: Path, stage: str) -> None:
    marker(work, f"{stage}.end").touch()


def environment(work: Path) -> dict[str, str]:
    """Of a stage's process."""
    paths = [str(package(work).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLASHPAIR_ONCHIP")}
    return kept | own
