"""bench/results: every file feeds a table, a picture or a test, and a page's tables are those that the files print."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from bench.__main__ import STUDIES
from bench.harness import report
from bench.harness.arguments import RESULTS
from bench.studies import pictures

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"`python -m bench (\w+) --(table|counts) (bench/results/[\w.-]+)`")
TABLES = [
    pytest.param(page, *found.groups(), id=f"{page.stem} {Path(found[3]).stem}")
    for page in PAGES
    for found in COMMAND.finditer(page.read_text(encoding="utf-8"))
]


def printed(study, option, file, capsys):
    """What the command prints: its lines of table, and the paragraphs below them."""
    importlib.import_module(f"bench.{STUDIES[study]}").main([f"--{option}", str(ROOT / file)])
    table, *notes = capsys.readouterr().out.strip().split("\n\n")
    return table.splitlines(), notes


@pytest.mark.parametrize("page, study, option, file", TABLES)
def test_a_pages_table_is_what_the_command_prints(page, study, option, file, capsys):
    assert (ROOT / file).is_file()
    table, notes = printed(study, option, file, capsys)
    text = page.read_text(encoding="utf-8")
    before = text[: text.index(f"`python -m bench {study} --{option} {file}`")]
    if page.name == "README.md":  # some of the rows
        own = [line for line in before.splitlines() if line.startswith("|")]
        assert own[:2] == table[:2] and len(own) > 4 and set(own) <= set(table)
        return
    own = [line for line in before.splitlines() if line.startswith("|")][-len(table) :]
    assert own == table
    assert not [note for note in notes if note.split() and " ".join(note.split()) not in " ".join(before.split())]


def test_the_tables_are_found():
    assert {found.values[1] for found in TABLES} == {
        "step", "family", "live_pairs", "training", "large_batch", "memory_bank", "stream", "ranks", "metrics",
        "class_mining",
    }  # fmt: skip


def test_every_file_is_used():
    """Named by a page or by a test, or drawn in a picture of a page."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [file.read_text(encoding="utf-8") for file in sorted((ROOT / "tests").rglob("test_*.py"))]
    named = {Path(name).name for text in texts for name in re.findall(r"bench/results/[\w.-]+\.jsonl?\b", text)}
    assert {file.name for file in RESULTS.iterdir()} <= named | set(pictures.SOURCES.values())


def test_every_file_that_a_page_names_exists():
    named = {
        name
        for page in PAGES
        for name in re.findall(r"bench/results/[\w.-]+\.jsonl?\b", page.read_text(encoding="utf-8"))
    }
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_a_later_runs_rows_are_marked(capsys):
    """Rows of the table of every loss that were measured again, whose case holds the machine and the date."""
    cases = report.read(RESULTS / "family.json")["cases"]
    later = [case for case in cases if "machine" in case]
    _, notes = printed("family", "table", "bench/results/family.json", capsys)
    assert 0 < len(later) < len(cases)
    (note,) = [note for note in notes if note.startswith("Of a later run, 2026-11-25")]
    assert re.findall(r"`(.+?)`", note) == [case["shown"] for case in later]
