"""The k nearest references of each embedding, exactly, without the similarity matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import extension
from ..backends.cpu import tiled
from ..backends.cpu.screened import MOST_DEPTH
from ..core import checks, similarity
from ..core.problem import Problem, address, solid
from ..core.reduction import DISTANCES
from ..core.similarity import alike, copies, dense_pairs, upcast
from .cached_references import References
from .dispatch import unsupported_reasons

BLOCK_BYTES = 2**28  # what a block of rows may need beside its result


class Nearest(NamedTuple):
    """The nearest references of each embedding, best first; the result of `nearest`.

    Attributes:
        values: (N, k), similarities or distances, float32 or float64.
        indices: (N, k) int64, of the references.
    """

    values: Tensor
    indices: Tensor


def nearest(
    embeddings: Tensor, k: int, *, ref_emb: Tensor | References | None = None, distance: str = "dot",
    normalize: bool = False, impl: str = "auto", unit: bool | None = None,
) -> Nearest:  # fmt: skip
    """The k references of the highest similarity, or the least distance, to each embedding; equal ones by index.

    On the CPU pairs that int8 products prove too far are not computed (docs/screened-mining.md); the bound is a row's
    k-th best so far. Elsewhere blocks of the dense matrix are sorted. Not differentiable.

    Args:
        embeddings: (N, D), float16 to float64.
        k: how many, at least 0 and at most M, or N - 1 without `ref_emb`.
        ref_emb: (M, D), a tensor or `References`; None: the embeddings themselves, none of which is its own neighbour.
        distance: ``"dot"`` (the default) or ``"euclidean"``.
        normalize: L2-normalise the rows first.
        impl: ``"auto"`` (the default), ``"screened"`` or ``"reference"``.
        unit: the old name of `normalize`, deprecated.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64.
        - output: `Nearest`, tensors (N, k).

    Returns:
        A `Nearest`. If embeddings are not finite, NaN and -1 everywhere.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: `k` out of range, an unknown word, or shapes and devices that do not fit.
        RuntimeError: ``"screened"`` where it cannot run, with every reason.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> flashpair.nearest(x, 1).indices.tolist()
        [[1], [2], [1], [2]]
    """
    normalize = checks.renamed("nearest", "unit", unit, "normalize", normalize)
    with torch.no_grad():
        x, y, screened = prepared(embeddings, k, ref_emb, distance, normalize, impl)
        values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)
        for first, neighbours in blocks(x, y, k, distance, screened=screened):
            rows = slice(first, first + neighbours.values.shape[0])
            values[rows], indices[rows] = neighbours
    return Nearest(values, indices)


def prepared(
    embeddings: Any, k: Any, ref_emb: Any, distance: str, normalize: bool, impl: str
) -> tuple[Tensor, Tensor | None, bool]:
    """Rows and references as `blocks` takes them, after every check, and whether it is to screen."""
    x = checks.embeddings(embeddings)
    given = ref_emb.embeddings if isinstance(ref_emb, checks.Labelled) else ref_emb
    y = None if given is None else checks.references(given, x)
    checks.word(distance, DISTANCES, "distance")
    checks.word(impl, ("auto", "screened", "reference"), "impl")
    m = x.shape[0] - 1 if y is None else y.shape[0]
    if not 0 <= checks.integer(k, "k") <= max(m, 0):
        raise ValueError(f"k must be at most {max(m, 0)}, the number of references, got {k}")
    reasons = (
        unsupported_reasons("screened", x.device) if x.device.type == "cpu" else ["screened neighbours need a CPU"]
    )
    reasons += [f"screened takes D up to {MOST_DEPTH:,}"] if x.shape[1] > MOST_DEPTH else []
    if impl == "screened" and reasons:
        raise RuntimeError(f"impl='screened' cannot run: {'; '.join(reasons)}")
    if m >= 2**31:
        raise ValueError(f"ref_emb must have fewer than 2^31 rows, got {m:,}")
    x, y = upcast(x.detach(), None if y is None else y.detach())
    if normalize:
        x, y = similarity.l2_normalize(x), None if y is None else similarity.l2_normalize(y)
    return x, y, not reasons and impl != "reference"


def blocks(x: Tensor, y: Tensor | None, k: int, distance: str, *, screened: bool) -> Iterator[tuple[int, Nearest]]:
    """The same, checked, of a block of rows at a time: the first row, and what is nearest to it and those after it."""
    refs = x if y is None else y
    finite = x.isfinite().all() and refs.isfinite().all()
    # A screened row keeps pairs of up to 16 bytes (nearest.h: room_); a sorted one its similarities, twice, and their
    # order.
    row_bytes = 16 * (k + max(k, 16)) if screened else 4 * refs.shape[0] * refs.itemsize
    size = max(1, BLOCK_BYTES // max(1, row_bytes))
    twins = None if screened or distance != "dot" or not refs.numel() else copies(refs)
    for first in range(0, x.shape[0], size):
        rows = x[first : first + size]
        if not finite:
            values = rows.new_full((rows.shape[0], k), torch.nan)
            yield first, Nearest(values, torch.full_like(values, -1, dtype=torch.int64))
        elif screened and y is None and size < x.shape[0]:
            # One more than asked, of all: a row is then left out itself, by its index, wherever it stands.
            yield first, _without_self(_screened(rows, refs, k + 1, distance), first)
        elif screened:
            yield first, _screened(rows, y, k, distance)
        else:
            yield first, _sorted(rows, refs, twins, k, distance, None if y is not None else first)


def _sorted(
    rows: Tensor, refs: Tensor, first: Tensor | None, k: int, distance: str, self_at: int | None
) -> Nearest:  # fmt: skip
    """first: `copies` of refs."""
    z = alike(dense_pairs(rows, refs, distance), first)
    if self_at is not None:
        z.diagonal(self_at).fill_(-torch.inf if distance == "dot" else torch.inf)
    values, indices = z.sort(dim=1, descending=distance == "dot", stable=True)
    return Nearest(values[:, :k], indices[:, :k])


def _without_self(neighbours: Nearest, first: int) -> Nearest:
    values, indices = neighbours
    itself = indices == torch.arange(first, first + indices.shape[0], device=indices.device)[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    shape = indices.shape[0], indices.shape[1] - 1
    return Nearest(values[~itself].view(shape), indices[~itself].view(shape))


def _screened(x: Tensor, y: Tensor | None, k: int, distance: str) -> Nearest:
    n, m = x.shape[0], (x if y is None else y).shape[0]
    none = torch.zeros(n, dtype=torch.int64, device=x.device)  # no labels, so no positives
    order = torch.arange(m, device=x.device)
    p = Problem(solid(x), None if y is None else solid(y), none, none, None, order, distance)
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    squares = p.row_and_ref_squares()
    work = tiled.cpu_pass(p, squares, lanes=1)
    work.nearest(tiled.threads(n * m, x.shape[1]), extension.instruction_set(), k, address(values), address(indices))
    return Nearest(values, indices)
