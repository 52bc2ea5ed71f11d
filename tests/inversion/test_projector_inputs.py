"""projector.py with awkward inputs: images, LMDBs, full disks, long folders."""

import csv
import errno
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from projecting import start

import inversion.inputs
from common.images import save_image
from common.latents import load_latents
from inversion.inputs import open_images, pixel_seed

# -- awkward inputs ------------------------------------------------------------------------------------------------


def test_awkward_images(checkpoint, tmp_path, capsys):
    """Sixteen bits, CMYK, an EXIF-turned photo, 3 x 5000 pixels, a folder named like an image, two that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    grey = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(grey).save(folder / "16bit.png")
    Image.new("CMYK", (20, 20), (10, 120, 90, 20)).save(folder / "cmyk.jpg")
    turned = Image.new("RGB", (20, 20), (250, 0, 0))
    turned.paste((0, 0, 250), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "exif.png", exif=exif)
    Image.new("RGB", (3, 5000), (90, 160, 30)).save(folder / "thin.png")
    (folder / "x.png").mkdir()
    (folder / "text.jpg").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "thin.png").read_bytes()[:60])
    start(checkpoint, folder, tmp_path / "out")
    err = capsys.readouterr().err
    assert load_latents(tmp_path / "out").names == ["16bit.png", "cmyk.jpg", "exif.png", "thin.png"]
    with open(tmp_path / "out" / "skipped.csv", encoding="utf-8", newline="") as file:
        skipped = dict(list(csv.reader(file))[1:])
    assert set(skipped) == {"cut.png", "text.jpg"} and "not in a known image format" in skipped["text.jpg"]
    assert "2 images were left out" in err
    origin = np.asarray(Image.open(tmp_path / "out" / "origin" / "exif.png"))
    assert origin[0, 0].tolist() == [250, 0, 0] and origin[-1, 0].tolist() == [0, 0, 250], "turned upside down"
    sixteen = np.asarray(Image.open(tmp_path / "out" / "origin" / "16bit.png"))
    assert sixteen.std() > 50, "16 bits are scaled, not cut off"


def test_one_image_and_a_folder_named_like_one(checkpoint, tmp_path):
    folder = tmp_path / "x.png"
    folder.mkdir()
    save_image(Image.new("RGB", (16, 16), (120, 60, 200)), folder / "face.png")
    start(checkpoint, folder, tmp_path / "out")
    assert load_latents(tmp_path / "out").names == ["face.png"]


def test_nothing_to_do(checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for dataset, message in ((empty, "holds no images"), (tmp_path / "absent", "does not exist")):
        start(checkpoint, dataset, tmp_path / "out", expect=1)
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    (empty / "a.png").write_bytes(b"")
    start(checkpoint, empty, tmp_path / "out", expect=1)
    assert "none of the 1 images could be inverted" in capsys.readouterr().err


def test_lmdb(checkpoint, face_lmdb, tmp_path, capsys):
    start(checkpoint, face_lmdb, tmp_path / "out", "--step", 2)
    saved = load_latents(tmp_path / "out")
    assert len(saved) == 24 and saved.names == open_images([face_lmdb], 16).names
    with pytest.raises(ValueError, match=r"has no images of size 64 \(present: 8, 16, 32\)"):
        open_images([face_lmdb], 64)
    with pytest.raises(ValueError, match="give it alone"):
        open_images([face_lmdb, face_lmdb], 16)


def test_wrong_size_and_checkpoint(checkpoint, photos, tmp_path, capsys):
    start(checkpoint, photos, tmp_path / "out", "--size", 256, expect=1)
    assert f"--size 256, but the generator in {checkpoint} makes 16 pixels" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "out", "--size", 16, "--space", "w", expect=1)
    assert "space w does not exist in a W++ generator" in capsys.readouterr().err
    start(photos / "0.png", photos, tmp_path / "out", expect=1)
    assert capsys.readouterr().err.count("\n") == 1
    start(checkpoint, photos, tmp_path / "out", "--lr_rampup", 3, expect=2)
    assert "--lr_rampup is a fraction from 0 to 1, got 3.0" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["--device tpu", "--perceptual vgg19", "--perceptual scorer", "--identity facenet"])
def test_an_unknown_name_is_misuse(checkpoint, photos, tmp_path, mistake):
    start(checkpoint, photos, tmp_path / "out", *mistake.split(), expect=2)


def test_full_disk(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """The disk fills at the third image: one line, finished results whole, and the same command resumes."""
    out, synced, fsync = tmp_path / "out", [], os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{out / 'inversions'}/"):
            synced.append(descriptor)  # settings.json is the first
            if len(synced) == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    start(checkpoint, photos, out, expect=1)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error:") and "No space left on device" in err and ".npz" in err
    assert len(list((out / "inversions").glob("*.npz"))) == 2 and not list((out / "inversions").glob(".tmp*"))
    monkeypatch.setattr(os, "fsync", fsync)
    start(checkpoint, photos, out)
    assert len(load_latents(out)) == 5


def test_seed_is_of_the_pixels():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    other = image.clone()
    other[0, 0, 0] = 1
    assert pixel_seed(image, 0) == pixel_seed(image.clone(), 0)
    assert len({pixel_seed(image, 0), pixel_seed(other, 0), pixel_seed(image, 1)}) == 3


def test_alignment_is_carried_over(checkpoint, tmp_path, monkeypatch):
    from faces.align import Alignment, read_alignment

    faces = tmp_path / "faces"
    (faces / "aligned").mkdir(parents=True)
    for red, name in enumerate(("anna", "berta", "clara", "dora")):
        save_image(Image.new("RGB", (16, 16), (red, 60, 200)), faces / "aligned" / f"{name}.png")
    face = Alignment([[0, 0], [0, 9], [9, 9], [9, 0]], [30, 20], 16, [[1, 2]] * 5, name="anna", source="anna.jpg")
    (faces / "alignment.json").write_text(json.dumps({"faces": [asdict(face)]}), encoding="utf-8")
    times = []
    monkeypatch.setattr(inversion.inputs, "read_alignment", lambda path: times.append(path) or read_alignment(path))
    start(checkpoint, faces / "aligned", tmp_path / "out")
    anna, *others = load_latents(tmp_path / "out").alignment
    assert anna["source"] == "anna.jpg" and others == [None] * 3
    assert len(times) == 2, "before and after the work, not for every image"
    monkeypatch.chdir(faces / "aligned")
    for named in ("anna.png", "."):
        assert open_images([named], 16).alignment()[0]["source"] == "anna.jpg", "a bare name, its folder"
