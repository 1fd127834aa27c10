"""proof.jsonl and log.txt: what stages say, written and flushed as it comes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_LOG = 8 * 2**20  # bytes


class Record:
    """Lines of JSON, each with the stage that said it and the seconds since the start.

    Args:
        out: the folder. heard: called with each line.
    """

    def __init__(self, out: Path, heard: Callable[[dict[str, Any]], None]) -> None:
        self.started, self.heard, self.lines = time.monotonic(), heard, list[dict[str, Any]]()
        self.lock = threading.Lock()
        self.file = (out / "proof.jsonl").open("wb", buffering=0)  # a line is one write, whole even if this is killed
        self.log = (out / "log.txt").open("wb")
        self.logged = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, stage: str, **fields: Any) -> None:
        line = {"stage": stage, "at": round(self.elapsed, 1), **fields}
        with self.lock:
            self.lines.append(line)
            self.file.write(json.dumps(line).encode() + b"\n")
        self.heard(line)

    def hear(self, stage: str, text: bytes) -> None:
        """A line of a stage's process; what is no JSON goes to the log."""
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if isinstance(said, dict):
            self.say(stage, **said)
        else:
            self.note(stage, text)

    def note(self, stage: str, text: bytes) -> None:
        words = f"[{stage}] ".encode() + text.rstrip(b"\n") + b"\n"
        with self.lock:
            if self.logged + len(words) > MOST_LOG:
                return
            self.logged += len(words)
            self.log.write(words)
            self.log.flush()
