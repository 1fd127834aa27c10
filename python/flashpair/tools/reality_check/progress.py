"""Progress bars of long runs."""

from __future__ import annotations

from typing import Any

from ...core.extras import extra
from .study import Progress

with extra("reality-check", "a comparison's bars"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

BELOW = {"losses": ("settings", "folds", "epochs"), "settings": ("folds", "epochs"), "folds": ("epochs",)}


class Bars(Progress):
    """A bar for each level. If the output is no terminal, no bars are shown."""

    def __init__(self, console: Console) -> None:
        what = TextColumn("{task.description:>28}", markup=False)
        columns = what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.shown = RichProgress(*columns, console=console, transient=True)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.shown.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.shown.__exit__(*raised)

    def at(self, level: str, done: int, of: int, what: str = "") -> None:
        if level not in self.tasks:
            self.tasks[level] = self.shown.add_task(what, total=of)
        self.shown.update(self.tasks[level], completed=done, total=of, description=what)
        for lower in BELOW.get(level, ()):
            if lower in self.tasks:
                self.shown.reset(self.tasks[lower], total=1)
