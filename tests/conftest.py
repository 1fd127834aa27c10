"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest

from flashpair import extension

needs_extension = pytest.mark.skipif(
    isinstance(extension.load(), str), reason=f"no compiled extension: {extension.load()}"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile's caches are per code object, and all criteria share one forward."""
    yield
    import sys

    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
