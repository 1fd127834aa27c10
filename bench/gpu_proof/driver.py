"""Runs the stages: each a process of its own, which is ended at its limit with all that it started."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from . import site, summary
from .plan import STAGES, Stage, limits
from .record import Record
from .session import PATIENCE, end_session

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/gpu_proof"  # kept: the next run finds what was compiled
FILES = ("proof.jsonl", "log.txt", "summary.md", "configs.txt", "ncu.csv", "sanitizer.txt")  # eight at most
HOST_IS_SLOWER = 5.0  # than what the limits are made for, and shares its cores with others
MARGIN = 6.0  # seconds that the driver keeps for itself
LEAST = 8.0  # seconds with which no stage is worth starting
POLL = 0.1


class Running:
    """A stage's process; it leads a session, all of which ends with it, and where its stdin ends."""

    def __init__(self, stage: Stage, command: list[str], environment: dict[str, str], record: Record) -> None:
        self.stage, self.record, self.since = stage, record, time.monotonic()
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        self.readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, record.hear), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, record.note), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream: IO[bytes], heard: Any) -> None:
        for line in stream:
            heard(self.stage.name, line)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def finish(self, why: str = "") -> None:
        """Waits for it, or ends it at once where there is a reason, and says how it went."""
        if why:
            self._kill()
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code, why = -9, f"{why}; it does not die"
        self._kill()  # what it left behind
        for reader in self.readers:
            reader.join(PATIENCE)
        ended = why or ("" if code == 0 else f"ended with {code}")
        site.ended(WORK, self.stage.name)
        self.record.say(self.stage.name, done=not ended, ended=ended, seconds=round(self.seconds, 1))

    def _kill(self) -> None:
        end_session(self.process.pid)


class Driver:
    """One run.

    Args:
        out: the folder of its results. plan: a name of plan.PLANS. only: names of stages, all where there is none.
        minutes: that the run may take.
    """

    def __init__(self, out: Path, plan: str, only: tuple[str, ...], minutes: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        self.out, self.plan, self.total = out, plan, 60 * minutes
        slower = HOST_IS_SLOWER if plan == "host" else 1.0
        self.stages = [stage._replace(limit=slower * stage.limit) for stage in limits(only)]
        self.machine: dict[str, Any] = {}
        self.record = Record(out, self._heard)
        self.background: list[Running] = []

    def _heard(self, line: dict[str, Any]) -> None:
        if line["stage"] == "machine" and "machine" in line:
            self.machine = line["machine"]
        if "ended" in line or "skipped" in line or "error" in line:
            print(f"gpu proof: {line['at']:6.1f} s  {line['stage']}: {_words(line)}", flush=True)

    def _start(self, stage: Stage) -> Running:
        command = [sys.executable, "-m", "bench.gpu_proof.child", stage.name, self.plan, str(WORK), str(self.out)]
        return Running(stage, command, site.environment(WORK), self.record)

    def _left(self) -> float:
        return self.total - MARGIN - self.record.elapsed

    def _overdue(self, running: Running, limit: float) -> str:
        return "" if running.seconds < limit else f"ended after its limit of {limit:.0f} s"

    def _watch_background(self) -> None:
        for running in list(self.background):
            late = self._overdue(running, running.stage.limit)
            if late or running.process.poll() is not None:
                self.background.remove(running)
                running.finish(late)

    def _run(self, stage: Stage) -> None:
        if self._left() < LEAST:
            self.record.say(stage.name, skipped=f"no time left of {self.total / 60:g} minutes")
            return
        limit = min(stage.limit, self._left())
        running = self._start(stage)
        try:
            while running.process.poll() is None and not self._overdue(running, limit):
                self._watch_background()
                time.sleep(POLL)
        except KeyboardInterrupt:
            running.finish("ended with the run")
            raise
        running.finish(self._overdue(running, limit) if running.process.poll() is None else "")

    def run(self) -> int:
        """0 where nothing failed, 1 where something did, 2 where there is no GPU."""
        WORK.mkdir(parents=True, exist_ok=True)
        with (WORK / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.record.say("driver", error=f"another run is at work in {WORK}")
                return 2
            return self._run_all()

    def _run_all(self) -> int:
        site.make(WORK)
        for missing in {s.name for s in STAGES} - {s.name for s in self.stages}:
            site.ended(WORK, missing)
        foreground = [s for s in self.stages if not s.background]
        try:
            for stage in foreground:
                self._run(stage)
                if stage.name == "machine" and not self.machine:
                    self.record.say("machine", error="no machine to prove anything on; log.txt says why")
                    return 2
                if stage.name == "machine":
                    self.background = [self._start(s) for s in self.stages if s.background]
                summary.write(self.out, self.record.lines)
            while len(foreground) == 1 and self.background and self._left() > 0:
                self._watch_background()
                time.sleep(POLL)
        except KeyboardInterrupt:
            self.record.say("driver", error="stopped from outside")
        finally:
            for running in self.background:
                running.finish("ended with the run" if running.process.poll() is None else "")
            summary.write(self.out, self.record.lines)
        return int(summary.failed(self.record.lines))


def _words(line: dict[str, Any]) -> str:
    if "skipped" in line:
        return f"skipped: {line['skipped']}"
    if "error" in line:
        return f"error: {line['error']}"
    return f"{line['ended'] or 'done'} ({line['seconds']} s)"
