"""What processes tell each other before a loss: rows, arguments, and whether their criteria are the same."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from numbers import Number
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .collectives import Ranks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK = 2**20  # values of a parameter that are summed up at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Facts(NamedTuple):
    """What every process tells: one integer each."""

    rows: int
    refs: int  # -1: none are given
    width: int
    dtype: int
    ref_dtype: int
    x_learns: int
    y_learns: int
    parameters_learn: int
    again: int  # in a backward pass, as a checkpoint computes again
    digest: int

    @property
    def refused(self) -> bool:
        return self.rows < 0


REFUSED = [-1] * (len(Facts._fields) + 1)


def validate_call(
    ranks: Ranks, x: Tensor, y: Tensor | None, needs: list[bool], learned: bool, described: Described
) -> tuple[list[int], list[int], list[bool]]:
    """Everybody's numbers of rows and of references, and whether anybody wants gradients of x, y, parameters.

    Raises:
        ValueError: on every process, where these cannot be one batch, or the criteria are not one.
    """
    dtypes = [-1 if t is None else DTYPES.index(t.dtype) for t in (x, y)]
    refs = -1 if y is None else y.shape[0]
    again = int(torch._C._current_graph_task_id() != -1)
    mine = [x.shape[0], refs, x.shape[1], *dtypes, *map(int, needs), int(learned), again, described.digest]
    told = ranks.all_gather_ints(mine, x.device, described.checksum(x.device))
    every = [Facts(*row[:-1]) for row in told]
    if refused := [str(rank) for rank, row in enumerate(every) if row.refused]:
        raise ValueError(f"the arguments on process {', '.join(refused)} are invalid; the error there says why")
    if len({row.again for row in every}) > 1:
        where = ", ".join(str(rank) for rank, row in enumerate(every) if row.again)
        raise ValueError(
            f"the loss is recomputed in backward (torch.utils.checkpoint) on process {where} only: all processes must "
            "recompute it, or none (use_reentrant=False, with the loss last in the checkpointed part)"
        )
    if len({row.digest for row in every}) > 1:
        raise ValueError(f"the criterion must be the same on every process: {described.difference(ranks, x.device)}")
    if len({row.refs < 0 for row in every}) > 1:
        raise ValueError("ref_emb must be given on every process or on none")
    _alike("embeddings", "width", [row.width for row in every], str)
    _alike("embeddings", "dtype", [row.dtype for row in every], lambda k: str(DTYPES[k]))
    _alike("ref_emb", "dtype", [row.ref_dtype for row in every], lambda k: str(DTYPES[k]))
    if len({row[-1] for row in told}) > 1:
        names = described.unequal(ranks, x.device)
        raise ValueError(f"the criterion must have the same values on every process, and {names} differs")
    some = [any(of(row) for row in every) for of in (_x_learns, _y_learns, _parameters_learn)]
    return [row.rows for row in every], [max(row.refs, 0) for row in every], some


def _x_learns(row: Facts) -> int:
    return row.x_learns


def _y_learns(row: Facts) -> int:
    return row.y_learns


def _parameters_learn(row: Facts) -> int:
    return row.parameters_learn


def _alike(name: str, what: str, every: list[int], shown: Callable[[int], str]) -> None:
    if len(set(every)) > 1:
        raise ValueError(f"{name} must have the same {what} on every process, got {', '.join(map(shown, every))}")


class Described:
    """A criterion and how it is shared, in words, and the tensors whose values every process has to have.

    Args:
        of: what wraps the criterion: its class, and words of it. apart: names of tensors of which each process has a
            part, whose values, and numbers of rows, are its own.
    """

    def __init__(self, criterion: nn.Module, of: Sequence[str], apart: Sequence[str] = ()) -> None:
        self.words, self.tensors = list(of), dict[str, Tensor]()
        self._module("", criterion, apart)
        text = "\n".join(self.words)
        self.digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def _module(self, prefix: str, module: nn.Module, apart: Sequence[str]) -> None:
        self.words.append(f"{prefix or 'criterion'}: {type(module).__qualname__}")
        values = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "impl")}
        for name, value in sorted({**values, **module._parameters, **module._buffers}.items()):
            where = prefix + name
            if isinstance(value, Tensor):
                shape = tuple(value.shape[1:] if where in apart else value.shape)
                learns = ", learned" if value.requires_grad else ""
                self.words.append(f"{where}: {str(value.dtype)[6:]} {shape}{learns}")
                if where not in apart:
                    self.tensors[where] = value
            else:
                self.words.append(f"{where}: {_shown(value)}")
        for name, child in module._modules.items():
            if child is not None:
                self._module(f"{prefix}{name}.", child, apart)

    def checksum(self, device: torch.device) -> Tensor:
        """() int64 of all values' bits: the same sum in any order, so that it hangs on no number of threads."""
        sums = [_bits(t).to(device) for t in self.tensors.values()]
        total = torch.zeros((), dtype=torch.int64, device=device)
        for k, one in enumerate(sums):
            total = total + one * (2 * k + 1)
        return total

    def difference(self, ranks: Ranks, device: torch.device) -> str:
        """What differs, with each process's word of it. All must call it."""
        every = ranks.all_gather_text("\n".join(self.words), device)
        lines = [dict(line.split(": ", 1) for line in text.split("\n")) for text in every]
        names = list(dict.fromkeys(name for words in lines for name in words))
        different = [n for n in names if len({words.get(n) for words in lines}) > 1]
        first = next((n for n in ("call", "criterion") if n in different), None)
        shown = [first] if first else different
        return "; ".join(f"{name} is {', '.join(words.get(name, 'not there') for words in lines)}" for name in shown)

    def unequal(self, ranks: Ranks, device: torch.device) -> str:
        sums = torch.stack([_bits(t).to(device) for t in self.tensors.values()])
        every = ranks.all_gather_ints(sums.tolist(), device)
        return ", ".join(n for k, n in enumerate(self.tensors) if len({row[k] for row in every}) > 1)


def _shown(value: Any) -> str:
    """A word for a hyper-parameter that is the same in every process that has the same one."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value).replace("\n", " ")
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_shown(k)} = {_shown(v)}' for k, v in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_shown, value)))}}}"
    if isinstance(value, Tensor):
        few = value.numel() <= 64
        return f"{value.dtype} {value.tolist() if few else (tuple(value.shape), int(_bits(value)))}"
    if isinstance(value, functools.partial):
        return _shown([value.func, value.args, value.keywords])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__} {_shown(named)}"
    if isinstance(value, SimpleNamespace | argparse.Namespace):
        return _shown(vars(value))
    if isinstance(value, Number):
        return repr(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        content = value.tolist() if value.size <= 64 else hashlib.sha256(value.tobytes()).hexdigest()[:16]
        return f"{value.dtype} {value.shape} {content}".replace("\n", " ")
    return str(getattr(value, "__qualname__", type(value).__qualname__))


@torch.no_grad()
def _bits(t: Tensor) -> Tensor:
    """() int64: a sum over all values' bits, each times an odd number of its place."""
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    flat = (torch.view_as_real(t.detach()) if t.is_complex() else t.detach()).reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    flat = flat.view(BITS[flat.element_size()])
    if flat.shape[0] <= 1:
        return total + flat.sum(dtype=torch.int64)
    odd = torch.arange(1, 2 * min(flat.shape[0], CHUNK), 2, device=t.device)
    for k, part in enumerate(flat.split(CHUNK)):
        total = total * 5 + (part * odd[: part.shape[0]]).sum() + k
    return total
