"""A case: what one random call is, small enough to be printed and read back; and the tensors that it stands for."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpair.engine.dispatch import interpreted

EDGES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
WIDTHS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
LABELS = ("pairs", "fours", "two", "imbalanced", "one", "different", "negative", "huge", "random")
LAYOUTS = ("plain", "transposed", "sliced", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    """One random call.

    Args:
        kind: which generator it is from, with `name` and `options` as that generator reads them.
        n, m, d: rows, references (-1: none) and width before any are left out.
        rows, refs, cols: the indices that are kept, None: all; what the minimiser shrinks.
        changes: what is done to the rows, one after the other: (word, number).
    """

    kind: str
    seed: int
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    n: int = 8
    m: int = -1
    d: int = 4
    dtype: str = "float32"
    labels: str = "pairs"
    changes: list[Any] = field(default_factory=list)
    layout: str = "plain"
    need: list[bool] = field(default_factory=lambda: [True, True])
    impl: str = "tiled"
    threads: int = 1
    rows: list[int] | None = None
    refs: list[int] | None = None
    cols: list[int] | None = None

    def json(self) -> str:
        """Only what is not the default."""
        plain = asdict(Case("", 0))
        return json.dumps({k: v for k, v in asdict(self).items() if k in ("kind", "seed") or v != plain[k]})

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def read(text: str) -> Case:
    return Case(**json.loads(text))


def draw_changes(random: random.Random, rough: bool) -> list[Any]:
    """Mostly none or one, of the kinds that inputs from elsewhere have."""
    words: list[tuple[str, Any]] = [
        ("duplicate", 0.3), ("duplicate across", 0.3), ("collapse", 10.0 ** -random.randint(1, 7)), ("zero", 1),
        ("parallel", 0.3), ("scale", 10.0 ** random.randint(-3, 1)),
    ]  # fmt: skip
    if rough:
        words += [("scale", 10.0 ** random.randint(-30, 30)), ("shift", 10.0 ** random.randint(0, 6))]
        words += [("nan", 1), ("inf", 1), ("one column", 10.0 ** random.randint(2, 6))]
    count = random.choice((0, 0, 1, 1, 2))
    return [list(random.choice(words)) for _ in range(count)]


def draw_shape(random: random.Random, most: int, references: bool) -> dict[str, Any]:
    """n, m, d of a few pairs half of the time, where an oracle can follow, and at the edges of tiles otherwise."""
    few = random.random() < 0.5
    size = (lambda: random.randint(1, 9)) if few else (lambda: random.choice([e for e in EDGES if e <= most]))
    widths = WIDTHS if not few else WIDTHS[:9]
    return {"n": size(), "m": size() if references else -1, "d": random.choice(widths)}


def maybe_fused(case: Case, share: float = 0.1) -> Case:
    """Some of the tiny cases by `fused`, where Triton's interpreter runs its kernels. Not in half precision, which
    it keeps unit rows in, as the reference does not.
    """
    tiny = max(case.n, case.m) <= 33 and case.d <= 33 and case.dtype in ("float32", "float64")
    chosen = interpreted() and tiny and random.Random(f"{case.seed} fused").random() < share
    return case.with_(impl="fused") if chosen and case.name != "SoftTripleLoss" else case


class Batch(NamedTuple):
    """Embeddings (n, d) and (m, d) or None, with labels, in the case's dtype and layout."""

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None


def generator(case: Case, what: str) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and what they are for."""
    return torch.Generator().manual_seed(random.Random(f"{case.seed} {what}").getrandbits(48))


def batch(case: Case, classes: int = 0) -> Batch:
    """The case's tensors. classes: labels are in [0, classes) instead of the case's pattern's."""
    g = generator(case, "rows")
    total = case.n + max(case.m, 0)
    label = _labels(case, case.n, g)
    ref_label = _labels(case, max(case.m, 0), g)
    if classes:
        label, ref_label = label % classes, ref_label % classes
    both = torch.cat([label, ref_label])
    centres = torch.randn(64, case.d, generator=g, dtype=torch.float64)
    rows = centres[both % 64] + torch.randn(total, case.d, generator=g, dtype=torch.float64)
    for word, number in case.changes:
        rows = _changed(rows, both, word, number, g)
    rows = rows.to(DTYPES[case.dtype])
    x, y = rows[: case.n], rows[case.n :]
    kept = list(range(case.n)) if case.rows is None else case.rows
    cols = list(range(case.d)) if case.cols is None else case.cols
    x, label = x[kept][:, cols], label[kept]
    if case.m < 0:
        return Batch(laid_out(x, case.layout), label, None, None)
    refs = list(range(case.m)) if case.refs is None else case.refs
    return Batch(laid_out(x, case.layout), label, laid_out(y[refs][:, cols], case.layout), ref_label[refs])


def _labels(case: Case, n: int, g: torch.Generator) -> Tensor:
    if case.labels in ("pairs", "fours"):
        found = torch.arange(n) // (2 if case.labels == "pairs" else 4)
    elif case.labels == "different":
        found = torch.arange(n)
    elif case.labels == "one":
        found = torch.zeros(n, dtype=torch.int64)
    elif case.labels == "imbalanced":
        found = torch.where(torch.rand(n, generator=g) < 0.8, 0, torch.arange(n))
    else:
        found = torch.randint(2 if case.labels == "two" else max(2, n // 3), (n,), generator=g)
        if case.labels == "negative":
            found = found * 3 - 50
        if case.labels == "huge":
            found = found * 2**55 - 2**62
    return found[torch.randperm(n, generator=g)]


def _changed(rows: Tensor, labels: Tensor, word: str, number: Any, g: torch.Generator) -> Tensor:
    n = rows.shape[0]
    if n == 0:
        return rows
    rows, one = rows.clone(), int(torch.randint(n, (), generator=g))
    if word in ("duplicate", "duplicate across", "parallel"):
        for i in range(n):
            among = (labels == labels[i]) if word == "duplicate" else torch.ones_like(labels, dtype=torch.bool)
            others = among.nonzero()[:, 0]
            other = int(others[int(torch.randint(len(others), (), generator=g))])
            if float(torch.rand((), generator=g)) < number:
                rows[i] = rows[other] * (2.0 if word == "parallel" else 1.0)
    elif word == "collapse":
        rows = rows[one] + number * (rows - rows[one])
    elif word == "zero":
        rows[one] = 0.0
    elif word == "scale":
        rows = rows * number
    elif word == "shift":
        rows = rows + number
    elif word == "one column":
        rows[:, int(torch.randint(rows.shape[1], (), generator=g))] += number
    else:
        rows[one, int(torch.randint(rows.shape[1], (), generator=g))] = float(word)
    return rows


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers, stored in another way; "expanded": all rows are the first."""
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "sliced":
        return torch.cat([t.new_full((t.shape[0], 3), 7.0), t, t.new_full((t.shape[0], 2), 7.0)], 1)[
            :, 3 : 3 + t.shape[1]
        ]
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, 7.0)], 1).flatten(0, 1)[::2]
    return t[:1].expand(t.shape) if layout == "expanded" and t.shape[0] else t.contiguous()
