"""Threads over tiles: ordinary Python threads, since torch.mm and the kernels release the GIL.

A second OpenMP runtime beside torch's own would make the two pools spin against each other; so each worker here is
told to run torch's operations alone, and tiles are what is shared out.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Work = Callable[[T], None]

_local = threading.local()


def scratch(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """This thread's buffer of that name, kept between calls (fresh pages cost more than a small tile's product)."""
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = buffers[name, dtype] = torch.empty(numel, dtype=dtype)
    return buffer


class _Pool:
    """Worker threads that live as long as the process; jobs run one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: list[queue.SimpleQueue[Any]] = []

    def _serve(self, jobs: queue.SimpleQueue[Any]) -> None:
        torch.set_num_threads(1)  # of this thread; the setting below puts back what other new threads start with
        while True:
            job, finished = jobs.get()
            job()
            finished.release()

    def run(self, job: Callable[[], None], workers: int) -> None:
        """Run `job` on `workers` threads at once and wait for all of them."""
        with self.lock:
            if len(self.jobs) < workers:
                threads = torch.get_num_threads()
                while len(self.jobs) < workers:
                    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
                    threading.Thread(target=self._serve, args=(jobs,), daemon=True, name="flashpair").start()
                    self.jobs.append(jobs)
                self._dispatch(lambda: None, len(self.jobs))
                torch.set_num_threads(threads)
            self._dispatch(job, workers)

    def _dispatch(self, job: Callable[[], None], workers: int) -> None:
        finished = threading.Semaphore(0)
        for jobs in self.jobs[:workers]:
            jobs.put((job, finished))
        for _ in range(workers):
            finished.acquire()


_pool = _Pool()


def _forget_threads() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def in_order(items: Iterable[T], touches: Callable[[T], tuple[Hashable, ...]], work: Work[T], workers: int) -> None:
    """Call `work` on every item, items that touch the same thing in the order in which they come.

    An exception in `work` stops the others after their current item and is raised here.
    """
    if workers <= 1:
        for item in items:
            work(item)
        return
    source = iter(items)
    issued: defaultdict[Hashable, int] = defaultdict(int)
    done: defaultdict[Hashable, int] = defaultdict(int)
    turn = threading.Condition()
    errors: list[BaseException] = []

    def job() -> None:
        try:
            while True:
                with turn:
                    item = next(source, None)
                    if item is None or errors:
                        return
                    tickets = [(thing, issued[thing]) for thing in touches(item)]
                    for thing, _ in tickets:
                        issued[thing] += 1
                    while any(done[thing] != place for thing, place in tickets):
                        turn.wait()
                        if errors:
                            return
                work(item)
                with turn:
                    for thing, _ in tickets:
                        done[thing] += 1
                    turn.notify_all()
        except BaseException as error:
            with turn:
                errors.append(error)
                turn.notify_all()

    _pool.run(job, workers)
    if errors:
        raise errors[0]
