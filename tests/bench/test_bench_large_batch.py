"""The benchmark of large batches: three ways to one training, and a limit."""

from __future__ import annotations

import json

import peaks
import pytest
from conftest import needs_extension

from bench.studies import large_batch

pytestmark = needs_extension


def run(folder, *more):
    options = ["--micro-batch", "16", "--steps", "2", "--threads", "1", "--out", str(folder / "found.json")]
    assert large_batch.main([*options, *more]) == 0
    return json.loads((folder / "found.json").read_text())


def test_every_way_is_one_training(tmp_path, capsys):
    document = run(tmp_path, "--batches", "50")
    assert document["gradient_error"] < 1e-9
    assert [(case["batch"], case["way"]) for case in document["cases"]] == [(50, way) for way in large_batch.WAYS]
    first, second = document["cases"][0]["found"]["losses"]
    assert second < first
    for case in document["cases"][1:]:
        assert case["found"]["losses"] == pytest.approx([first, second], rel=1e-4)
    assert capsys.readouterr().out.count("GradCache") == 1


@peaks.only_linux
def test_a_limit_is_named(tmp_path, capsys):
    document = run(tmp_path, "--batches", "4096", "--memory-limit", "0.02")
    assert [case["found"] for case in document["cases"]] == [None] * 3
    assert capsys.readouterr().out.count("over 20 MB") == 3


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch):
    right = large_batch.backward

    def wrong(way, network, *rest):
        loss = right(way, network, *rest)
        network[-1].bias.grad[0] += 1e-6 if way == "GradCache" else 0
        return loss

    monkeypatch.setattr(large_batch, "backward", wrong)
    with pytest.raises(SystemExit, match="nothing is timed"):
        run(tmp_path)
