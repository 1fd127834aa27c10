"""The reality check's data: digits, arrays and folders of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from flashpair.tools.reality_check import (
    load,
    partitions,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_digits():
    data, digits = load("digits"), load_digits()
    assert data.samples.shape == (8 * int((digits.target < 8).sum()), 1, 8, 8)
    assert data.labels.bincount().tolist() == [n for n in np.bincount(digits.target)[:8] for _ in range(8)]
    first = torch.tensor(digits.images[0]).float() / 16
    for turn in range(8):
        moved = data.samples[turn, 0]
        image = torch.rot90(first, turn % 4)
        whole = torch.nn.functional.pad(image.flip(1) if turn > 3 else image, (1, 1, 1, 1))
        windows = [whole[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert any(torch.equal(moved, window) for window in windows)
    tested, folds = partitions(64)
    assert [{label // 8 for label in classes} for classes in (*folds, tested)] == [{0}, {1}, {2}, {3}, {4, 5, 6, 7}]


def test_arrays(tmp_path):
    x = np.arange(24, dtype=np.float64).reshape(6, 4)
    np.savez(tmp_path / "a.npz", features=x, labels=np.array(["b", "a", "c", "a", "b", "c"]))
    data = load(str(tmp_path / "a.npz"))
    assert data.samples.dtype == torch.float32
    assert torch.equal(data.of(torch.tensor([1])), torch.tensor([[4.0, 5.0, 6.0, 7.0]]))
    assert data.labels.tolist() == [1, 0, 2, 0, 1, 2]
    np.savez(tmp_path / "b.npz", features=np.full((2, 3, 5, 5), 255, np.uint8), labels=np.array([7, -2]))
    data = load(str(tmp_path / "b.npz"))
    assert data.of(torch.tensor([0])).unique().tolist() == [1.0]
    assert data.labels.tolist() == [1, 0]
    for arrays, words in [
        ({"x": x}, "must have the arrays features and labels, got x"),
        ({"features": x, "labels": np.zeros(5)}, "labels \\(N,\\), got \\(6, 4\\) and \\(5,\\)"),
        ({"features": x * np.nan, "labels": np.zeros(6)}, "finite"),
    ]:
        np.savez(tmp_path / "c.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / "c.npz"))


def test_folder_of_images(tmp_path):
    """The middle square, scaled; classes by name; folders in folders; files that are no images are left."""
    for name, colour in (("zebra", (255, 0, 0)), ("ant", (0, 255, 0))):
        (tmp_path / name / "deep").mkdir(parents=True)
        wide = Image.new("RGB", (40, 20), (9, 9, 9))
        wide.paste(colour, (10, 0, 30, 20))
        wide.save(tmp_path / name / "1.png")
        Image.new("L", (30, 30), 128).save(tmp_path / name / "deep" / "2.PNG")
        (tmp_path / name / "notes.txt").write_text("none")
    (tmp_path / "empty").mkdir()
    told = []
    data = load(str(tmp_path), image_size=10, tick=lambda done, of: told.append((done, of)))
    assert told == [(k, 4) for k in range(1, 5)]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.samples.shape == (4, 3, 10, 10)
    inner = data.samples[:, :, 1:-1, 1:-1].flatten(2)
    assert [sample[:, 0].tolist() for sample in inner] == [[0, 255, 0], [128] * 3, [255, 0, 0], [128] * 3]
    assert (inner == inner[:, :, :1]).all()
    with pytest.raises(ValueError, match="a folder of images for each class"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="data must be digits"):
        load(str(tmp_path / "nowhere"))
