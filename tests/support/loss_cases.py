"""What tests of every criterion share: the implementations on a CPU, and who asks for `max_positives`."""

from __future__ import annotations

import pytest
from conftest import needs_extension
from helpers import CRITERIA

IMPLS = ["reference", pytest.param("tiled", marks=needs_extension)]
WANTS_MAX_POSITIVES = [
    name for name in CRITERIA if name.startswith(("TripletMarginLoss", "AngularLoss")) and "'hard'" not in name
]
