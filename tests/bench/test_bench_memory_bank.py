"""The study of CrossBatchMemory's steps: its JSON and its table."""

from __future__ import annotations

import json

from conftest import needs_extension

from bench.studies import memory_bank

pytestmark = needs_extension


def test_bench(tmp_path, capsys):
    options = "--sizes 300,700 --batches 16 --repeats 1 --threads 1"
    memory_bank.main([*options.split(), "--out", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    cases = json.loads(file.read_text())["cases"]
    assert [(c["m"], c["n"]) for c in cases] == [(300, 16), (700, 16)]
    assert all(t["median"] > 0 for c in cases for t in c["times"].values())
    assert capsys.readouterr().out.count("| GEMM bound |") == 4, "as it goes, and in the table"
