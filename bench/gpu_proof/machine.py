"""Stage: what this machine is. Nothing else starts before its line is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import torch

from ..harness import machine as found_machine
from .child import Skip, Stage

FIELDS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,mig.mode.current"
)
FILE = "machine.json"
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi")


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; raises Skip with the reason."""
    if not shutil.which("nvidia-smi"):
        raise Skip("nvidia-smi is not here")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(FIELDS.split(",")):
        raise Skip(f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
    return dict(zip(FIELDS.split(","), values, strict=True))


def known(stage: Stage) -> dict[str, Any]:
    """What this stage has found, for stages that do not touch the GPU."""
    return json.loads((stage.work / FILE).read_text(encoding="utf-8"))


def chip(stage: Stage) -> dict[str, Any]:
    if stage.plan.on_host:
        return {"capability": [int(stage.plan.arch[:-1]), int(stage.plan.arch[-1])], "processors": 132, "count": 0}
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU: CUDA {torch.version.cuda or 'is not built in'}")
    properties = torch.cuda.get_device_properties(0)
    return {
        "capability": list(torch.cuda.get_device_capability(0)),
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
    }


def run(stage: Stage) -> None:
    tools = {name: shutil.which(name) for name in TOOLS}
    facts = {**found_machine.describe(), **chip(stage), "tools": tools, "cores": len(os.sched_getaffinity(0))}
    (stage.work / FILE).write_text(json.dumps(facts), encoding="utf-8")
    stage.say(machine=facts)
    try:
        stage.say(clocks=smi())
    except (Skip, subprocess.TimeoutExpired) as why:
        stage.say(part="clocks", skipped=str(why))
