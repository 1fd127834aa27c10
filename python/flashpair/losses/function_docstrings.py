"""The docstrings of `flashpair.functional`, from the classes'."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Criterion

OLD_NAMES = {"ntxent_loss": "nt_xent_loss", "supcon_loss": "sup_con_loss", "fastap_loss": "fast_ap_loss"}
CALL = """\
    embeddings: (N, D), float16 to float64.
    labels: (N,), integers.
"""
REFERENCES = """\
    ref_emb: (M, D), `References` or `StreamedReferences`; None (the default): the batch itself.
    ref_labels: (M,), integers, with a tensor as `ref_emb`.
"""
EXAMPLE = """\
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> loss = flashpair.functional.{name}(x, labels)
    >>> torch.equal(loss, flashpair.{kind}()(x, labels))
    True
"""


def describe(function: Callable[..., Any], kind: type[Criterion]) -> None:
    """Gives a function its class's docstring, with the arguments of a call and an example of its own.

    Does nothing where Python runs without docstrings.
    """
    if kind.__doc__ is None:
        return
    text, *parts = re.split(r"^(Args|Shape|Raises|Examples):\n", inspect.cleandoc(kind.__doc__), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    references = REFERENCES if kind.takes_references else ""
    example = EXAMPLE.format(name=function.__name__, kind=kind.__name__)
    function.__doc__ = (
        f"{text}It is `{kind.__name__}` as a function.\n\nArgs:\n{CALL}{references}{sections['Args']}"
        f"Shape:\n{sections['Shape']}Returns:\n    The loss.\n\nRaises:\n{sections['Raises']}Examples:\n{example}"
    )


def old_name(name: str) -> str:
    """The function's name for a name that it had before.

    Raises:
        AttributeError: no function has had it.
    """
    if name not in OLD_NAMES:
        raise AttributeError(f"module 'flashpair.functional' has no attribute {name!r}")
    warnings.warn(f"functional.{name} is now functional.{OLD_NAMES[name]}", DeprecationWarning, stacklevel=3)
    return OLD_NAMES[name]
