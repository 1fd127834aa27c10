"""Folders, files and arguments as strangers have them: read right, or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flashpair.tools.import_target import named
from flashpair.tools.reality_check import Data, Protocol, candidate, load, record, run
from flashpair.tools.reality_check.record import source_of

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def saved(root, name, image):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / name)


def plain(level=200):
    return Image.new("L", (8, 8), level)


def test_what_systems_leave_is_no_class_and_no_sample(tmp_path):
    for name in ("b/1.png", "a/2.JPG", "a/deeper/still/3.Tiff"):
        saved(tmp_path, name, plain())
    for name in (".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/2.png", "__MACOSX/a/1.png", "b/@eaDir/1.png"):
        saved(tmp_path, name, plain(0))
    (tmp_path / "b/._1.png").write_bytes(b"\x00\x05\x16\x07Mac OS X        ")
    (tmp_path / "b/folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "b/around").symlink_to(tmp_path / "b", target_is_directory=True)
    saved(tmp_path, "../elsewhere/4.png", plain())
    (tmp_path / "c").symlink_to(tmp_path / "../elsewhere", target_is_directory=True)
    data = load(str(tmp_path), 4)
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert (data.samples >= 198).all()


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("16 bits.png", Image.fromarray((RAMP * 65535).astype("u2"))),
        ("16 bits.tif", Image.fromarray((RAMP * 65535).astype("u2"))),
        ("float.tif", Image.fromarray(RAMP.astype("f4"))),
        ("8 bits.png", Image.fromarray((RAMP * 255).astype("u1"))),
        ("palette.gif", Image.fromarray((RAMP * 255).astype("u1")).convert("P")),
        ("cmyk.tif", Image.fromarray((RAMP * 255).astype("u1")).convert("RGB").convert("CMYK")),
    ],
)
def test_every_kind_of_image_keeps_its_range(name, image, tmp_path):
    saved(tmp_path, f"a/{name}", image)
    found = load(str(tmp_path), 64).samples[0].double()
    expected = torch.from_numpy(RAMP * 255).expand(3, 64, 64)
    assert (found - expected).abs().max() <= 2


def test_inverted_and_narrow_tiff(tmp_path):
    """White as 0, of 16 bits: Pillow hands out the file's numbers."""
    saved(tmp_path, "a/1.tif", Image.fromarray((RAMP * 65535).astype("u2")))
    written = bytearray((tmp_path / "a/1.tif").read_bytes())
    at = written.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    assert written[at + 8] == 1
    written[at + 8] = 0
    (tmp_path / "a/1.tif").write_bytes(written)
    found = load(str(tmp_path), 64).samples[0].double()
    assert (found - torch.from_numpy(255 - RAMP * 255)).abs().max() <= 2


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_is_over_white(mode, tmp_path):
    """What a transparent pixel's colour is depends on the program that wrote it."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (4, 0, 8, 8))
    saved(tmp_path, "a/1.png", image.convert(mode))
    found = load(str(tmp_path), 8).samples[0]
    assert found[:, :, 0].eq(255).all() and found[:, :, 7].eq(40).all()


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_turned_as_its_exif_says(kind, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    top = np.zeros((8, 8), kind)
    top[:4] = np.iinfo(kind).max
    (tmp_path / "a").mkdir()
    Image.fromarray(top).save(tmp_path / "a/1.png", exif=exif)
    found = load(str(tmp_path), 8).samples[0]
    assert found[:, :, 7].eq(255).all() and found[:, :, 0].eq(0).all()


def broken_images():
    wide = Image.fromarray((RAMP * 1e6).astype("i4"))
    bright = Image.fromarray((RAMP * 300).astype("f4"))
    return {"none.png": b"no image", "empty.jpg": b"", "wide.tif": wide, "bright.tif": bright}


@pytest.mark.parametrize("name", [*broken_images(), "cut.png", "link.png"])
def test_an_image_that_cannot_be_read_is_named(name, tmp_path):
    saved(tmp_path, "a/1.png", plain())
    content = broken_images().get(name)
    if name == "link.png":
        (tmp_path / "a" / name).symlink_to(tmp_path / "nowhere.png")
    elif name == "cut.png":
        (tmp_path / "a" / name).write_bytes((tmp_path / "a/1.png").read_bytes()[:50])
    elif isinstance(content, bytes):
        (tmp_path / "a" / name).write_bytes(content)
    else:
        content.save(tmp_path / "a" / name)
    with pytest.raises(ValueError, match=rf"a/{name} cannot be read as an image: "):
        load(str(tmp_path))


def test_arrays_that_are_none_are_named(tmp_path):
    path = tmp_path / "a.npz"
    x, text = np.ones((4, 3)), np.array(["a", "b", "a", "b"])
    for features, labels, words in [
        (x, np.array([0, "b", None, 1], dtype=object), "cannot be read as an .npz of plain arrays"),
        (x * 1j, text, "features of numbers"),
        (x, np.array([0.5, 1, 2, 3]), "labels of integers or text"),
        (x, np.array([np.nan, 1, 2, 3]), "labels of integers or text"),
        (x, np.array([np.inf, 1, 2, 3]), "labels of integers or text"),
        (x[:0], text[:0], "must have features"),
        (x * 1e300, text, "finite"),
    ]:
        np.savez(path, features=features, labels=labels)
        with pytest.raises(ValueError, match=rf"a\.npz .*{words}"):
            load(str(path))
    np.savez(tmp_path / "B.NPZ.npz", features=x.astype(">f8"), labels=np.array([3.0, 1.0, 3.0, 1.0]))
    os.rename(tmp_path / "B.NPZ.npz", tmp_path / "B.NPZ")
    data = load(str(tmp_path / "B.NPZ"))
    assert data.labels.tolist() == [1, 0, 1, 0] and data.samples.eq(1).all()
    with path.open("wb") as file:
        np.save(file, x)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read .* a single array"):
        load(str(path))
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        load(str(path))


def test_files_of_one_stem_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(
            f"import flashpair\nclass L(flashpair.MultiSimilarityLoss):\n    which = {folder!r}\n"
        )
    before = sys.modules["json"]
    first, second = candidate("a/json.py:L").make, candidate("b/json.py:L").make
    assert (first.which, second.which) == ("a", "b")
    assert sys.modules["json"] is before
    assert candidate("a/json.py:L").make is first, "the same file is loaded once"
    digests = source_of(first), source_of(second)
    assert digests[0] != digests[1] and all(digest.startswith("json.L ") for digest in digests)
    (tmp_path / "b/json.py").write_text((tmp_path / "b/json.py").read_text() + "    more = 1\n")
    assert source_of(first) == digests[0]
    assert named("b/json.py:L").more == 1
    (tmp_path / "bad.py").write_text("\n1 / 0\n")
    with pytest.raises(ValueError, match=r"bad\.py cannot be loaded, at line 2: ZeroDivisionError: division by zero"):
        named("bad.py:L")
    assert not [name for name in sys.modules if name.startswith("bad_")]


@pytest.mark.parametrize("odd", ["a?b", "a#b", "a%20b", "a b", "é&mode=memory", "..a"])
def test_results_stay_in_their_folder(odd, tmp_path):
    out = tmp_path / odd
    study = record.opened(out.parent / odd / "trials.db" if out.mkdir() is None else out, "name")
    trial = study.ask()
    study.tell(trial, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == [odd]
    assert [path.name for path in out.iterdir()] == ["trials.db"]
    assert record.opened(out / "trials.db", "name").best_value == 0.5


def test_a_broken_file_of_results_is_named(tmp_path):
    study = tmp_path / "trials.db"
    study.write_bytes(b"no data base at all, and long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match=r"trials\.db is not what a run has left there: .*not a database"):
        record.opened(study, "name")
    document = tmp_path / "0.json"
    for text in ("{", "[]", "{}", "\udcff"):
        document.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=r"0\.json is not what a run has left there"):
            record.read(document, "values")
    part = tmp_path / "0-fold-0.pt"
    for content in (b"", b"PK\x03\x04 cut", b"text"):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"0-fold-0\.pt is not what a run has left there"):
            record.embedded(part)


def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path):
    data = Data("made", torch.eye(32), torch.arange(32) // 2, device="cuda:99")
    with pytest.raises(ValueError, match="device must be one that torch can use, got 'cuda:99'"):
        run(data, ["contrastive"], Protocol(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "cuda:99"), "device must be one that torch can use, got 'cuda:99'"),
        (("--device", "gpu"), "device must be one that torch can use, got 'gpu'"),
        (("--data", "nowhere.npz"), "data must be digits, a file FILE.npz or a folder, got 'nowhere.npz'"),
        (("--trials", "-1"), "trials must be at least 1, got -1"),
        (("--threads", "0"), "threads must be at least 1, got 0"),
        (("--losses", ","), "losses must name at least one, got ','"),
        (("--out", "file"), "out must be a folder, or none yet that can be made, got 'file'"),
        (("--image-size", "0", "--data", "images"), "image_size must be at least 1, got 0"),
    ],
)
def test_command_names_what_is_wrong(arguments, words, tmp_path):
    (tmp_path / "file").write_text("none")
    saved(tmp_path, "images/a/1.png", plain())
    command = [sys.executable, "-m", "flashpair", "reality-check", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


TINY = "--trials 1 --repeats 2 --max-epochs 1 --iterations 1 --embedding-size 4 --batch-size 8 --per-class 2".split()


@pytest.mark.parametrize("name", ["[/x] [bold] $$ $x_{1$", "a\nb\udcffc"], ids=ascii)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_are_no_markup(name, encoding, tmp_path):
    labels = np.arange(64) // 4
    np.savez(tmp_path / "made.npz", features=np.random.default_rng(0).normal(size=(64, 4)), labels=labels)
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    (tmp_path / "made.npz").rename(folder / f"{name.replace('/', '')}.npz")
    (folder / "own.py").write_text("import flashpair\nOwn = flashpair.ContrastiveLoss\n")
    done = subprocess.run(
        [sys.executable, "-m", "flashpair", "reality-check", "--data", f"{name.replace('/', '')}.npz", "--out", name,
         "--losses", "own.py:Own", *TINY],
        cwd=folder, capture_output=True, timeout=300, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / name / "results.png").stat().st_size
    title = name.replace("/", "").replace("\n", "\\n").replace("\udcff", "\\udcff")
    assert title in done.stdout.decode("utf-8", "replace")
    assert json.loads((folder / name / "results.json").read_text())["data"]["title"] == title + ".npz"
