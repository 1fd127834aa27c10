"""Stage, in the background: onchip alone, by setup.py's own rules, for this chip alone; the C++ part needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from . import site
from .child import Skip, Stage
from .machine import known


def run(stage: Stage) -> None:
    started = time.monotonic()
    module = _build(stage)
    stage.say(built=module.name, seconds=round(time.monotonic() - started, 1))


def _build(stage: Stage) -> Path:
    sys.path.insert(0, str(site.ROOT / "csrc"))
    try:
        import compilers
        import ninja
    except ImportError as error:
        raise Skip(f"the build needs ninja and pybind11: {error}") from error
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*known(stage)["capability"])
    cxx, record = compilers.cpp()
    nvcc, cuda = compilers.cuda(record)
    if not nvcc:
        raise Skip(cuda["cuda_reason"])
    folder, package = stage.work / "onchip", site.package(stage.work)
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "build.ninja"
    rules.write_text("\n".join(compilers.ninja_rules(str(folder), cxx, record, nvcc)), encoding="utf-8")
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(rules), str(folder / "_onchip.so")]
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
