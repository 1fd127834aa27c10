"""Processes on this machine that share a batch over gloo, kept alive from test to test: starting one costs seconds.

A test hands them a job, a function of its module, which every process runs in a group of as many as the test wants. A
job that fails or takes too long ends the processes, so that the next one begins with new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60
DIED, LATE = "the process died", "the process had no answer in time"


class Team:
    """As many processes as were asked for at most; what a job returns is pickled, tensors by value."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.context = mp.get_context("forkserver")  # whose server imports torch once for all of them
        self.context.set_forkserver_preload(["torch", "flashpair.distributed"])
        self.seconds = seconds
        self.members: list[tuple[Any, Connection]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.meetings = self.world = 0

    def start(self, world: int) -> None:
        while len(self.members) < world:
            here, there = self.context.Pipe()
            arguments = (len(self.members), there, self.seconds)
            process = self.context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            self.members.append((process, here))

    def ask(self, world: int, job: Callable[..., Any], *arguments: Any) -> None:
        """Starts a job in a group of `world` processes. A group that came to an end well is used again."""
        if not self.members or self.world != world:
            self.meetings, self.world = self.meetings + 1, world
        self.start(world)
        where = Path(self.folder.name, str(self.meetings)).as_uri()
        message = pickle.dumps((where, world, job, arguments))
        for _, connection in self.members[:world]:
            connection.send_bytes(message)

    def answers(self, world: int, patience: float | None = None, failing: float | None = None) -> list[Any]:
        """What each process returned: its result, a `Failure`, DIED, or LATE for no answer within `patience` seconds,
        or `failing` seconds after another one's failure."""
        found: list[Any] = [LATE] * world
        deadline = time.monotonic() + (patience or self.seconds)
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.members[:world])}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = DIED
                if failing is not None and _failed(found[rank]):
                    deadline = min(deadline, time.monotonic() + failing)
        return found

    def run(self, world: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the job returned on each of `world` processes."""
        self.ask(world, job, *arguments)
        found = self.answers(world, 3 * self.seconds, failing=2)  # in which who waits for others has an error first
        if failed := [f for f in found if _failed(f)]:
            self.end()
            said = max(failed, key=lambda f: isinstance(f, Failure))
            raise AssertionError(f"{len(failed)} of {world} processes failed, one of them so:\n{said}")
        return found

    def end(self) -> None:
        for process, connection in self.members:
            process.kill()
            process.join()
            connection.close()
        self.members = []

    def close(self) -> None:
        self.end()
        self.folder.cleanup()


def _failed(answer: Any) -> bool:
    return answer is DIED or answer is LATE or isinstance(answer, Failure)


class Failure:
    """An exception of a process."""

    def __init__(self, error: Exception) -> None:
        self.kind, self.words = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __str__(self) -> str:
        return self.trace


def _work(rank: int, connection: Connection, seconds: float) -> None:
    torch.set_num_threads(1)
    joined = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            where, world, job, arguments = pickle.loads(connection.recv_bytes())
            answer: Any
            try:
                if joined != where:
                    if joined is not None:
                        dist.destroy_process_group()
                    limit = datetime.timedelta(seconds=seconds)
                    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
                    joined = where
                answer = job(*arguments)
            except Exception as error:
                answer = Failure(error)
            connection.send_bytes(pickle.dumps(answer))
