"""Stage: the tests that need a GPU, spread over all cores; what fails is said at once, not at the end."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from . import site
from .accelerator import stand_in
from .child import Skip, Stage
from .machine import known

EVERY = 25  # tests between two lines
LAST = ("test_every_criterion_against_float64",)  # the stage `truth` has been there


class Reporter:
    """Counts, on the process that collects what the workers report."""

    def __init__(self, stage: Stage, part: str) -> None:
        self.stage, self.part = stage, part
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.counts[outcome] += 1
            if report.failed:
                self.stage.say(part=self.part, test=report.nodeid, failed=_words(report))
            elif sum(self.counts.values()) % EVERY == 0:
                self.say()

    def say(self, **more: Any) -> None:
        self.stage.say(part=self.part, tests=dict(self.counts), **more, **stand_in(self.stage.plan))


def _words(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()[-600:]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """In workers, too, which know this module as a plugin: what was proved before comes last."""
    items.sort(key=lambda item: getattr(item, "originalname", None) in LAST)


def run(stage: Stage) -> None:
    os.chdir(site.ROOT)
    workers = stage.plan.workers or max(1, known(stage)["cores"] - 2)
    common = ["-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "bench.gpu_proof.suite"]
    spread = ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    if not spread:
        stage.say(part="all", note="pytest-xdist is not here: one process")
    apart = [word for test in stage.plan.tests_alone if "::" in test for word in ("--deselect", test)]
    parts = {"all": [*spread, *apart, *stage.plan.tests], "alone": list(stage.plan.tests_alone)}
    for part, words in parts.items():
        reporter = Reporter(stage, part)
        code = pytest.main([*common, *words], plugins=[reporter])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise Skip(f"pytest ended with {code!r}; log.txt has its words")
        reporter.say(complete=True)
