"""A folder of folders of images, as uint8 squares of one size. Other files are skipped; broken images are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.extras import extra

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LEFT_BY_SYSTEMS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found")
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF


def shown(name: str) -> bool:
    """Whether a file is neither hidden (.ipynb_checkpoints, ._1.png) nor put there by the operating system."""
    return not name.startswith(".") and name not in LEFT_BY_SYSTEMS


def classes(path: Path) -> list[tuple[str, list[Path]]]:
    """Name and images of each folder in `path` that has images, sorted by name.

    Raises:
        ValueError: a folder that cannot be read.
    """
    try:
        folders = sorted(each for each in path.iterdir() if shown(each.name) and each.is_dir())
        found = [(folder.name, sorted(_files(folder, ()))) for folder in folders]
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    return [(name, files) for name, files in found if files]


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Images in a folder or deeper. Links are followed, but not to a folder that contains this one."""
    status = folder.stat()
    at = (status.st_dev, status.st_ino)
    if at in above:
        return
    for entry in os.scandir(folder):
        if not shown(entry.name):
            continue
        if entry.is_dir():
            yield from _files(folder / entry.name, (*above, at))
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield folder / entry.name


def square(file: Path, size: int) -> Tensor:
    """(3, size, size) uint8: the middle square, scaled, turned as its EXIF says, over white where it is transparent.

    Raises:
        ValueError: it cannot be read, or its white level is unknown.
        ImportError: Pillow is not installed.
    """
    with extra("reality-check", "a folder of images"):
        import numpy as np
        from PIL import Image, ImageOps
    try:
        with Image.open(file) as image:
            eight = _eight_bits(image)
            upright = _opaque(ImageOps.exif_transpose(eight))
            found = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # of a broken file Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.asarray(found).copy()).permute(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """Scales an image of more than 8 bits a channel to 8 bits. Pillow would clip everything above 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 2.0 ** tags.get(BITS, (16,))[0] - 1
    elif image.format in ("PNG", "PPM"):
        white = 65535.0
    else:
        raise ValueError("a 32-bit integer image has no known white level; save it with 8 or 16 bits")
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"must be from 0 to {white:g}, got {values.min():g} to {values.max():g}")
    if tags.get(PHOTOMETRIC) == 0:
        values = white - values
    made = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    made.info, made._exif = dict(image.info), image.getexif()
    return made


def _opaque(image: Any) -> Any:
    """RGB. The colour of a transparent pixel is arbitrary, and is not shown."""
    from PIL import Image

    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    layers = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")
