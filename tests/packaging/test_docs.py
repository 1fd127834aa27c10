"""The pages of docs/: every link leads somewhere, every page is in the navigation, every public name is on an API page,
and what they say of the tree is so. `make docs` builds the site; nothing here needs mkdocs."""

from __future__ import annotations

import importlib
import re
import types
import unicodedata
from pathlib import Path

import pytest
import test_architecture

import flashpair
import flashpair.compat.pml
from flashpair.compat.pml_losses import SWITCHES

ROOT = Path(__file__).resolve().parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "python/flashpair"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LOSSES = [name for name in flashpair.__all__ if name.endswith("Loss")]
MODULES = (
    flashpair, flashpair.compat.pml, flashpair.distributed, flashpair.functional, flashpair.metrics, flashpair.miners,
    flashpair.samplers,
)  # fmt: skip


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """Without blocks of code, which have brackets of their own."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def directives(page):
    return re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)


def slug(heading):
    """As Markdown's table of contents makes it of a heading."""
    text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page):
    return {slug(line) for line in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)} | set(directives(page))


def broken(page):
    """Links of a page that lead nowhere; from a page of docs/ also those out of docs/, where the site has nothing."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        outside = page.is_relative_to(DOCS) and not target.is_relative_to(DOCS)
        if outside or not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def resolve(path):
    """What a directive names. Of a module and a function of one name it is the module, as for mkdocstrings."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{path} is nothing of the package")


def public(module):
    """Name and object of what a module offers, modules aside, which have pages of their own."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]  # fmt: skip
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_link_resolves(page):
    assert not broken(page)


@pytest.mark.parametrize("link", ["nowhere.md", "losses.md#nothing", "#nothing", "../README.md"])
def test_a_broken_link_is_found(tmp_path, monkeypatch, link):
    monkeypatch.setattr(f"{__name__}.DOCS", tmp_path)
    (tmp_path / "losses.md").write_text("# Losses\n\n## A - b\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n[good](losses.md#a-b), [good](#page), [bad]({link})\n")
    assert broken(page) == [link]


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_every_picture_is_shown():
    shown = {Path(link).name for page in TEXTS for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", prose(page))}
    assert shown == {picture.name for picture in (DOCS / "pictures").iterdir()}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_on_an_api_page(module):
    described = [resolve(path) for page in PAGES for path in directives(page)]
    assert not [name for name, value in public(module).items() if not any(value is each for each in described)]


def test_no_name_is_described_twice():
    paths = [path for page in PAGES for path in directives(page)]
    assert len(paths) == len(set(paths)) > 90


def test_a_name_that_is_a_module_too_is_not_described_by_it():
    assert resolve("flashpair.metrics.retrieval") is not flashpair.metrics.retrieval
    assert resolve("flashpair.metrics.retrieval.retrieval") is flashpair.metrics.retrieval


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
def test_every_loss_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [name for name in LOSSES if f"`{name}`" not in text]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_number_of_losses(page):
    assert re.search(rf"\b{len(LOSSES)}\b", (ROOT / page).read_text(encoding="utf-8").split("\n\n")[1])


def test_the_number_of_losses_that_can_be_switched():
    assert f"all {len(SWITCHES)} losses" in (DOCS / "switching.md").read_text(encoding="utf-8")


def test_the_table_of_imports_is_the_one_that_is_tested():
    section = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Which folder may import which")[2]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section.partition("\n## ")[0], re.MULTILINE)
    words = [(re.findall(r"`([\w/]+)`|(the package)", a), re.findall(r"`([\w/]+)`|(the package)", b)) for a, b in rows]
    told = {own[0][0]: {folder for folder, _ in allowed} for own, allowed in words if own}
    assert told == test_architecture.MAY_IMPORT


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_file_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"(?<![\w/.<*])[\w.-]+(?:/[\w.-]+)*/[\w.-]+\.(?:py|h|cu|cpp|md|json|toml|txt)\b(?!:)", text)
    folders = re.findall(r"(?<![\w/.<*])(?:[\w-]+/)+(?=[`:,\s])", text)
    roots = (ROOT, PACKAGE, page.parent)
    assert not [path for path in {*files, *folders} if not any((root / path).exists() for root in roots)]
