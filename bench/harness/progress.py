"""Progress: a bar on a terminal, plain lines elsewhere. It goes to stderr, so that stdout has only results."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (
            SpinnerColumn(),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self.bar = Bar(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.task = None if self.bar is None else self.bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, total: float) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, total=total)

    def doing(self, what: str) -> None:
        """Shows on the bar what happens now."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=what)

    def advance(self, amount: float = 1.0) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task, amount)

    def say(self, what: str) -> None:
        """Prints a line that stays."""
        if self.bar is not None:
            self.console.print(what, markup=False)
        else:
            print(what, file=sys.stderr, flush=True)
