"""Which folder of the package may import which: the table in docs/architecture.md, held against every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import LONGEST

PACKAGE = Path(__file__).resolve().parents[2] / "python/flashpair"
BACKENDS = {"backends", "backends/cpu", "backends/cuda", "backends/triton"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "backends": {"core"},
    "backends/cpu": {"core", "backends"},
    "backends/cuda": {"core", "backends"},
    "backends/triton": {"core", "backends"},
    "engine": {"core", *BACKENDS},
    "chunked": {"core", "engine", *BACKENDS},
    "losses": {"core", "engine", "chunked"},
    "memory": {"core", "backends/cpu", "engine", "chunked", "losses"},
    "distributed": {"core", "engine", "chunked", "losses"},
    "metrics": {"core", "engine"},
    "miners": {"core", "engine"},
    "samplers": {"core", "miners"},
    "compat": {"core", "engine", "losses", "miners"},
    "examples": {"", "core", "distributed", "memory", "metrics", "samplers"},
    "tools": {"", "core", "engine", "losses", "metrics", "samplers", *BACKENDS},
    "": {
        "backends/cpu", "core", "engine", "chunked", "losses", "memory", "distributed", "metrics", "miners", "samplers",
        "tools",
    },
}  # fmt: skip


def folder(parts: list[str]) -> str:
    """The folder that a module, given by its name's parts below flashpair, is in; empty for the package itself."""
    for length in (2, 1):
        name = "/".join(parts[:length])
        if name in MAY_IMPORT and len(parts) >= length:
            return name
    return ""


def imports(file: Path) -> list[tuple[int, list[str]]]:
    """Line and name, in parts below flashpair, of what a file imports from the package; within functions, too."""
    here = list(file.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashpair":
            base = (node.module or "").split(".")[1:]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "flashpair"]
            continue
        else:
            continue
        found += [(node.lineno, [*base, alias.name]) for alias in node.names]
    return found


def wrong(file: Path) -> list[str]:
    own = folder(list(file.relative_to(PACKAGE).with_suffix("").parts))
    return [
        f"{file.relative_to(PACKAGE)}:{line} imports {'.'.join(name)}: {own or 'the package'} may import "
        f"{', '.join(sorted(MAY_IMPORT[own])) or 'nothing of the package'}"
        for line, name in imports(file)
        if (there := folder(name)) != own and there not in MAY_IMPORT[own]
    ]


def test_every_folder_imports_only_what_it_may():
    assert not [line for file in sorted(PACKAGE.rglob("*.py")) for line in wrong(file)]


def test_every_folder_is_on_the_list():
    found = {"/".join(f.relative_to(PACKAGE).parts[:-1]) for f in PACKAGE.rglob("*.py")} - {"tools/reality_check"}
    assert found == set(MAY_IMPORT)


def test_no_folder_may_import_one_that_may_import_it():
    """The arrows run one way: what each may import, all the way down, never leads back."""
    for start, direct in MAY_IMPORT.items():
        seen, left = set(), set(direct) - {start}
        while left:
            here = left.pop()
            seen.add(here)
            left |= MAY_IMPORT[here] - seen - {here}
        if start not in ("", "tools"):  # the command line and the package import each other, tools only when run
            assert start not in seen, f"{start} leads back to itself"


@pytest.mark.parametrize(
    ("place", "line"),
    [("core/a.py", "from ..engine.pairs import Pairs"), ("losses/a.py", "import flashpair.memory.queue")],
)
def test_a_wrong_import_is_told(tmp_path, monkeypatch, place, line):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(f"def f():\n    {line}\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (told,) = wrong(file)
    assert told.startswith(f"{place}:2 imports ") and "may import" in told


def test_the_files_that_begin_first_exist():
    """LONGEST of tests/conftest.py, but for its one name of a group of files."""
    stems = {file.stem for file in PACKAGE.parents[1].joinpath("tests").rglob("test_*.py")}
    assert set(LONGEST) - stems == {"team"}
