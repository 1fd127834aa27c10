"""Data sets: the digits that scikit-learn brings, an .npz of arrays, or a folder of folders of images."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core import checks
from ...core.extras import extra
from . import images


@dataclass(frozen=True)
class Data:
    """Samples of classes.

    Args:
        title: shown in tables.
        samples: (N, F) features, or (N, C, H, W) images; float32, or uint8, which is scaled to 0 to 1.
        labels: (N,) int64, from 0 to the number of classes less 1, in the order of the classes' own labels or names.
        device: where networks compute; samples and labels stay on the CPU.

    Examples:
        >>> from flashpair.tools.reality_check import Data
        >>> data = Data("two grey images", torch.tensor([[[[0]]], [[[255]]]], dtype=torch.uint8), torch.tensor([0, 1]))
        >>> data.of(torch.tensor([1, 0])).flatten()
        tensor([1., 0.])
    """

    title: str
    samples: Tensor
    labels: Tensor
    device: str = "cpu"

    def of(self, places: Tensor) -> Tensor:
        """Some samples, float32, on the device."""
        samples = self.samples[places].to(self.device)
        return samples.float() / 255 if samples.dtype == torch.uint8 else samples

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.samples.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def partitions(classes: int, folds: int = 4) -> tuple[range, list[range]]:
    """Splits class indices into test classes, the second half, and for each fold validation classes of the first half.

    A fold trains on the rest of the first half.

    Args:
        classes: how many classes there are.
        folds: how many folds.

    Returns:
        The test classes, and the validation classes of each fold.

    Raises:
        ValueError: a fold would have fewer than two classes, so there would be nothing to confuse.

    Examples:
        >>> from flashpair.tools.reality_check import partitions
        >>> partitions(16, folds=2)
        (range(8, 16), [range(0, 4), range(4, 8)])
    """
    half = classes // 2
    validated = [range(f * half // folds, (f + 1) * half // folds) for f in range(folds)]
    if min(map(len, validated)) < 2:
        raise ValueError(f"there must be at least {4 * folds} classes for {folds} folds, got {classes}")
    return range(half, classes), validated


def usable(device: str) -> str:
    """Returns `device`. Raises ValueError if torch cannot use it, before anything is computed."""
    try:
        torch.ones(1, device=device).cpu()
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError
        reason = "CUDA is not available here" if "cuda" in str(device) and not torch.cuda.is_available() else error
        raise ValueError(f"device must be one that torch can use, got {device!r}: {reason}") from error
    return device


def load(where: str, image_size: int = 32, tick: Callable[[int, int], object] = lambda done, of: None) -> Data:
    """Reads ``"digits"``, an .npz file, or a folder of images.

    - ``"digits"`` are scikit-learn's handwritten digits from 0 to 7. Each stands in its four quarter turns and their
      mirror images, moved by up to a pixel each way, so that single pixels do not tell classes apart. A digit in one
      orientation is a class; there are 64. Each of four folds validates on one digit, and the test is on four others.
      So no model is judged on a turned image that it was trained on.
    - FILE.npz has the arrays ``features``, (N, F) or images (N, C, H, W), and ``labels`` (N,), integers or text.
    - A folder has one folder for each class, with images in it or deeper. Hidden files and folders, files without an
      image's suffix and classes without images are skipped. Images of 16 bits, and of floats from 0 to 1, keep their
      range. Transparent images are put over white.

    Args:
        where: ``"digits"``, FILE.npz or a folder.
        image_size: side in pixels, at least 1. The middle square of a folder's images is scaled to it.
        tick: is called with how many of a folder's images are read, and how many there are.

    Returns:
        The samples and labels, as `Data`.

    Raises:
        ValueError: the data do not exist, have another form, or cannot be read; the message names the file.
        ImportError: scikit-learn or Pillow is not installed.

    Examples:
        >>> from flashpair.tools.reality_check import load
        >>> data = load("digits")
        >>> data.samples.shape[1:], data.labels.unique().numel()
        (torch.Size([1, 8, 8]), 64)
    """
    if where == "digits":
        return _digits()
    path = Path(where)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _arrays(path)
    if path.is_dir():
        return _folder(path, image_size, tick)
    raise ValueError(f"data must be digits, a file FILE.npz or a folder, got {where!r}")


def _digits() -> Data:
    with extra("reality-check", "the data 'digits'"):
        from sklearn.datasets import load_digits

    found = load_digits()
    kept = found.target < 8
    images = torch.from_numpy(found.images[kept]).float()[:, None] / 16
    turns = [torch.rot90(images, turn, (2, 3)) for turn in range(4)]
    turned = torch.stack([*turns, *(image.flip(3) for image in turns)], dim=1).flatten(0, 1)
    labels = (8 * torch.from_numpy(found.target[kept]).long()[:, None] + torch.arange(8)).flatten()
    generator = torch.Generator().manual_seed(0)
    down, right = torch.randint(3, (2, len(turned)), generator=generator)
    windows = torch.nn.functional.pad(turned, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    moved = windows[torch.arange(len(turned)), :, down, right]
    return Data("scikit-learn's digits, turned and moved", moved, labels)


def _arrays(path: Path) -> Data:
    with extra("reality-check", "a file of arrays"):
        import numpy as np

    try:
        if isinstance(arrays := np.load(path), np.ndarray):
            raise ValueError("it is a single array, as numpy.save writes it")
        with arrays:
            names = list(arrays)
            features, given = (arrays[name] if name in names else None for name in ("features", "labels"))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    if features is None or given is None:
        raise ValueError(f"{path} must have the arrays features and labels, got {', '.join(names)}")
    if features.ndim not in (2, 4) or not features.size or given.shape != features.shape[:1]:
        raise ValueError(
            f"{path} must have features (N, F) or (N, C, H, W) and labels (N,), got {features.shape} and {given.shape}"
        )
    if features.dtype.kind not in "biuf" or given.dtype.kind not in "biufSU":
        raise ValueError(
            f"{path} must have features of numbers and labels of integers or text, got {features.dtype} and"
            f" {given.dtype}"
        )
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        samples = torch.from_numpy(features if features.dtype == np.uint8 else features.astype(np.float32))
    if samples.is_floating_point() and not samples.isfinite().all():
        raise ValueError(f"{path} must have finite features, got NaN or infinity")
    if given.dtype.kind == "f" and not (np.isfinite(given) & (given == np.floor(given))).all():
        raise ValueError(f"{path} must have labels of integers or text, got {given.dtype} that are none")
    labels = np.unique(given, return_inverse=True)[1]
    return Data(_title(path.name), samples, torch.from_numpy(labels.astype(np.int64)))


def _folder(path: Path, size: int, tick: Callable[[int, int], object]) -> Data:
    checks.integer(size, "image_size", at_least=1)
    files = [(file, label) for label, (_, found) in enumerate(images.classes(path)) for file in found]
    if not files:
        raise ValueError(f"{path} must have a folder of images for each class, got none ({', '.join(images.SUFFIXES)})")
    samples = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for place, (file, _) in enumerate(files):
        samples[place] = images.square(file, size)
        tick(place + 1, len(files))
    return Data(_title(path.resolve().name), samples, torch.tensor([label for _, label in files]))


def _title(name: str) -> str:
    """A file's name as one printable line: names may hold line ends, and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
