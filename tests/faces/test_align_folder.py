"""Alignment, the command: a folder of awkward photos of which every one is accounted for."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
from aligning import align_cli, read_report, read_report_bytes
from PIL import Image, ImageFile
from points import ASTRONAUT, FRONTAL

import align_faces
import faces.folder
from common.cli import run
from common.lock import lock_folder
from faces.align import Alignment, align, crop_aligned, read_alignment
from faces.folder import choose_names, looks_aligned


def test_every_photo_is_accounted_for(photos, tmp_path, capsys):
    out = tmp_path / "öut"
    assert align_cli(photos, out) == 0
    rows = read_report(out)
    assert {photo: row["outcome"] for photo, row in rows.items()} == {
        "a b/same.png": "aligned",
        "a b/two  spaces.PNG": "aligned",
        "damaged.jpg": "unreadable",
        "empty.png": "unreadable",
        "nobody.png": "no face",
        "other program.png": "no face",
        "same.jpg": "aligned",
        "same.png": "aligned",
        "wrong order.png": "bad landmarks",
        "ü 中文.jpg": "aligned",
    }
    assert sorted(path.name for path in (out / "aligned").iterdir()) == [
        "a b_same_png.png",
        "same_jpg.png",
        "same_png.png",
        "two  spaces.png",
        "ü 中文.png",
    ]
    assert all(Image.open(path).size == (64, 64) for path in (out / "aligned").iterdir())
    assert "5 faces of 10 photos" in capsys.readouterr().out
    assert not list(out.glob(".*")), "nothing is left over"
    alignments = read_alignment(out / "alignment.json")
    assert alignments["ü 中文"].source == "ü 中文.jpg" and alignments["ü 中文"].photo_size == [512, 512]


def test_crops_are_those_of_the_library(photos, tmp_path, astronaut):
    align_cli(photos, tmp_path / "out")
    alignment = read_alignment(tmp_path / "out" / "alignment.json")["two  spaces"]
    saved = Image.open(tmp_path / "out" / "aligned" / "two  spaces.png")
    assert saved.tobytes() == crop_aligned(astronaut, alignment).tobytes()
    assert Alignment(**asdict(alignment)) == alignment


def test_a_finished_run_only_does_what_is_new(photos, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    original = faces.folder.align_photo
    monkeypatch.setattr(faces.folder, "align_photo", lambda task: done.append(task.source) or original(task))
    align_cli(photos, out)
    assert len(done) == 10
    before = (out / "alignment.json").read_bytes()
    done.clear()
    assert align_cli(photos, out) == 0 and done == []
    assert (out / "alignment.json").read_bytes() == before
    (out / "aligned" / "same_png.png").unlink()  # lost
    (photos / "two  spaces.png").write_bytes((photos / "same.png").read_bytes())  # new, its name taken
    (photos / "nobody.json").write_text(json.dumps((FRONTAL / 4).tolist()))  # now given by hand
    assert align_cli(photos, out) == 0
    assert done == ["nobody.png", "same.png", "two  spaces.png"]
    assert read_report(out)["a b/two  spaces.PNG"]["names"] == "two  spaces", "names stay"
    done.clear()
    assert align_cli(photos, out, "--max_yaw", "80") == 0
    assert len(done) == 11, "other settings: all again"
    done.clear()
    assert align_cli(photos, out, "--max_yaw", "80", "--overwrite") == 0 and len(done) == 11


def test_a_killed_run_goes_on(photos, tmp_path, monkeypatch):
    align_cli(photos, tmp_path / "whole")
    out, done = tmp_path / "out", []
    original = faces.folder.align_photo

    def dies_at_the_sixth(task):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(task.source)
        return original(task)

    monkeypatch.setattr(faces.folder, "align_photo", dies_at_the_sixth)
    assert align_cli(photos, out) == 130
    first = list(done)
    monkeypatch.setattr(faces.folder, "align_photo", lambda task: done.append(task.source) or original(task))
    assert align_cli(photos, out) == 0
    assert len(done) == 10 and len(set(done)) == 10 and done[:5] == first
    for name in ("alignment.json", "report.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_workers_change_nothing(tmp_path, astronaut):
    """Faces by hand in one file; two processes; the same bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        astronaut.resize((64 + i, 64 + i)).save(folder / f"{i}.png")
    by_hand = {f"{i}": ((ASTRONAUT + 0.5) * (64 + i) / 512 - 0.5).tolist() for i in range(9)}
    (tmp_path / "faces.json").write_text(json.dumps(by_hand), encoding="utf-8")
    for n in (1, 2):
        assert align_cli(folder, tmp_path / f"out{n}", "--landmarks", tmp_path / "faces.json", "--n_worker", n) == 0
    files = sorted(path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1").rglob("*") if path.is_file())
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "out1" / file).read_bytes() == (tmp_path / "out2" / file).read_bytes()


def test_which_faces(tmp_path, astronaut, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    astronaut.save(folder / "pair.png")
    turned_away = ASTRONAUT.copy()
    turned_away[2] += (30, 0)  # the nose leaves the face: a profile
    (tmp_path / "faces.json").write_text(json.dumps({"pair.png": [ASTRONAUT.tolist(), turned_away.tolist()]}))
    hand = ("--landmarks", tmp_path / "faces.json")
    assert align_cli(folder, tmp_path / "largest", *hand) == 0
    assert read_report(tmp_path / "largest")["pair.png"]["note"] == "2 faces, the largest taken"
    assert align_cli(folder, tmp_path / "all", *hand, "--faces", "all") == 0
    assert sorted(path.name for path in (tmp_path / "all/aligned").iterdir()) == ["pair_face0.png", "pair_face1.png"]
    row = read_report(tmp_path / "all")["pair.png"]
    assert row["faces_aligned"] == "2" and "profile" in row["note"]
    assert align_cli(folder, tmp_path / "front", *hand, "--faces", "all", "--max_yaw", "40") == 0
    row = read_report(tmp_path / "front")["pair.png"]
    assert row["names"] == "pair" and "1 turned by more than 40 degrees" in row["note"]
    assert align_cli(folder, tmp_path / "none", *hand, "--faces", "2") == 1
    assert "none of 1 photos gave a face (1 skipped)" in capsys.readouterr().err
    assert "there is no face 2, only 2" in read_report(tmp_path / "none")["pair.png"]["note"]


def test_the_largest_face_by_hand_is_the_first(tmp_path, astronaut, no_detector):
    (tmp_path / "photos").mkdir()
    astronaut.save(tmp_path / "photos" / "pair.png")
    (tmp_path / "photos" / "pair.json").write_text(json.dumps([(ASTRONAUT / 2).tolist(), ASTRONAUT.tolist()]))
    for which, points in (("largest", ASTRONAUT), ("1", ASTRONAUT / 2)):
        assert align_cli(tmp_path / "photos", tmp_path / "out", "--faces", which) == 0
        assert read_alignment(tmp_path / "out" / "alignment.json")["pair"].landmarks == points.round(3).tolist()


def test_faces_that_are_cut_off_are_reported(tmp_path, astronaut):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, left in (("whole", 150), ("half", 224)):  # the right eye lies at column 203
        astronaut.crop((left, 0, 512, 512)).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps((ASTRONAUT - (left, 0)).tolist()))
    assert align_cli(folder, tmp_path / "out") == 0
    rows = read_report(tmp_path / "out")
    assert rows["whole.png"]["note"] == "" and rows["half.png"]["note"].startswith("partly outside the photo")


def test_images_of_another_run_are_pointed_out(photos, tmp_path, capsys):
    align_cli(photos, tmp_path / "out")
    assert "note:" not in capsys.readouterr().err
    (photos / "same.jpg").unlink()
    assert align_cli(photos, tmp_path / "out") == 0
    assert "1 images in" in (said := capsys.readouterr().err) and "same_jpg.png; they are not in" in said
    assert (tmp_path / "out/aligned/same_jpg.png").is_file()


def test_names_never_collide():
    sources = ["a.jpg", "a.png", "A.webp", "b/a.png", "x.png", "x_face0.png", "é.png", "a_png.png"]
    names = choose_names(sources, {})
    assert len({name.casefold() for name in names.values()}) == len(sources)
    assert names["x.png"] == "x" and names["x_face0.png"] != "x_face0" and names["é.png"] == "é"
    assert not any(name.endswith("_face0") for name in names.values())
    later = choose_names([*sources, "é.jpg"], names)
    assert {source: later[source] for source in sources} == names and later["é.jpg"] not in names.values()


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--faces", "some"], 2, "--faces some"),
        (["--size", "4"], 2, "--size takes 8 to 16384"),
        (["--size", "20000"], 2, "--size takes 8 to 16384"),
        (["--max_yaw", "-4"], 2, "--max_yaw 0 or more"),
        (["--paste_back", "x"], 2, "go together"),
        (["--unedited", "x"], 2, "goes with --paste_back"),
        (["--photos", "absent"], 1, "absent does not exist"),
        (["--photos", "."], 1, "holds no images"),
        (["--landmarks", "absent.json"], 1, "absent.json"),
    ],
)
def test_misuse(flags, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    (tmp_path / "here").mkdir()
    argv = ["--photos", "one.png", "--output_dir", "out", *flags]
    if flags == ["--photos", "."]:
        monkeypatch.chdir(tmp_path / "here")
    assert run(align_faces.main, align_faces.build_parser(), argv) == status
    assert message in capsys.readouterr().err


def test_nothing_in_a_folder_ends_it_or_is_lost(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (photos / "dangling.jpg").symlink_to("gone.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.png")
    for name, text in {"deep": "[" * 100_000, "huge": f"[{'9' * 400}]", "null": "null", "nan": "[NaN]"}.items():
        (photos / f"{name}.png").write_bytes((photos / "same.png").read_bytes())
        (photos / f"{name}.json").write_text(text)
    os.mkfifo(photos / "fifo.json")
    (photos / "fifo.png").write_bytes((photos / "same.png").read_bytes())
    odd = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")
    shutil.copy(photos / "same.png", odd)
    assert align_cli(photos, out) == 0
    outcomes = {photo: row["outcome"] for photo, row in read_report_bytes(out).items()}
    assert len(outcomes) == 20
    for name in ("dangling.jpg", "loop.jpg", "zero.png", "pipe.png"):
        assert outcomes[name] == "unreadable"
    for name in ("deep.png", "huge.png", "null.png", "nan.png"):
        assert outcomes[name] == "bad landmarks", name
    assert outcomes["same.png"] == "aligned" and outcomes["fifo.png"] == "no face"
    before = (out / "alignment.json").read_bytes()
    done = []
    original = faces.folder.align_photo
    monkeypatch.setattr(faces.folder, "align_photo", lambda task: done.append(task.source) or original(task))
    assert align_cli(photos, out) == 0 and done == [] and (out / "alignment.json").read_bytes() == before


def test_a_decoder_that_raises_anything_costs_one_photo(photos, tmp_path, monkeypatch):
    load = ImageFile.ImageFile.load

    def fail(self):
        if self.size == (60, 50):  # nobody.png
            raise RuntimeError("Failed to decode image")
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert align_cli(photos, tmp_path / "out") == 0
    row = read_report(tmp_path / "out")["nobody.png"]
    assert row["outcome"] == "unreadable" and "Failed to decode image" in row["note"]


def test_two_runs_on_one_folder_are_told(photos, tmp_path, capsys):
    with lock_folder(tmp_path / "out", what="align_faces.py"):
        assert align_cli(photos, tmp_path / "out") == 1
    assert "out is in use: align_faces.py" in capsys.readouterr().err


@pytest.mark.parametrize(("left", "tight"), [(0, False), (100, False), (190, True)])
def test_a_crop_that_is_mostly_made_up_is_said(tmp_path, astronaut, capsys, left, tight):
    folder = tmp_path / "photos"
    folder.mkdir()
    middle = ASTRONAUT.mean(0)
    box = (
        (left, max(0, int(middle[1]) - 60), min(512, int(2 * middle[0]) - left), int(middle[1]) + 60) if tight else None
    )
    astronaut.crop(box or (left, 0, 512, 512)).save(folder / "face.png")
    points = ASTRONAUT - (box[:2] if tight else (left, 0))
    (folder / "face.json").write_text(json.dumps(points.tolist()))
    assert align_cli(folder, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert ("face.png: cut too tightly: " in said) == tight
    assert ("% of the frame lies outside the photo" in read_report(tmp_path / "out")["face.png"]["note"]) == tight


def test_whether_a_face_is_framed_is_seen_in_the_image(tmp_path, astronaut, detector):
    quad = align(astronaut, ASTRONAUT, size=300, aligned_tolerance=0)
    crop_aligned(astronaut, quad).save(tmp_path / "framed.png")
    astronaut.save(tmp_path / "photo.png")
    wide = Image.new("RGB", (500, 300), (90, 90, 90))
    wide.paste(crop_aligned(astronaut, quad), (100, 0))
    wide.save(tmp_path / "wide.png")
    Image.new("RGB", (300, 300)).save(tmp_path / "empty.png")
    assert looks_aligned(tmp_path / "framed.png") is True and looks_aligned(tmp_path / "wide.png") is True
    assert looks_aligned(tmp_path / "photo.png") is False
    assert looks_aligned(tmp_path / "empty.png") is None and looks_aligned(tmp_path / "absent.png") is None
