"""The benchmarks of metrics and of class mining: what they claim, and that nothing wrong is timed."""

from __future__ import annotations

import json

import pytest

from bench.studies import class_mining
from bench.studies import metrics as bench_metrics
from flashpair import metrics


@pytest.mark.slow
def test_mined_classes_teach_more_where_classes_come_in_groups(one_thread):
    """Of five hundred classes; the gain is 0.3 or so, and none where no class is nearer than others."""
    for name, (groups, classes), gain in (("groups", (50, 10), (0.1, 0.6)), ("no groups", (500, 1), (-0.05, 0.05))):
        seen, unseen = class_mining.world(groups, classes, 4, seed=7)
        random, *mined = (class_mining.recall(kind, seen, unseen, 150, 32, 7) for kind in class_mining.KINDS)
        for recall in mined:
            assert gain[0] < recall - random < gain[1], name


def test_class_mining_document(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(class_mining, "WORLDS", {"one": (6, 4)})
    path = tmp_path / "found.json"
    assert class_mining.main(["--steps", "2", "--batch", "8", "--seeds", "2", "--out", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["steps"] == 2
    for seed in range(2):
        seen, unseen = class_mining.world(6, 4, 4, seed)
        for kind, recalls in document["recall"]["one"].items():
            assert recalls[seed] == class_mining.recall(kind, seen, unseen, 2, 8, seed)


def test_metrics_document(tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["-n", "600", "-d", "16", "--recall-at", "1,50", "--out", str(path)]
    assert bench_metrics.main(arguments) == 0
    found = json.loads(path.read_text())["found"]
    assert len(found) == 7 and all(of["seconds"] > 0 for of in found.values())
    assert "5-NN accuracy" in capsys.readouterr().out


def test_wrong_metrics_are_not_timed(tmp_path, monkeypatch):
    right = metrics.query_scores

    def wrong(*given, **options):
        scores = right(*given, **options)
        return scores._replace(map_at_r=scores.map_at_r * 0.999)

    monkeypatch.setattr(metrics, "query_scores", wrong)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_metrics.main(["-n", "600", "-d", "16", "--out", str(tmp_path / "found.json")])
    assert not (tmp_path / "found.json").exists()
