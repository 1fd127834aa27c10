"""Every public name's docstring: its sections, its arguments, its source, and its examples, which are run.

The rules:

- A class or function names every parameter of its own signature in Args, each in an entry of its own, also those that
  all losses share (normalize, reduction, impl). A result, which is a NamedTuple, names its fields in Attributes.
- Raises is there unless nothing is checked (UNCHECKED).
- Shape is there for losses, metrics and miners; a year in parentheses, the source, for losses and miners.
- Examples has a doctest. Results, and classes that nobody makes by hand (RETURNED), may instead name in backticks the
  public function or class that returns them and has one.
"""

from __future__ import annotations

import builtins
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flashpair
from flashpair.compat import pml
from flashpair.engine.dispatch import unsupported_reasons

PACKAGE = Path(flashpair.__file__).parent
RETURNED = {"Divergence", "GlobalCriterion", "PairAccess", "PairReducer", "Pairs", "Screening", "ShardedClasses"}
UNCHECKED = RETURNED - {"GlobalCriterion", "ShardedClasses"} | {"Bound", "Flat", "screening"}
BASES = {"ClassCriterion", "Criterion", "Miner"}  # no paper has them
NEEDS = {  # what an example imports that may be absent
    "clustering": "sklearn",
    "clustering_scores": "sklearn",
    "confidence_interval": "scipy",
    "fuse": "pytorch_metric_learning",
    "load": "sklearn",
    "run": "optuna",
}
COMPILED = {"CrossBatchMemory", "StreamedReferences"}  # references in chunks are taken by compiled kernels alone
SECTION = re.compile(r"^(Args|Attributes|Shape|Returns|Yields|Raises|Examples):\n", re.MULTILINE)


def public() -> Iterator[tuple[str, str, Any]]:
    """Where each public name is, the name, and what it is; each object once."""
    modules = (flashpair, flashpair.distributed, flashpair.metrics, flashpair.miners, flashpair.samplers, pml)
    seen = set()
    for module in modules:
        for name in module.__all__:
            found = getattr(module, name)
            if not inspect.ismodule(found) and id(found) not in seen:
                seen.add(id(found))
                yield module.__name__, name, found
    for name, found in vars(flashpair.functional).items():
        if inspect.isfunction(found) and not name.startswith("_"):
            yield "flashpair.functional", name, found


PUBLIC = {f"{where.removeprefix('flashpair.')}.{name}": (name, found) for where, name, found in public()}
BY_NAME = dict(PUBLIC.values())
every_name = pytest.mark.parametrize("name, found", PUBLIC.values(), ids=PUBLIC)


def sections(found: Any) -> dict[str, str]:
    """The docstring's sections by their headings; what stands before them under an empty one."""
    text, *parts = SECTION.split(inspect.cleandoc(found.__doc__) + "\n")
    return {"": text, **dict(zip(parts[::2], parts[1::2], strict=True))}


def entries(section: str) -> list[str]:
    """The names that a section explains."""
    return re.findall(r"^ {4}(\w+): ", section, re.MULTILINE)


def is_result(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, tuple)


def is_loss(name: str) -> bool:
    found = BY_NAME[name]
    return name.endswith("_loss") or (inspect.isclass(found) and issubclass(found, flashpair.Criterion))


def is_pair_loss(found: Any) -> bool:
    kinds = flashpair.Criterion, flashpair.ClassCriterion
    return (
        inspect.isclass(found)
        and issubclass(found, kinds[0])
        and found not in kinds
        and not issubclass(found, kinds[1])
    )


def is_miner(name: str) -> bool:
    found = BY_NAME[name]
    return name == "hard_classes" or (inspect.isclass(found) and issubclass(found, flashpair.miners.Miner))


def test_the_names_are_those_that_users_see() -> None:
    assert {"MultiSimilarityLoss", "contrastive_loss", "retrieval", "BatchHardMiner", "gather", "fuse"} <= set(BY_NAME)
    of_pairs = [each for each in vars(flashpair.losses).values() if is_pair_loss(each)]
    assert len(of_pairs) == len([name for name in BY_NAME if name.endswith("_loss")]) > 20
    assert all(each.__name__ in BY_NAME for each in of_pairs)


@every_name
def test_it_opens_with_one_sentence(name: str, found: Any) -> None:
    first = sections(found)[""].split("\n\n")[0]
    assert first.endswith((".", ":")) and first.count("\n") <= 1


@every_name
def test_every_parameter_has_an_entry_in_args(name: str, found: Any) -> None:
    has = sections(found)
    if is_result(found):
        assert entries(has["Attributes"]) == list(found._fields)
        return
    wanted = [] if found is pml.Divergence else list(inspect.signature(found).parameters)  # a warning's are Python's
    heading = "Attributes" if found is flashpair.Screening else "Args"
    assert sorted(entries(has.get(heading, ""))) == sorted(wanted)


@every_name
def test_it_says_what_is_raised(name: str, found: Any) -> None:
    if not is_result(found) and name not in UNCHECKED:
        raised = entries(sections(found)["Raises"])
        assert raised and all(issubclass(getattr(builtins, error), Exception) for error in raised)


@every_name
def test_losses_metrics_and_miners_give_shapes(name: str, found: Any) -> None:
    metric = name in flashpair.metrics.__all__ and not is_result(found)
    if metric or is_loss(name) or is_miner(name):
        assert re.search(r"^ {4}- output: ", sections(found)["Shape"], re.MULTILINE)


@every_name
def test_losses_and_miners_name_their_source(name: str, found: Any) -> None:
    if (is_loss(name) or is_miner(name)) and name not in BASES:
        assert re.search(r"\([^()]*\b(19|20)\d\d\b[^()]*\)", sections(found)[""])


@every_name
def test_it_has_an_example_or_names_one(name: str, found: Any) -> None:
    has = sections(found)
    if "Examples" in has:
        assert ">>> " in has["Examples"]
        return
    assert is_result(found) or name in RETURNED
    named = [word.rpartition(".")[2] for word in re.findall(r"`([\w.]+)`", has[""])]
    assert any("Examples" in sections(BY_NAME[word]) for word in named if word in BY_NAME and word != name)


def doctests() -> Iterator[doctest.DocTest]:
    """The examples of every module of the package that has some."""
    given = {"torch": torch, "flashpair": flashpair, "__name__": "__main__"}
    finder = doctest.DocTestFinder(exclude_empty=True)
    for file in sorted(PACKAGE.rglob("*.py")):
        made = file.name == "functional.py"  # whose docstrings are made from the classes'
        if made or ">>> " in file.read_text(encoding="utf-8"):
            name = ".".join(("flashpair", *file.relative_to(PACKAGE).with_suffix("").parts))
            module = importlib.import_module(name.removesuffix(".__init__"))
            yield from (test for test in finder.find(module, globs=given) if test.examples)


DOCTESTS = {test.name.removeprefix("flashpair."): test for test in doctests()}


def test_examples_of_public_names_are_among_the_doctests() -> None:
    found = {name.rpartition(".")[2] for name in DOCTESTS}
    assert {name for name, each in BY_NAME.items() if "Examples" in sections(each)} <= found


@pytest.mark.parametrize("test", DOCTESTS.values(), ids=DOCTESTS)
def test_examples_print_what_they_say(test: doctest.DocTest) -> None:
    name = test.name.rpartition(".")[2]
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name in COMPILED and (reasons := unsupported_reasons("tiled", torch.device("cpu"))):
        pytest.skip("; ".join(reasons))
    report: list[str] = []
    failed, tried = doctest.DocTestRunner().run(test, out=report.append)
    assert tried and not failed, "".join(report)
