"""The k nearest references of each embedding, exactly, without the similarity matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, extension, tiled
from .dispatch import obstacles
from .reduction import DISTANCES
from .references import References
from .schedule import Problem, address
from .screened import MOST_DEPTH
from .similarity import dense_pairs, normalize, upcast

BLOCK_BYTES = 2**28  # of similarities that the reference sorts at a time


class Nearest(NamedTuple):
    """Best first: ``values`` (N, k), similarities or distances, float32 or float64; ``indices`` (N, k) int64."""

    values: Tensor
    indices: Tensor


def nearest(
    embeddings: Tensor, k: int, *, ref_emb: Tensor | References | None = None, distance: str = "dot",
    unit: bool = False, impl: str = "auto",
) -> Nearest:  # fmt: skip
    """The k references of the highest similarity, or of the least distance, to each embedding; equal ones by index.

    On the CPU pairs that int8 products prove too far are not computed (SCREENED.md): a row's k-th best so far is the
    bound. Elsewhere blocks of the dense matrix are sorted. Not differentiable.

    Args:
        embeddings: (N, D), float16 to float64.
        k: how many; at most M, or N - 1 without `ref_emb`.
        ref_emb: (M, D), a tensor or References, or None: the embeddings themselves, of which none is its own neighbour.
        distance: ``"dot"`` or ``"euclidean"``.
        unit: L2-normalise rows first.
        impl: ``"auto"``, ``"screened"`` or ``"reference"``.

    Returns:
        `Nearest`. Embeddings that are not finite give NaN and -1 everywhere.

    Raises:
        TypeError, ValueError: bad arguments, named. RuntimeError: ``"screened"`` where it cannot run.
    """
    x = checks.embeddings(embeddings)
    given = ref_emb.embeddings if isinstance(ref_emb, checks.Labelled) else ref_emb
    y = None if given is None else checks.references(given, x)
    checks.word(distance, DISTANCES, "distance")
    checks.word(impl, ("auto", "screened", "reference"), "impl")
    m = x.shape[0] - 1 if y is None else y.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= max(m, 0):
        raise ValueError(f"k must be an integer from 0 to {max(m, 0)}, got {k!r}")
    reasons = obstacles("screened", x.device) if x.device.type == "cpu" else ["screened neighbours need a CPU"]
    reasons += [f"screened takes D up to {MOST_DEPTH:,}"] if x.shape[1] > MOST_DEPTH else []
    if impl == "screened" and reasons:
        raise RuntimeError(f"impl='screened' cannot run: {'; '.join(reasons)}")
    with torch.no_grad():
        x, y = upcast(x.detach(), None if y is None else y.detach())
        if unit:
            x, y = normalize(x), None if y is None else normalize(y)
        return _sorted_blocks(x, y, k, distance) if reasons or impl == "reference" else _screened(x, y, k, distance)


def _sorted_blocks(x: Tensor, y: Tensor | None, k: int, distance: str) -> Nearest:
    refs = x if y is None else y
    rows = max(1, BLOCK_BYTES // max(1, refs.shape[0] * refs.itemsize))
    values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)
    worst = -torch.inf if distance == "dot" else torch.inf
    for first in range(0, x.shape[0], rows):
        z = dense_pairs(x[first : first + rows], refs, distance)
        if y is None:
            z.diagonal(first).fill_(worst)
        found, places = z.sort(dim=1, descending=distance == "dot", stable=True)
        values[first : first + rows], indices[first : first + rows] = found[:, :k], places[:, :k]
    if not (x.isfinite().all() and refs.isfinite().all()):
        return Nearest(values.fill_(torch.nan), indices.fill_(-1))
    return Nearest(values, indices)


def _screened(x: Tensor, y: Tensor | None, k: int, distance: str) -> Nearest:
    n, m = x.shape[0], (x if y is None else y).shape[0]
    none = torch.zeros(n, dtype=torch.int64)  # no labels, so no positives
    p = Problem(x.contiguous(), None if y is None else y.contiguous(), none, none, None, torch.arange(m), distance)
    values, indices, squares = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64), p.row_and_ref_squares()
    work = tiled.cpu_pass(p, squares, lanes=1)
    work.nearest(tiled.threads(n * m, x.shape[1]), extension.instruction_set(), k, address(values), address(indices))
    return Nearest(values, indices)
