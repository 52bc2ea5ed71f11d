"""prepare_data.py: what is written, in which order, how it is fitted and encoded, what is left out."""

import csv
import os

import numpy as np
import PIL
import pytest
from PIL import Image
from preparing import command, contents, decoded, manifest, noise

from common import lmdb_build
from common.images import fit_image, read_image
from common.lmdb_store import DatasetError, open_store
from dataset import MultiResolutionDataset


def test_writes_every_image_at_every_size_in_order(photos, tmp_path, capsys):
    out = tmp_path / "ü.lmdb"
    assert command("--out", out, "--n_worker", 1, "--size", "16,8", photos) == 0
    assert "9 images at 8, 16 px (png, lanczos, crop)" in capsys.readouterr().out
    names = manifest(out)["names"]
    assert names == ["a/b/d.png", "a/c.PNG", "a/ü 中文 .png", "b.png", "e.png", "f.png", "g.png", "h.png", "z.png"]
    assert manifest(out)["source_sizes"][0] == [52, 40]
    items = contents(out)
    assert items.pop(b"length") == b"9" and items.pop(b"manifest")
    assert sorted(items) == sorted(f"{s}-{i:05d}".encode() for s in (8, 16) for i in range(9))
    for index, name in enumerate(names):
        for size in (8, 16):
            expected = np.asarray(fit_image(read_image(photos / name), size))
            assert np.array_equal(decoded(out, size, index), expected)  # lossless
    assert sorted(p.name for p in out.iterdir()) == ["data.mdb", "skipped.csv"]
    data = MultiResolutionDataset(out, 16)
    assert len(data) == 9 and data.names == names


@pytest.mark.parametrize("spelling", [["--n_worker", "3"], ["--n-worker", "2"]])
def test_workers_do_not_change_the_result(photos, tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(lmdb_build, "CHUNK", 2)
    (photos / "bad.png").write_text("no image")
    assert command("--out", tmp_path / "one", "--n_worker", 1, "--size", 8, photos, "--max_bad", 1) == 0
    assert command("--out", tmp_path / "many", *spelling, "--size", 8, photos, "--max-bad", 1) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_unreadable_files_leave_no_hole_and_are_listed(photos, tmp_path, capsys):
    (photos / "a" / "zz, bad.png").write_text("no image")
    (photos / "empty.png").write_bytes(b"")
    cut = (photos / "b.png").read_bytes()
    (photos / "cut.png").write_bytes(cut[: len(cut) // 2])
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos, "--max_bad", 3) == 0
    assert "9 images" in capsys.readouterr().out
    assert len(MultiResolutionDataset(out, 8)) == 9
    with (out / "skipped.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"] and [row[0] for row in rows[1:]] == ["a/zz, bad.png", "cut.png", "empty.png"]
    assert "not in a known image format" in rows[1][1] and "empty" in rows[3][1]
    assert manifest(out)["skipped"] == rows[1:]
    assert np.array_equal(decoded(out, 8, 4), np.asarray(fit_image(read_image(photos / "e.png"), 8)))


@pytest.mark.parametrize(("max_bad", "status"), [("0", 1), ("1", 1), ("2", 0), ("0.1", 1), ("0.5", 0), ("1.0", 0)])
def test_max_bad(photos, tmp_path, capsys, max_bad, status):
    (photos / "bad.png").write_text("no image")
    (photos / "worse.png").write_text("no image")
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos, "--max_bad", max_bad) == status
    assert (out / "skipped.csv").exists()
    if status:
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: 2 of 11") and "skipped.csv" in message and f"--max_bad {max_bad}" in message
        with pytest.raises(DatasetError, match="holds no data.mdb"):
            open_store(out)
        assert sorted(path.name for path in out.iterdir()) == ["skipped.csv"]
        assert command("--out", out, "--n_worker", 4, "--size", 8, photos, "--max_bad", "0.9") == 0
        assert len(MultiResolutionDataset(out, 8)) == 9


def test_entries_that_are_no_files_are_counted_and_listed(photos, tmp_path, capsys):
    (photos / "dangling.png").symlink_to("gone.png")
    (photos / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.png")
    out = tmp_path / "out"
    args = ["--out", out, "--n_worker", 1, "--size", 8, photos]
    assert command(*args) == 1
    assert "3 of 12 image files" in capsys.readouterr().err
    for compat in ([], ["--compat", "--overwrite"]):
        assert command(*args, "--max_bad", 3, *compat) == 0
        assert "9 images" in (said := capsys.readouterr().out) and "3 skipped" in said
        with (out / "skipped.csv").open(encoding="utf-8", newline="") as file:
            rows = dict(csv.reader(file))
        assert rows["dangling.png"] == "is a link to gone.png, which does not exist"
        assert "pipe" in rows["pipe.png"] and "device" in rows["zero.png"]
    assert command(*args, "--compat") == 0 and "up to date" in capsys.readouterr().err


@pytest.mark.parametrize("compat", [[], ["--compat"]])
def test_one_damaged_file_ends_nothing_whatever_the_decoder_raises(photos, tmp_path, monkeypatch, compat, capsys):
    load = PIL.ImageFile.ImageFile.load

    def fail(self):
        if self.size == (72, 40):  # h.png
            raise RuntimeError("Failed to decode image")
        return load(self)

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", fail, raising=False)
    Image.new("RGB", (1, 9000)).save(photos / "line.bmp")
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos, "--max_bad", 3, *compat) == 0
    skipped = dict(manifest(out)["skipped"])
    assert skipped["h.png"] == "Failed to decode image" and ("line.bmp" in skipped) == bool(compat)


def test_nothing_readable(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert command("--out", tmp_path / "out", tmp_path / "photos") == 1
    assert "holds no images" in capsys.readouterr().err
    (tmp_path / "photos" / "a.png").write_text("no")
    assert command("--out", tmp_path / "out", "--max_bad", "1.0", tmp_path / "photos") == 1
    assert "none of the 1 image files" in capsys.readouterr().err
    assert command("--out", tmp_path / "out", tmp_path / "nowhere") == 1
    error = capsys.readouterr().err
    assert "nowhere does not exist" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["a", "b"],
        ["a", "--size", "x"],
        ["a", "--size", "0"],
        ["a", "--size", "64,1000000"],
        ["a", "--background", "1,2"],
        ["a", "--background", "1,2,300"],
        ["a", "--quality", "90"],
        ["a", "--format", "jpeg", "--quality", "101"],
        ["a", "--compat", "--format", "jpeg"],
        ["a", "--compat", "--fit", "pad"],
        ["a", "--n_worker", "0"],
        ["a", "--max_bad", "-1"],
        ["a", "--max_bad", "1.5"],
        ["a", "--max_bad", "few"],
        ["a", "--fit", "stretch"],
        ["a", "--resample", "sharp"],
        ["a", "--siz", "8"],
    ],
    ids=lambda args: " ".join(args) or "none",
)
def test_misuse(tmp_path, capsys, args):
    assert command("--out", tmp_path / "out", *args) == 2
    assert capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_fit_resample_background_are_applied_and_recorded(photos, tmp_path):
    out = tmp_path / "out"
    args = ["--fit", "pad", "--resample", "box", "--background", "10,20,30", "--size", 20]
    assert command("--out", out, "--n_worker", 1, *args, photos) == 0
    found = manifest(out)
    assert (found["fit"], found["resample"], found["background"]) == ("pad", "box", [10, 20, 30])
    image = read_image(photos / found["names"][0])
    expected = fit_image(image, 20, fit="pad", resample="box", background=(10, 20, 30))
    assert np.array_equal(decoded(out, 20, 0), np.asarray(expected))
    assert decoded(out, 20, 0)[0, 0].tolist() == [10, 20, 30]


def test_enlarging_is_said(photos, tmp_path, capsys):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "8,64", photos) == 0
    assert "note: 9 images are smaller than 64 px" in capsys.readouterr().err


def test_jpeg_keeps_the_colour_resolution(photos, tmp_path):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", 16, "--format", "jpeg", photos) == 0
    encoded = contents(tmp_path / "out")[b"16-00000"]
    (tmp_path / "item.jpg").write_bytes(encoded)
    with Image.open(tmp_path / "item.jpg") as image:
        assert image.format == "JPEG" and all(layer[1:3] == (1, 1) for layer in image.layer)
    assert (manifest(tmp_path / "out")["quality"], manifest(tmp_path / "out")["subsampling"]) == (95, "4:4:4")


def test_webp_is_lossless_unless_a_quality_is_given(photos, tmp_path):
    for name, quality in [("lossless", []), ("lossy", ["--quality", 80])]:
        args = ["--n_worker", 1, "--size", 16, "--format", "webp", *quality]
        assert command("--out", tmp_path / name, *args, photos) == 0
    expected = np.asarray(fit_image(read_image(photos / manifest(tmp_path / "lossless")["names"][0]), 16))
    assert np.array_equal(decoded(tmp_path / "lossless", 16, 0), expected)
    assert not np.array_equal(decoded(tmp_path / "lossy", 16, 0), expected)


@pytest.mark.parametrize("filter_name", ["lanczos", "bilinear"])
def test_compat_gives_rosinalitys_bytes(tmp_path, filter_name):
    functional = pytest.importorskip("torchvision.transforms.functional", reason="compared with torchvision")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(51, 40), (40, 53), (33, 33), (16, 16), (15, 20)]):
        noise(i, *size).save(folder / f"{i}.png")
    noise(9, 30, 40).convert("L").save(folder / "9.jpg", comment=b"hello")
    assert (
        command(
            "--out", tmp_path / "out", "--n_worker", 1, "--size", "16,24", "--compat", "--resample", filter_name, folder
        )
        == 0
    )
    items = contents(tmp_path / "out")
    for index, path in enumerate(sorted(folder.iterdir())):
        for size in (16, 24):
            # the sequence of calls in rosinality/stylegan2-pytorch, prepare_data.py
            image = functional.resize(Image.open(path).convert("RGB"), size, functional.InterpolationMode(filter_name))
            functional.center_crop(image, size).save(tmp_path / "item", format="jpeg", quality=100)
            assert items[f"{size}-{index:05d}".encode()] == (tmp_path / "item").read_bytes()
    assert manifest(tmp_path / "out")["compat"] is True
    assert len(MultiResolutionDataset(tmp_path / "out", 16)) == 6


def test_metadata_does_not_get_in(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    noise(1).save(tmp_path / "photos" / "a.jpg", exif=exif, comment=b"where I live")
    for image_format in ("png", "jpeg", "webp"):
        out = tmp_path / image_format
        assert command("--out", out, "--n_worker", 1, "--size", 8, "--format", image_format, tmp_path / "photos") == 0
        assert b"where I live" not in contents(out)[b"8-00000"]
