"""Tries a variant once at a size, in a child process that is stopped at a limit; a failure is never fatal."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case
from .memory import available_bytes, status_bytes
from .units import duration, size
from .worker import COMPILER_BYTES

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.02
START_SECONDS = 180.0  # imports and data
GRACE_SECONDS = 2.0  # the child times its own step, more exactly
COMPILE_SECONDS = 300.0
RESERVE = 2**28  # bytes that the machine must keep


@dataclass(frozen=True)
class Attempt:
    """status: ok, over_memory, over_time, not_there or failed; words: for the table, where it is not ok.

    extra: bytes beyond inputs and gradient; highest: of the whole process during the step, interpreter and weights too.
    """

    status: str
    words: str = ""
    seconds: float | None = None
    extra: int | None = None
    method: str = ""
    gradient: int = 0
    inputs: int = 0
    highest: int | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    # Processes that compile in parallel would be outside this sandbox.
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, **one, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _event(line: bytes) -> dict[str, Any] | None:
    """An event that the child printed, or None: libraries print lines, too."""
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, dict) and "event" in said:
            return said
    return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Stops the child and its own children: it leads a session of its own."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class _Watch:
    """The limits on one child, by the stage that it reports."""

    def __init__(self, case: Case, pid: int) -> None:
        self.options, self.pid = case.options, pid
        self.base: int | None = None
        self.highest, self.limit_bytes = 0, self.options.memory_limit
        self.limit_seconds, self.since = START_SECONDS, time.monotonic()

    def stage(self, event: dict[str, Any]) -> None:
        if event["event"] in ("compile", "step"):
            self.base, self.since = event["resident"], time.monotonic()
            self.highest, compiling = 0, event["event"] == "compile"
            self.limit_seconds = self.options.time_limit + compiling * COMPILE_SECONDS
            self.limit_bytes = self.options.memory_limit + compiling * COMPILER_BYTES

    def verdict(self) -> Attempt | None:
        resident = status_bytes("VmRSS", self.pid)
        if resident is not None and self.base is not None:
            self.highest = max(self.highest, resident - self.base)
        if self.highest > self.limit_bytes:
            return over_memory(self.options.memory_limit)
        free = available_bytes()
        if free is not None and free < RESERVE:
            return Attempt("over_memory", f"the machine has only {size(free)} left")
        if time.monotonic() - self.since <= self.limit_seconds + GRACE_SECONDS:
            return None
        if self.limit_seconds == self.options.time_limit:
            return Attempt("over_time", f"over {duration(self.options.time_limit)}")
        return Attempt("failed", f"no step within {duration(self.limit_seconds)} of starting or compiling")


def over_memory(limit: int) -> Attempt:
    return Attempt("over_memory", f"over {size(limit)}")


def _concluded(event: dict[str, Any] | None, watch: _Watch, code: int, errors: str) -> Attempt:
    kind = None if event is None else event["event"]
    if event is not None and kind == "done":
        if event["extra"] is not None and event["extra"] > watch.options.memory_limit:
            return over_memory(watch.options.memory_limit)
        if event["seconds"] > watch.options.time_limit:
            return Attempt("over_time", f"over {duration(watch.options.time_limit)}")
        return Attempt("ok", **{k: v for k, v in event.items() if k != "event"})
    if kind == "over_memory" or (code < 0 and watch.highest > 0.7 * watch.limit_bytes):
        return over_memory(watch.options.memory_limit)
    if event is not None and kind in ("not_there", "failed"):
        return Attempt(kind, event["why"])
    last = (errors.strip().splitlines() or [""])[-1]
    how = f"stopped by signal {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return Attempt("failed", f"the process {how}: {last}"[:200].rstrip(": "))


def attempt(case: Case, variant: str) -> Attempt:
    command = [sys.executable, "-m", "bench.harness.worker", case.options.to_json(), str(case.n), str(case.d), variant]
    with tempfile.TemporaryFile() as errors, selectors.DefaultSelector() as selector:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=_environment(), start_new_session=True
        )
        try:
            assert child.stdout is not None
            selector.register(child.stdout, selectors.EVENT_READ)
            watch, event = _Watch(case, child.pid), None
            pending = b""
            while True:
                if selector.select(POLL_SECONDS):
                    data = os.read(child.stdout.fileno(), 65536)
                    if not data:
                        break
                    *lines, pending = (pending + data).split(b"\n")
                    for line in filter(None, map(_event, lines)):
                        event = line
                        watch.stage(event)
                if (verdict := watch.verdict()) is not None:
                    return verdict
            code = child.wait(START_SECONDS)
            errors.seek(0)
            return _concluded(event, watch, code, errors.read().decode(errors="replace"))
        finally:
            _stop(child)
            if child.stdout is not None:
                child.stdout.close()
