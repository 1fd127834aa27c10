"""How a stage's processes end, all of them: those of its session, whose groups may be their own (ninja makes some)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

PATIENCE = 2.0  # seconds: a process in a driver's call, of a GPU that hangs, does not die


def members(session: int) -> list[int]:
    """Processes of a session, zombies aside, by /proc."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, own = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                if int(own) == session and state != "Z":
                    found.append(int(entry))
    return found


def end_session(session: int) -> None:
    """Kills until nobody is left to start others, but for the process that asks, and whom the kernel holds on to."""
    until = time.monotonic() + PATIENCE
    while others := [pid for pid in members(session) if pid != os.getpid()]:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            break
        time.sleep(0.01)


def guard(pipe: int) -> None:
    """Forks a process that ends this session once nobody holds the pipe's other end: where the driver dies, however it
    dies, so do its stages. No thread, which would wait for whoever holds Python's lock, and no fork likes."""
    if os.fork():
        os.close(pipe)
        return
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):  # which the driver reads to their ends
            os.dup2(nothing, stream)
        while os.read(pipe, 1):
            pass
        end_session(os.getsid(0))
    finally:
        os._exit(0)
