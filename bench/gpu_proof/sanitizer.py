"""Stage: memcheck and racecheck of one precompiled loss, by compute-sanitizer. sanitizer.txt has its words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from . import site
from .accelerator import stand_in
from .cases import Patience, main_cases
from .child import Skip, Stage

FOUND = 9  # the exit status that the sanitizer is told to give
SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


def command(stage: Stage, tool: str, case: str) -> list[str]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no",
        "--print-limit", "50", sys.executable, "-m", "bench.gpu_proof.one_step", stage.plan_name, str(stage.work), case,
    ]  # fmt: skip


def verdict(tool: str, text: str, code: int) -> dict[str, object]:
    """What a tool's summary says; a run without one has failed, whatever its exit status."""
    found = re.findall(SUMMARY[tool], text)
    if not found and "not supported" in text:
        return {"skipped": f"it cannot run here: {next(li for li in text.splitlines() if 'not supported' in li)}"}
    if not found:
        return {"failed": f"ended with {code} and no summary: {text.strip()[-200:]}"}
    count = int(found[-1])
    clean = count == 0 and code == 0
    return {"found": count, "clean": clean, **({} if clean or count else {"failed": f"the step ended with {code}"})}


def run(stage: Stage) -> None:
    if not shutil.which("compute-sanitizer"):
        raise Skip("compute-sanitizer is not on the PATH")
    case = main_cases(stage.plan, stage.plan.sanitizer_n)[0]
    Patience(stage).wait(case.name)
    # Without torch's cache every tensor is an allocation of its own, so that reading past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SUMMARY:
        with (stage.out / "sanitizer.txt").open("a+", encoding="utf-8") as file:
            file.write(f"--- {tool}\n")
            file.flush()
            start = file.tell()
            done = subprocess.run(
                command(stage, tool, case.name), stdout=file, stderr=subprocess.STDOUT, cwd=site.ROOT, env=environment
            )
            file.seek(start)
            found = verdict(tool, file.read(), done.returncode)
            stage.say(tool=tool, case=case.name, **found, **stand_in(stage.plan))
