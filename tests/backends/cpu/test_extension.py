"""A compiled module of other sources than these is refused, and its lists are Python's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import needs_extension

from flashpair.backends import extension
from flashpair.backends.source_hash import source_hash


def _module(**more):
    """What `load` looks at of a module, as the built one has it."""
    built = extension.require()
    return SimpleNamespace(**{"SOURCES": built.SOURCES, "WORDS": dict(built.WORDS), **more})


@needs_extension
def test_every_list_of_the_module_is_pythons():
    built = extension.require()
    assert set(built.WORDS) == set(extension.WORDS)
    assert extension.same_words(built)


@needs_extension
@pytest.mark.parametrize("kind", list(extension.WORDS))
def test_a_list_in_another_order_is_refused(kind, monkeypatch):
    words = dict(extension.require().WORDS)
    first, second, *rest = words[kind].split(", ")
    monkeypatch.setattr(
        extension, "_load", lambda *args: _module(WORDS=words | {kind: ", ".join([second, first, *rest])})
    )
    assert extension.load.__wrapped__() == extension.OTHER_SOURCES


@needs_extension
@pytest.mark.parametrize("sources", ["", "0123456789abcdef"])
def test_other_sources_are_refused(sources, monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda *args: _module(SOURCES=sources))
    assert extension.load.__wrapped__() == extension.OTHER_SOURCES


@needs_extension
def test_what_was_built_before_a_change_is_refused(monkeypatch, tmp_path):
    """In a checkout, whose sources are there to be looked at."""
    (tmp_path / "a.h").write_text("int changed;\n")
    monkeypatch.setattr(extension, "_load", lambda *args: _module())
    monkeypatch.setattr(extension, "CSRC", tmp_path)
    assert extension.load.__wrapped__() == extension.OTHER_SOURCES


def test_the_hash_is_of_what_the_files_hold(tmp_path):
    assert source_hash(tmp_path) == ""
    (tmp_path / "a.h").write_text("one\n")
    one = source_hash(tmp_path)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/b.cpp").write_text("not the CPU's\n")
    assert source_hash(tmp_path) == one
    (tmp_path / "a.h").write_text("two\n")
    assert len(one) == 16 and source_hash(tmp_path) != one
