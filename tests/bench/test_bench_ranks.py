"""The benchmark of shared batches: that it checks before it times, and counts what its formulas say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_extension

from bench.studies import ranks, ranks_report, traffic
from bench.studies.ranks_work import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_extension
WORLDS = (2, 3)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One small run from the command line: its JSON, and what it printed."""
    out = tmp_path_factory.mktemp("ranks")
    arguments = ["--n", 192, "--dim", 16, "--repeats", 2, "--worlds", "2,3", "--losses", ",".join(traffic.PASSES)]
    command = [sys.executable, "-m", "bench", "ranks", *map(str, arguments), "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*-ranks-*.json")
    return path, json.loads(path.read_text()), done.stdout


def test_every_variant_is_checked_and_timed(outcome):
    _, document, _ = outcome
    assert [case["loss"] for case in document["cases"]] == list(traffic.PASSES)
    assert document["machine"]["cores"] >= 1 and document["worlds"] == [1, 2, 3]
    for case in document["cases"]:
        assert list(case["variants"])[2:] == [f"{s}, {w} processes" for w in WORLDS for s in SCHEDULES]
        one = case["variants"]["one process"]["seconds"]["median"]
        for record in case["variants"].values():
            assert record["check"]["right"] and record["check"]["checked_n"] == 192
            assert len(record["seconds"]["samples"]) == 2
            assert record["speedup"] == pytest.approx(one / record["seconds"]["median"])
            assert record["memory"]["peak_extra"] >= 0


def test_what_is_sent_is_what_the_formula_says(outcome):
    """But for single numbers: sizes, the means' denominators, the loss itself."""
    for case in outcome[1]["cases"]:
        for record in case["variants"].values():
            if record["processes"] == 1:
                assert record["traffic"]["bytes"] == 0
            else:
                beyond = record["traffic"]["bytes"] - record["traffic"]["formula"]
                assert 0 <= beyond <= 400, (case["loss"], record["how"], record["processes"], beyond)
                passes, each = traffic.PASSES[case["loss"]], 192 // record["processes"]
                for way, walks in zip(("forward", "backward"), passes, strict=True):
                    assert record["traffic"]["pairs"][way] == len(walks) * each * 192 / 2


def test_the_table_comes_from_the_json(outcome, capsys):
    path, document, said = outcome
    ranks.main(["--table", str(path)])
    table = capsys.readouterr().out
    assert table.strip() == ranks_report.markdown(document).strip() and table.strip() in said
    assert table.count("processes |") == 2 * len(WORLDS) * len(traffic.PASSES)


def test_what_is_wrong_is_not_timed(tmp_path):
    """A process whose gradient is off by a little ends the run."""
    code = (
        "import sys, torch, flashpair.distributed.global_loss as loss\n"
        "class Off(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, by): return x.view_as(x)\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return g * 1.01, None\n"
        "loss.ScaleGrad = Off\n"
        "from bench.studies import ranks_work\n"
        "from bench.harness.options import Options\n"
        "plan = ranks_work.Plan(Options(10**9, 1, sizes=(96,), dims=(16,), repeats=1), ('ntxent',), (1, 2))\n"
        "def run(rank): ranks_work.work(rank, plan, sys.argv[1], lambda document: None, lambda what: None)\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.start_processes(run, nprocs=2, start_method='fork')\n"
    )
    command = [sys.executable, "-c", code, (tmp_path / "meeting").as_uri()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "all_gather, 2 processes is wrong: gradient off" in done.stderr, done.stderr


def test_words_that_it_does_not_know(capsys):
    for arguments in (["--losses", "triplet"], ["--worlds", "0,2"]):
        with pytest.raises(SystemExit):
            ranks.main(arguments)
    assert "takes ms, ms_weighting, ntxent, got triplet" in capsys.readouterr().err
