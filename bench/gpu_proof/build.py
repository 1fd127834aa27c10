"""Stage, in the background: onchip alone, by setup.py's own rules, for this chip alone; the C++ part needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from . import site
from .accelerator import ONCHIP_PTX
from .child import Skip, Stage, reason
from .machine import known


def run(stage: Stage) -> None:
    started = time.monotonic()
    module = _build(stage)
    stage.say(built=module.name, seconds=round(time.monotonic() - started, 1))
    if stage.plan.on_host:
        _to_ptx(stage)


def _to_ptx(stage: Stage) -> None:
    """What the executor runs; without it the kernel is the one that was built, for the CPU."""
    onchip = site.of_tests("ptx.onchip")
    why = onchip.missing()
    try:
        if not why:
            onchip.ptx(f"sm_{stage.plan.arch}")
    except (OSError, subprocess.CalledProcessError) as error:
        why = reason(error)
    if why:
        stage.say(part="PTX", skipped=why)
    else:
        site.marker(stage.work, ONCHIP_PTX).touch()


def _build(stage: Stage) -> Path:
    sys.path.insert(0, str(site.ROOT / "csrc"))
    try:
        import compilers
    except ImportError as error:
        raise Skip(f"the build needs pybind11: {error}") from error
    ninja = _ninja()
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise Skip(f"the build needs Python's headers: there is no {header}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*known(stage)["capability"])
    cxx, record = compilers.cpp()
    nvcc, cuda = compilers.cuda(record)
    if not nvcc:
        raise Skip(cuda["cuda_reason"])
    folder, package = stage.work / "onchip", site.package(stage.work)
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "build.ninja"
    rules.write_text("\n".join(compilers.ninja_rules(str(folder), cxx, record, nvcc)), encoding="utf-8")
    command = [ninja, "-f", str(rules), str(folder / "_onchip.so")]
    done = subprocess.run(command, cwd=site.ROOT, stdout=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"ninja ended with {done.returncode}; log.txt has its words")
    module = package / f"_onchip{sysconfig.get_config_var('EXT_SUFFIX')}"
    new = module.with_suffix(".new")
    new.write_bytes((folder / "_onchip.so").read_bytes())
    new.rename(module)
    built = package / "_build.json"
    before = json.loads(built.read_text()) if built.is_file() else {**record, "extension": False, "reason": "not built"}
    built.write_text(json.dumps(before | cuda) + "\n")
    return module


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError as error:
        found = shutil.which("ninja")
        if not found:
            raise Skip(f"the build needs ninja: {error}, and there is none on the PATH") from error
        return found
    return str(Path(BIN_DIR, "ninja"))
