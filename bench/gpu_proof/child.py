"""One stage in a process of its own: `python -m bench.gpu_proof.child STAGE PLAN WORK OUT`. Speaks lines of JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .plan import PLANS, Plan
from .session import guard


class Skip(Exception):
    """A stage, or a part of one, that cannot run here; the message says why."""


class Stage(NamedTuple):
    """What a stage's `run` is given."""

    plan: Plan
    plan_name: str
    work: Path
    out: Path
    voice: TextIO

    def say(self, **fields: Any) -> None:
        """One line of the proof, at once."""
        self.voice.write(json.dumps(fields) + "\n")
        self.voice.flush()


def reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or [""]
    return f"{type(error).__name__}: {telling[0]}"[:300]


def fatal(error: Exception) -> bool:
    """Whether nothing that this process does on the GPU afterwards means anything."""
    words = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
             "illegal instruction", "illegal address")  # fmt: skip
    return any(word in str(error).lower() for word in words)


def main() -> int:
    name, plan, work, out = sys.argv[1:]
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    guard(pipe)
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for the log
    stage = Stage(PLANS[plan], plan, Path(work), Path(out), voice)
    try:
        importlib.import_module(f"bench.gpu_proof.{name}").run(stage)
    except Skip as why:
        stage.say(skipped=str(why))
    except Exception as error:
        traceback.print_exc()
        stage.say(error=reason(error))
        return 1
    return 0


if __name__ == "__main__":
    from bench.gpu_proof import child  # whose Skip is the stages', which __main__'s would not be

    code = child.main()
    sys.stdout.flush()
    os._exit(code)  # whatever threads libraries have left
