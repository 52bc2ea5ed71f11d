"""demo_app/page.py: what the page answers to uploads, moves, refinements and downloads, without a server."""

import json
import re
import shlex
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from common.images import save_image
from demo_app.editor import ROUNDS
from demo_app.flags import given_model_flags
from demo_app.layout import build_page
from demo_app.page import HELP, Page, Session, command_of, parse_points
from demo_app.targets import Target

POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut


@pytest.fixture
def page(models, tmp_path):
    return Page(models, tmp_path)


def test_upload_edit_refine_download(page, astronaut):
    *stages, answer = page.upload(astronaut, "")
    assert stages[0]["message"].startswith("Finding the face")
    session, (before, after) = answer["session"], answer["compare"]
    assert np.array_equal(before, after) and answer["age"] == 0
    moved = page.move(session, 0, page.models.generator.config.n_tokens - 1, -8)
    assert not np.array_equal(*moved["compare"]) and "**age**" in moved["readout"]
    assert re.search(r"ages are read to ±\d+ years", moved["readout"]), "the read-out's own error stands beside it"
    assert moved["command"].endswith("--age -8 --quality fast") and re.fullmatch(r"age -\d+\.\d\d", moved["distances"])
    coarse = page.move(session, 0, 2, -8)
    assert not np.array_equal(coarse["compare"][1], moved["compare"][1]), "three layers move instead of all"
    assert coarse["command"] == "", "edit_photos.py moves all layers"
    every = page.models.generator.config.n_tokens
    assert np.array_equal(page.move(session, 0, every - 1, -8)["compare"][1], moved["compare"][1])
    refined = list(page.refine(session, 20))
    assert "0 of 20 steps" in refined[0]["message"] and "Refined" in refined[-1]["message"]
    assert refined[-1]["command"].endswith("--age -8 --quality good")
    assert session.editor.faces[0].steps == 20
    with Image.open(page.save(session)["download"]) as saved, Image.open(astronaut) as photo:
        assert saved.format == photo.format and saved.size == photo.size
        assert np.abs(np.asarray(saved, float) - np.asarray(photo.convert("RGB"), float)).max() > 10


def test_an_upload_that_was_deleted_meanwhile(page, astronaut, tmp_path):
    upload = Path(shutil.copy(astronaut, tmp_path / "upload.png"))
    *_, answer = page.upload(upload, json.dumps(POINTS))
    upload.unlink()
    assert "upload the photo again" in page.save(answer["session"])["message"]


def test_a_small_face_of_a_large_photo(page, tmp_path):
    """A frame of 80 pixels has 13 in the preview, of the 16 that the generator draws."""
    at = np.array([3000, 300])
    points = at + [[-10, -5], [10, -5], [0, 5], [-8, 15], [8, 15]]
    path = save_image(Image.new("RGB", (6000, 600), (90, 90, 90)), tmp_path / "far.jpg")
    *_, answer = page.upload(path, json.dumps(points.tolist()))
    editor = answer["session"].editor
    assert 1100 < editor.photo.width < 1500 and editor.faces[0].alignment.side >= 16
    *_, answer = page.upload(path, json.dumps((at + (points - at) / 6).tolist()))
    assert "too small: 13 pixels" in answer["message"], "of the photo, not of its preview"


def test_a_drawn_face_needs_no_refinement(page):
    session = page.pick(2)["session"]
    assert list(page.refine(session, 60)) == []
    first, second = (Path(page.save(session)["download"]) for _ in range(2))
    assert second.name == "seed0002-edited.png" and second.is_file()
    another = page.pick(3, session)["session"]
    assert second.is_file(), "the page offers it until the next one"
    third = Path(page.save(another)["download"])
    assert second.is_file(), "its link may have been clicked just before"
    assert not first.parent.exists(), "files that are no longer offered fill the disk"
    blocks = build_page(page.models, page.folder).blocks.values()
    assert "change of the condition" in next(b.label for b in blocks if b.elem_id == "distances")
    (state,) = (block for block in blocks if block.stateful)
    state.delete_callback(another)  # an hour after the tab was closed
    assert not third.parent.exists() and not second.exists()


def test_a_slider_waits_while_the_photo_is_refined(page):
    session = page.pick(2)["session"]
    moved = threading.Thread(target=page.move, args=(session, 0, 3, *[1.0] * len(page.names)))
    with session.lock:  # as a step of the refinement holds it
        moved.start()
        moved.join(0.2)
        assert moved.is_alive()
    moved.join()
    assert session.values == [1.0] * len(page.names) and session.result.faces[0].positions


def test_the_photo_shown_last_is_the_corrected_one(page, astronaut, monkeypatch):
    """A drag that waits while its slider is released comes after the release; a refinement may end after both."""
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    session, made, edit = answer["session"], [], answer["session"].editor.edit
    monkeypatch.setattr(
        session.editor, "edit", lambda targets, *, rounds: made.append((*targets, rounds)) or edit(targets, rounds=0)
    )
    page.move(session, 0, 3, -8)
    page.move(session, 0, 3, -8, rounds=ROUNDS)
    assert page.move(session, 0, 3, -8) == {} and made == [("age", 0), ("age", ROUNDS)]
    assert page.move(session, 0, 2, -8) and page.move(session, 0, 3, -7) and made[2:] == [("age", 0)] * 2
    assert list(page.refine(session, 20)) and made[4:] == [("age", 0), ("age", ROUNDS)]


def test_damaged_uploads_get_a_sentence(page, tmp_path, no_face):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    for path, expected in ((damaged, "cannot be read as an image"), (no_face, "no face was found")):
        *_, answer = page.upload(path, "")
        assert expected in answer["message"] and str(tmp_path) not in answer["message"]
    *_, answer = page.upload(no_face, "1 2 three")
    assert "five points" in answer["message"]


def test_an_aligned_face_is_taken_whole(page, editor, tmp_path):
    path = save_image(editor.faces[0].crop, tmp_path / "crop.png")
    *_, answer = page.upload(path, "")
    assert answer["session"].editor.faces[0].alignment.whole


def test_a_new_photo_ends_the_refinement_of_the_one_before(page, astronaut):
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    refining = page.refine(answer["session"], 400)
    assert "0 of 400" in next(refining)["message"]
    page.pick(1, answer["session"])
    assert list(refining) == [] and answer["session"].editor.faces[0].steps <= 20
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    refining = page.refine(answer["session"], 400)
    next(refining)
    list(page.upload(None, "", answer["session"]))
    assert list(refining) == []


def test_an_answer_that_comes_after_another_photo_is_left_out(page, editor, monkeypatch):
    """A slider's correction takes seconds, a click on a drawn face does not."""
    session, edit = Session(editor, "me.jpg", before={"age": 40.0}, values=[0.0]), editor.edit
    monkeypatch.setattr("demo_app.page.expression_of", lambda *_: {"age": Target(45)})
    every = page.models.generator.config.n_tokens - 1
    assert page.move(session, 0, every, 5, rounds=1)["compare"], "it is shown"
    monkeypatch.setattr(editor, "edit", lambda *a, **how: (page.pick(1, session), edit(*a, **how))[1])
    assert page.move(session, 0, every, 8, rounds=1) == {}
    session.gone = False
    *_, answer = page.take_expression(session, "reference.jpg")
    assert answer == {}


def test_a_refused_photo_leaves_the_one_before(page, astronaut, no_face):
    """Its refinement, which follows every upload, writes over no refusal; it goes on when it is asked for."""
    *_, answer = page.upload(astronaut, json.dumps(POINTS))
    session = answer["session"]
    *_, answer = page.upload(no_face, "", session)
    assert "no face was found" in answer["message"] and list(page.refine(session, 20)) == []
    page.resume(session)
    *_, answer = page.refine(session, 10)
    assert session.editor.faces[0].steps == 10 and answer["message"].startswith("Refined")
    assert page.replace(session)["message"] == HELP, "a photo that is removed while it is refined"


def test_points_by_hand_are_of_one_photo(page, astronaut, no_face):
    *_, refused = page.upload(no_face, "1 2 three")
    *_, taken = page.upload(astronaut, json.dumps(POINTS))
    assert "points" not in refused and taken["points"] == ""
    moved = page.move(taken["session"], 0, page.models.generator.config.n_tokens - 1, -8)
    assert moved["command"] == "", "edit_photos.py would look for the face itself"


def test_every_part_of_an_edit_is_shown(page, editor, monkeypatch):
    """A head and a mouth are drawn one by one; ages that are not read have no error."""
    result = editor.edit({"age": Target(5, relative=True)}, rounds=0)
    face = replace(result.faces[0], changes=2 * result.faces[0].changes)
    monkeypatch.setattr(editor, "edit", lambda *_, **__: replace(result, faces=[face]))
    session = Session(editor, "me.jpg", Path("me.jpg"), before={"age": 40.0}, values=[5.0])
    assert len(page.show(session)["crops"]) == 4, "the photo's face, the inversion, two edits"
    assert "ages are read" not in page.readout({"smile": face.readings["age"]})


def test_sliders_show_an_expression_that_is_taken_over(page, astronaut, monkeypatch):
    """It is the last word on a smile, until the slider is moved again; eyes, which have no slider, stay with it."""
    monkeypatch.setattr("demo_app.page.expression_of", lambda *_: {"smile": Target(0.251), "eyes_open": Target(0.9)})
    shown = []
    monkeypatch.setattr(page, "names", ["smile"])
    monkeypatch.setattr(page, "show", lambda session, **_: shown.append((session.values, session.expression)) or {})
    session = Session(None, "me.jpg", before={"smile": 0.1}, values=[1.0])
    *_, answer = page.take_expression(session, astronaut)
    assert session.like == astronaut.name
    assert answer["smile"] == 0.25 and shown == [([0.25], {"eyes_open": Target(0.9)})]


def test_without_a_photo_the_controls_say_so(page):
    assert HELP in page.move(None, 0, 5, 0)["message"] and HELP in page.reset(None)["message"]
    assert list(page.refine(None, 60)) == [] and page.save(None) == {}
    assert "must not come after" in page.move(page.pick(0)["session"], 4, 2, 0)["message"]


def test_the_command_is_quoted_for_a_shell():
    name = "it's $HOME.jpg"
    command = command_of(name, {"age": Target(15, relative=True)})
    assert shlex.split(command) == ["python", "edit_photos.py", name, "--age", "+15"]
    assert shlex.quote(name) in command, "no shell replaces a variable"
    assert command_of("-me.jpg", {"smile": Target(1)}) == "python edit_photos.py ./-me.jpg --smile 1"


def test_the_command_names_the_models_of_the_page(page, editor):
    words = ["--ckpt", "my faces.safetensors", "--conditional", "none"]
    page.flags = given_model_flags(demo.build_parser().parse_args([*words, "--port", "7000"]))
    assert shlex.split(page.flags) == words
    session = Session(editor, "me.jpg", Path("me.jpg"), before={"age": 40.0}, values=[5.0])
    editor.faces[0].alignment = replace(editor.faces[0].alignment, score=0.9)  # found, not given by hand
    assert page.show(session)["command"] == f"python edit_photos.py me.jpg --age +5 --quality fast {page.flags}"
    session.like, session.expression, page.flags = "-a.jpg", {"eyes_open": Target(0.9)}, ""
    assert page.command(session, {}) == "python edit_photos.py me.jpg --like ./-a.jpg --quality fast"
    session.expression = {}  # reset
    assert page.command(session, {}) == ""


def test_points_are_typed_in_any_form_and_scaled_about_the_corner():
    text = "eyes 20.5,30; 40 30., nose (30.5;.5), mouth: 22 50 38 50"
    points = [[20.5, 30], [40, 30], [30.5, 0.5], [22, 50], [38, 50]]
    assert parse_points(" ", 1) is None and np.array_equal(parse_points(text, 1), points)
    assert np.allclose(parse_points(text, 0.5)[1], [19.75, 14.75])  # the middle of pixel 40 lies 40.5 from the corner
