"""flashpair.functional: every loss of pairs as a function, with the class's arguments and result."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import CRITERIA, PAIR_CRITERIA, batch

import flashpair
from flashpair import functional
from flashpair.losses.declaration import REGISTRY

FUNCTIONS = {getattr(functional, d.function): d.kind for d in REGISTRY.values() if d.function}


def test_every_loss_of_pairs_has_a_function():
    assert set(FUNCTIONS.values()) == {type(CRITERIA[name]()) for name in PAIR_CRITERIA}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functional_forms_have_the_criterions_arguments_and_result(function):
    kind = FUNCTIONS[function]
    of_class = inspect.signature(kind).parameters
    of_function = inspect.signature(function).parameters
    for name, parameter in of_class.items():
        assert of_function[name].default == parameter.default and of_function[name].kind == parameter.kind
    assert list(of_function)[:2] == ["embeddings", "labels"]
    refs = {"ref_emb", "ref_labels"} if kind.takes_references else set()
    assert set(of_function) == {"embeddings", "labels", *refs, *of_class}
    assert getattr(functional, function.__name__) is function and kind.__name__ in function.__doc__
    x, labels = batch(20, 4, 4, torch.float64)
    assert torch.equal(function(x, labels, reduction="sum"), kind(reduction="sum")(x, labels))
    if refs:
        y, ref_labels = batch(30, 4, 3, torch.float64, seed=1)
        found = function(x, labels, ref_emb=y, ref_labels=ref_labels)
        assert torch.equal(found, kind()(x, labels, ref_emb=y, ref_labels=ref_labels))


def test_functional_forms_take_arguments_by_place_and_refuse_others():
    x, labels = batch(20, 4, 4, torch.float64)
    found = functional.contrastive_loss(x, labels, 0.9, 0.2, "cosine")
    assert torch.equal(found, flashpair.ContrastiveLoss(0.9, 0.2, "cosine")(x, labels))
    with pytest.raises(TypeError, match="margins"):
        functional.contrastive_loss(x, labels, margins=1.0)
    with pytest.raises(TypeError, match="ref_emb"):
        functional.angular_loss(x, labels, ref_emb=x)


@pytest.mark.parametrize(
    ("old", "new"), [("ntxent_loss", "nt_xent_loss"), ("supcon_loss", "sup_con_loss"), ("fastap_loss", "fast_ap_loss")]
)
def test_old_names_work_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"functional.{old} is now functional.{new}"):
        assert getattr(functional, old) is getattr(functional, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing_loss'"):
        functional.nothing_loss  # noqa: B018
