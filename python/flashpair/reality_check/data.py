"""Data sets: the digits that scikit-learn brings, an .npz of arrays, or a folder of folders of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Data:
    """Samples of classes.

    Args:
        title: for tables.
        samples: (N, F) features, or (N, C, H, W) images; float32, or uint8 which means 0 to 1.
        labels: (N,) int64, 0 to one less than there are classes, in the order of the classes' own labels or names.
        device: that networks compute on; samples and labels are the host's.
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
    """The classes that are tested on, the second half, and of each fold those of the first half that are validated on;
    the rest of the first half is what that fold trains on.

    Raises:
        ValueError: a fold of fewer than two classes, among which nothing can be confused.
    """
    half = classes // 2
    validated = [range(f * half // folds, (f + 1) * half // folds) for f in range(folds)]
    if min(map(len, validated)) < 2:
        raise ValueError(f"there must be at least {4 * folds} classes for {folds} folds, got {classes}")
    return range(half, classes), validated


def load(where: str, image_size: int = 32, tick: Callable[[int, int], object] = lambda done, of: None) -> Data:
    """``"digits"``, an .npz file, or a folder.

    Args:
        where: ``"digits"``: scikit-learn's handwritten digits from 0 to 7, each in its four quarter turns and their
            mirror images, and moved by up to a pixel each way, so that pixels alone do not do; a digit in one
            orientation is a class, 64 in all. Each of four folds validates on a digit, and tests are on four others, so
            that nobody sees an image that it was trained on in another turn. FILE.npz: with
            the arrays ``features``, (N, F) or images (N, C, H, W), and ``labels`` (N,), integers or text. A folder: of
            one folder a class, with images in it or deeper.
        image_size: to which a folder's images are scaled and cut: the middle square.
        tick: is told how many of a folder's images are read.

    Raises:
        ValueError: there is no such data, or it is not of this form. ImportError: without scikit-learn or Pillow.
    """
    if where == "digits":
        return _digits()
    path = Path(where)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path)
    if path.is_dir():
        return _folder(path, image_size, tick)
    raise ValueError(f"data must be digits, a file FILE.npz or a folder, got {where!r}")


def _digits() -> Data:
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
    import numpy as np

    with np.load(path) as arrays:
        if not {"features", "labels"} <= set(arrays):
            raise ValueError(f"{path} must have the arrays features and labels, got {', '.join(arrays)}")
        features, given = arrays["features"], arrays["labels"]
    if features.ndim not in (2, 4) or given.shape != features.shape[:1]:
        raise ValueError(
            f"{path} must have features (N, F) or (N, C, H, W) and labels (N,), got {features.shape} and {given.shape}"
        )
    samples = torch.from_numpy(features if features.dtype == np.uint8 else features.astype(np.float32))
    if samples.is_floating_point() and not samples.isfinite().all():
        raise ValueError(f"{path} must have finite features, got NaN or infinity")
    labels = np.unique(given, return_inverse=True)[1]
    return Data(path.name, samples, torch.from_numpy(labels.astype(np.int64)))


def _folder(path: Path, size: int, tick: Callable[[int, int], object]) -> Data:
    classes = [(folder.name, sorted(_images(folder))) for folder in sorted(path.iterdir()) if folder.is_dir()]
    files = [(file, label) for label, (_, found) in enumerate(c for c in classes if c[1]) for file in found]
    if not files:
        raise ValueError(f"{path} must have a folder of images for each class, got none ({', '.join(IMAGES)})")
    samples = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for place, (file, _) in enumerate(files):
        samples[place] = _image(file, size)
        tick(place + 1, len(files))
    return Data(path.name, samples, torch.tensor([label for _, label in files]))


def _images(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)


def _image(file: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)
