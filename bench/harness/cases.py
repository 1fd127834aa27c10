"""The data of one (N, D): the same in every process, from the seed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..studies.family_cases import FAMILY
from .options import Options

SAMPLED_ROWS = 1024


class Case(NamedTuple):
    options: Options
    n: int
    d: int

    @property
    def whole_step(self) -> Case:
        """The case of a whole step, which is what is checked, whatever phase is timed."""
        return self._replace(options=replace(self.options, phase="step"))

    @property
    def m(self) -> int:
        return self.n if self.options.ref is None else self.options.ref

    @property
    def square(self) -> bool:
        return self.options.ref is None

    @property
    def classes(self) -> int:
        """The number of classes in the batch."""
        some = max(2, min(self.n, self.m) // self.options.per_class)
        return min(some, self.options.num_classes) if self.centres else some

    @property
    def centres(self) -> int:
        """Rows of weights, of a loss against class weights; 0 for losses of pairs."""
        return self.options.num_classes * FAMILY[self.options.loss].centres

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of flashpair's products, and of the bare products."""
        if self.options.device == "cuda":
            return self.options.torch_dtype
        return torch.float64 if self.options.dtype == "float64" else torch.float32

    @property
    def pairs_shape(self) -> tuple[int, int]:
        """Rows and columns of the similarities that the loss needs. An N-pair loss needs one pair a class."""
        if self.centres:
            return self.n, self.centres
        return (self.classes, self.classes) if FAMILY[self.options.loss].one_pair else (self.n, self.m)

    @property
    def both_learn(self) -> bool:
        """Whether rows and columns both need a gradient."""
        return self.square or self.centres > 0


class Batch(NamedTuple):
    """Embeddings x (N, D), a leaf with requires_grad, with labels (N,); references y (M, D) or None."""

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None

    def double(self) -> Batch:
        """The same numbers in float64."""
        return self._replace(x=self.x.detach().double().requires_grad_(), y=None if self.y is None else self.y.double())


def make_batch(case: Case) -> Batch:
    """The data of a case, scaled by D^(-1/4), so that dot products are of order 1 in losses that do not normalise."""
    options, k, d = case.options, case.classes, case.d
    generator = torch.Generator().manual_seed(options.seed)
    basis = torch.randn(options.intrinsic, d, generator=generator) / options.intrinsic**0.5
    centres = torch.randn(k, options.intrinsic, generator=generator) @ basis

    apart = options.num_classes // k if case.centres else 1  # labels are spread over all classes that have weights

    def rows(count: int) -> tuple[Tensor, Tensor]:
        drawn = (torch.arange(count) % k)[torch.randperm(count, generator=generator)]
        x = torch.randn(count, d, generator=generator)
        if options.data == "trained":
            x = x.mul_(options.noise).add_(centres[drawn])
        return x.mul_(d**-0.25).to(options.device, options.torch_dtype), (drawn * apart).to(options.device)

    x, labels = rows(case.n)
    y, ref_labels = (None, None) if case.square else rows(case.m)
    return Batch(x.requires_grad_(), labels, y, ref_labels)


def live_share(batch: Batch, epsilon: float = 0.1) -> float:
    """The share of negatives that Multi-Similarity's mining keeps, from the first anchors against all."""
    rows = torch.arange(min(SAMPLED_ROWS, batch.x.shape[0]), device=batch.x.device)
    with torch.no_grad():
        x = torch.nn.functional.normalize(batch.x.float())
        y = x if batch.y is None else torch.nn.functional.normalize(batch.y.float())
        refs = batch.labels if batch.ref_labels is None else batch.ref_labels
        s = x[rows] @ y.T
        positive = batch.labels[rows, None] == refs
        negative = ~positive
        if batch.y is None:
            positive[rows, rows] = False
        lowest = torch.where(positive, s, torch.inf).amin(1, keepdim=True)
        return ((s > lowest - epsilon) & negative).sum().item() / max(negative.sum().item(), 1)
