"""`python -m flashpair reality-check`: killed, it goes on; its numbers are `run`'s; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from reality_check_cases import SMALL, features

from flashpair.metrics import confidence_interval
from flashpair.tools.reality_check import (
    load,
    report,
    run,
    study,
)
from flashpair.tools.reality_check.study import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")


def command(tmp_path, *more):
    data = features()
    np.savez(tmp_path / "data.npz", features=data.samples.numpy(), labels=data.labels.numpy())
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
    return [
        sys.executable, "-m", "flashpair", "reality-check", "--data", str(tmp_path / "data.npz"), "--losses",
        "contrastive,nt_xent", "--out", str(tmp_path / "out"), *flags, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_command_survives_a_kill(tmp_path):
    """Killed as the system kills, it goes on; table, numbers and picture are what `run` finds."""
    kept = tmp_path / "out" / "nt_xent" / "trials"
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not kept.is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    _, contrastive, nt_xent = run(features_of(tmp_path), ["contrastive", "nt_xent"], SMALL, tmp_path / "expected")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["protocol"] == vars(SMALL)
    found = {loss["name"]: loss for loss in document["losses"]}
    assert list(found) == ["untrained", "contrastive", "nt_xent"]
    for outcome in (contrastive, nt_xent):
        assert found[outcome.name]["values"] == outcome.values
        assert found[outcome.name]["concatenated"] == outcome.concatenated
        for metric in METRICS:
            interval = confidence_interval(outcome.separated[metric])
            assert found[outcome.name]["intervals"]["separated"][metric] == interval._asdict()
            shown = confidence_interval([100 * score for score in outcome.separated[metric]])
            assert f"{shown.mean:.2f} ± {shown.half_width:.2f}" in done.stdout
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def features_of(tmp_path):
    return load(str(tmp_path / "data.npz"))


def test_one_repeat_has_no_interval():
    one = study.Outcome("one", {}, 0.5, 1, *({m: [0.25] for m in METRICS} for _ in range(2)))
    document = report.document([one], features(), SMALL)
    interval = document["losses"][0]["intervals"]["separated"]["map_at_r"]
    assert interval == {"mean": 0.25, "half_width": None}
    assert str(report.percent([0.25])) == "25.00"


def test_command_refuses(tmp_path):
    for more, words in [(("--losses", "no"), "a loss is"), (("--network", "no"), "must be FILE.py:Name")]:
        done = subprocess.run(command(tmp_path, *more), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert words in done.stderr and "Traceback" not in done.stderr
