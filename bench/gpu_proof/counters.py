"""Stage: what ncu counts of the two main kernels in a step of each of two losses: pipes, issue, occupancy, stalls.

Sections instead of named metrics: a section knows the metrics that this chip has. The clocks are left as they are.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from . import site
from .accelerator import stand_in
from .cases import Patience, TruthCase, main_cases
from .child import Skip, Stage
from .tuning import BACKWARD, FORWARD

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats")
DURATION = "gpu__time_duration.sum"
KEPT = (
    r"gpu__time_duration\.sum$",
    r"sm__throughput\.avg\.pct", r"gpu__compute_memory_throughput\.avg\.pct", r"dram__throughput\.avg\.pct",
    r"sm__inst_executed_pipe_\w+\.avg\.pct", r"sm__pipe_\w+_cycles_active\.avg\.pct",
    r"sm__inst_executed\.avg\.per_cycle", r"smsp__issue_active\.avg\.(pct|per_cycle)",
    r"sm__warps_active\.avg\.pct", r"launch__(registers_per_thread|occupancy_limit_\w+|shared_mem_per_block_dynamic)$",
    r"smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio", r"lts__t_sector_hit_rate\.pct",
)  # fmt: skip


def command(stage: Stage, case: TruthCase) -> list[str]:
    return [
        "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--cache-control", "none",
        "--print-metric-name", "name", "--target-processes", "application-only", "--profile-from-start", "off",
        "--kernel-name", f"regex:^({FORWARD}|{BACKWARD})$",
        *(word for section in SECTIONS for word in ("--section", section)),
        sys.executable, "-m", "bench.gpu_proof.one_step", stage.plan_name, str(stage.work), case.name,
    ]  # fmt: skip


def table(lines: Iterable[str]) -> list[dict[str, str]]:
    """ncu's CSV: what stands before its header is no part of it, and the line after it has the units."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    header = next((k for k, row in enumerate(rows) if "Kernel Name" in row), None)
    if header is None:
        raise RuntimeError("ncu printed no table")
    names = rows[header]
    found = [dict(zip(names, row, strict=True)) for row in rows[header + 1 :] if len(row) == len(names)]
    return [row for row in found if row["Kernel Name"]]  # the units have no name


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def longest(rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Of each kernel the launch that took longest, by what is kept of its metrics."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        values = {name: number(text) for name, text in row.items() if any(re.match(form, name) for form in KEPT)}
        known = {name: value for name, value in values.items() if value is not None}
        name = row["Kernel Name"].split("(")[0]
        if name not in found or known.get(DURATION, 0.0) > found[name].get(DURATION, 0.0):
            found[name] = known
    return found


def run(stage: Stage) -> None:
    if not shutil.which("ncu"):
        raise Skip("ncu is not on the PATH")
    patience = Patience(stage)
    for case in main_cases(stage.plan, stage.plan.counters_n):
        patience.wait(case.name)
        done = subprocess.run(command(stage, case), capture_output=True, text=True, cwd=site.ROOT, env=dict(os.environ))
        sys.stderr.write(done.stderr)
        with (stage.out / "ncu.csv").open("a", encoding="utf-8") as file:
            file.write(done.stdout)
        refused = complaint(done.stdout + done.stderr)
        if refused:
            raise Skip(f"ncu cannot run here: {refused}")
        if done.returncode:
            raise RuntimeError(f"ncu ended with {done.returncode}; log.txt and ncu.csv have its words")
        counted = longest(table(done.stdout.splitlines()))
        for kernel in (FORWARD, BACKWARD):
            stage.say(case=case.name, kernel=kernel, **_line(counted.get(kernel)), **stand_in(stage.plan))


def _line(counted: dict[str, float] | None) -> dict[str, Any]:
    return {"failed": "ncu saw no such kernel"} if counted is None else {"metrics": counted}


def complaint(text: str) -> str:
    """What ncu itself says that it cannot do, not what it says of the command that it ran."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    return " ".join(line for line in lines if "application returned an error" not in line)[:300]
