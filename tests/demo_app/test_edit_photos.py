"""The command: small with a tiny generator, and once from end to end with the bundled models."""

import csv
import errno
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import demo_app.batch
import edit_photos
from common.cli import UserError, run
from common.images import ImageError
from demo_app.batch import select_targets
from demo_app.editor import PhotoError, expression_of
from demo_app.targets import Target, parse_gender, parse_share, parse_years
from faces.folder import list_photos


def command(*flags) -> int:
    return run(edit_photos.main, edit_photos.build_parser(), [str(flag) for flag in flags])


@pytest.fixture
def photos(tmp_path, astronaut, no_face):
    """A folder with the astronaut, a wall and a damaged file."""
    folder = tmp_path / "my photos"
    (folder / "sub").mkdir(parents=True)
    photo = Image.open(astronaut).convert("RGB")
    photo.save(folder / "sub" / "Ä stronaut.jpg", quality=95)
    Image.open(no_face).save(folder / "wall.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return folder


def test_a_photo_that_cannot_be_written_leaves_the_others(photos, tmp_path, capsys, monkeypatch):
    """Two photos that differ in their suffix alone have a before/after pair each."""
    original = demo_app.batch.save_like

    def refuse(image, photo, path):
        if "a" == photo.stem:
            raise ImageError(f"{path} cannot be written")
        return original(image, photo, path)

    monkeypatch.setattr(demo_app.batch, "save_like", refuse)
    shutil.copy(photos / "sub" / "Ä stronaut.jpg", photos / "a.jpg")  # the first
    Image.open(photos / "a.jpg").save(photos / "sub" / "Ä stronaut.png")
    out = tmp_path / "out"
    assert command(photos, "--age", "+12", "--output_dir", out, "--quality", "fast", "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert "left out: a.jpg" in printed.err and "2 photos edited, 3 left out" in printed.out
    assert (out / "sub" / "Ä stronaut.jpg").is_file() and not (out / "a.jpg").exists()
    pairs = {path.name for path in (out / "before_after" / "sub").iterdir()}
    assert pairs == {"Ä stronaut.jpg.jpg", "Ä stronaut.png.jpg"}


def test_folder_end_to_end(photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = (photos, "--age", "+12", "--output_dir", out, "--quality", "fast", "--device", "cpu")
    assert command(*flags) == 0
    printed = capsys.readouterr()
    assert "left out: wall.png: no face was found" in printed.err and "left out: broken.jpg" in printed.err
    assert "Ä stronaut.jpg: age" in printed.out and "1 photos edited, 2 left out" in printed.out
    assert "ages are read to ±8 years" in printed.out
    with Image.open(out / "sub" / "Ä stronaut.jpg") as edited, Image.open(photos / "sub" / "Ä stronaut.jpg") as photo:
        assert edited.format == "JPEG" and edited.size == photo.size
        assert np.abs(np.asarray(edited, float) - np.asarray(photo, float)).max() > 20
    assert (out / "before_after" / "sub" / "Ä stronaut.jpg").is_file() and (out / "overview.jpg").is_file()
    (row,) = csv.DictReader((out / "report.csv").read_text(encoding="utf-8-sig").splitlines())
    assert row["attribute"] == "age" and float(row["goal"]) == pytest.approx(float(row["before"]) + 12, abs=0.01)
    assert float(row["photo"]) > float(row["before"]) + 4 and row["file"] == "sub/Ä stronaut.jpg", row

    (kept,) = (out / "inversions").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert command(*flags[:1], "--smile", "1", *flags[3:]) == 0
    assert [kept] == list((out / "inversions").iterdir()) and kept.stat().st_mtime_ns == stamp, "inverted again"


def test_no_photo_with_a_face(no_face, tmp_path, capsys):
    assert command(no_face, "--age", "60", "--quality", "fast", "--output_dir", tmp_path / "out") == 1
    assert "none of 1 photos" in capsys.readouterr().err


def test_misuse(no_face, tmp_path, capsys):
    assert command(no_face, "--output_dir", tmp_path / "out") == 2
    assert "say what to change" in capsys.readouterr().err
    assert command(no_face, "--age", "old") == 2
    assert command(tmp_path / "absent", "--age", "+5") == 1


def test_a_photo_is_never_replaced(no_face, tmp_path, capsys):
    before = no_face.read_bytes()
    for photos in (no_face, no_face.parent):
        assert command(photos, "--age", "60", "--output_dir", no_face.parent) == 2
        assert f"would replace the photo {no_face}" in capsys.readouterr().err
    assert no_face.read_bytes() == before


def test_a_reference_without_a_face_is_named(no_face, tmp_path, capsys):
    assert command(no_face, "--like", no_face, "--output_dir", tmp_path / "out", "--device", "cpu") == 1
    assert f"--like {no_face}: no face was found" in capsys.readouterr().err


def test_another_photo_is_never_replaced(no_face, tmp_path, capsys):
    """A photo in the folder of the results that has the name of one that is edited."""
    other = tmp_path / "raw" / no_face.name
    other.parent.mkdir()
    shutil.copy(no_face, other)
    assert command(other, "--age", "60", "--output_dir", tmp_path) == 2
    assert f"would replace the photo {no_face}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report.csv", "overview.jpg"])
def test_a_file_of_another_program_is_never_replaced(name, no_face, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert command(no_face, "--age", "60", "--output_dir", out) == 2
    assert f"would replace its {name}" in capsys.readouterr().err and (out / name).read_text() == "mine"


def test_results_in_a_folder_of_photos_are_no_photos(no_face, tmp_path, capsys):
    photos = tmp_path / "photos"
    for name in ("me.png", "old/me.png", "old/overview.jpg", "old/before_after/me.jpg", "mine/before_after/me.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(no_face, photos / name)
    (photos / "old" / "inversions").mkdir()
    assert list(list_photos([photos], tmp_path / "new")) == ["me.png", "mine/before_after/me.png"]
    assert "3 results of edit_photos.py are left out" in capsys.readouterr().err
    assert list(list_photos([photos / "old"], tmp_path / "new")) == ["me.png"], "a result may be edited again"


def test_a_photo_that_vanishes_leaves_the_others(no_face, tmp_path, models, capsys):
    batch = demo_app.batch.PhotoBatch(models, tmp_path / "out", {"age": Target(5, True)}, steps=0)
    with pytest.raises(UserError, match="none of 2 photos"):
        batch.run({"gone.jpg": tmp_path / "gone.jpg", "wall.png": no_face})
    printed = capsys.readouterr().err
    assert "left out: gone.jpg" in printed and "left out: wall.png: no face" in printed


def test_a_full_disk_ends_the_run_at_once(tmp_path, monkeypatch):
    """Not after the last of a thousand photos."""
    edited = []

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    batch = demo_app.batch.PhotoBatch(None, tmp_path, {}, steps=0)
    monkeypatch.setattr(batch, "load", lambda path: (None, None, None))
    monkeypatch.setattr(batch, "edit", lambda name, *_: (edited.append(name), time.sleep(0.05)))
    monkeypatch.setattr(batch, "save", refuse)
    with pytest.raises(OSError, match="No space"):
        batch.run({f"{i:02d}.jpg": tmp_path for i in range(40)})
    assert len(edited) < 40


def test_a_table_of_more_faces_than_an_overview_holds(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_app.batch, "SHOWN", 2)
    batch = demo_app.batch.PhotoBatch(editor.models, tmp_path, {}, steps=0)
    result = editor.edit({"age": Target(0, True)})
    for i in range(3):
        batch.report(f"{i}.jpg", result, tqdm(disable=True))
    assert len(batch.rows) == 3 and len(batch.tiles) == 2


def test_an_expression_that_no_model_edits_is_refused(models, no_face):
    with pytest.raises(PhotoError, match="none of smile, eyes_open, mouth_open can be edited"):
        expression_of(no_face, models)


def test_targets():
    assert parse_years("+15") == Target(15, True) and parse_years("-10") == Target(-10, True)
    assert parse_years("60") == Target(60, False)
    assert parse_share("1") == Target(1) and parse_share("-0.5") == Target(-0.5, True)
    assert (
        parse_gender("Female") == Target(0) and parse_gender("man") == Target(1) and parse_gender("0.7") == Target(0.7)
    )


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--smile", "50", "from 0 to 1"),
        ("--smile", "-2", "from 0 to 1"),
        ("--gender", "lady", "female, male, or"),
        ("--gender", "2", "female, male, or"),
        ("--age", "old", "years such as 60"),
        ("--age", "nan", "years such as 60"),
        ("--age", "", "years such as 60"),
    ],
)
def test_targets_out_of_range_are_refused(flag, value, expected, capsys):
    assert command("me.jpg", flag, value) == 2
    assert expected in capsys.readouterr().err


def test_an_attribute_without_a_boundary_is_said(models, capsys):
    targets = {"age": Target(1, True), "eyeglasses": Target(1)}
    assert list(select_targets(targets, models)) == ["age"]
    assert "no boundary of eyeglasses" in capsys.readouterr().err
    with pytest.raises(UserError, match="only age can be edited"):
        select_targets({"eyeglasses": Target(1)}, models)
