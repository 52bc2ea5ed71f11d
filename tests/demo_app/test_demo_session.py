"""The demo page's work without a browser: photo to code to edit to photo, refusals, refining, the same by commands."""

import json
import shlex
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import POINTS, SIZE, run_commands
from PIL import Image

import demo
import demo_app.page
from common.images import read_image, save_image
from common.latents import load_latents
from common.weights import find
from demo_app.commands import command_lines, save_results
from demo_app.refinement import MOST_STEPS, Refinement
from demo_app.session import (
    REACH,
    Edit,
    SessionError,
    draw_face,
    find_boundaries,
    paste,
    read_out,
    render_edit,
    take_photo,
    transfer_smile,
)
from sampling.render import render

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue

# -- faces and edits -----------------------------------------------------------------------------------------------


def test_boundaries_are_found_by_the_generator(tools, boundary_folder):
    assert [path.name for path in find_boundaries(boundary_folder, tools.generator.fingerprint)] == [
        "age.npz",
        "smile.npz",
    ]
    assert list(tools.boundaries) == ["age", "smile"]
    with pytest.raises(FileNotFoundError, match="--boundaries"):
        find_boundaries(boundary_folder / "absent", "")


def test_the_largest_bundled_generator_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="--ckpt"):
        demo.default_generator()
    for name in ("face-wpp-32", "face-wpp-128", "face-wpp-64", "face-wpp-256-conditional", "face-psp-512"):
        (tmp_path / "checkpoints" / f"{name}.safetensors").touch()
    assert demo.default_generator().name == "face-wpp-128.safetensors"


def test_a_photo_is_aligned_and_inverted(tools, face):
    assert face.method == "encoder" and face.code.shape == (tools.n_layers, 512) and face.crop.size == (256, 256)
    assert face.name == "astro_naut_ü" and face.source == "astro naut ü.png"
    inversion = render_edit(tools, face, Edit()).inversion
    target = np.asarray(face.crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    mean, _ = tools.generator(tools.mean, input_is_latent=True, noise=face.noise)
    mean = (mean[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(inversion - target).mean() < 0.8 * np.abs(mean - target).mean()


def test_the_detector_finds_the_same_face(tools, astronaut, face):
    if not find("yunet_640"):
        pytest.skip("no weights of the face detector: python -m common.weights get yunet_640")
    found = take_photo(tools, astronaut)
    assert np.abs(np.subtract(found.alignment.quad, face.alignment.quad)).max() < 2


def test_a_picture_that_is_aligned_already(tools, tmp_path, face):
    path = save_image(face.crop, tmp_path / "aligned.png")
    again = take_photo(tools, path, landmarks="aligned")
    assert again.alignment.whole and np.array_equal(np.asarray(again.crop), np.asarray(face.crop))


def test_sliders_move_what_they_say(tools, face):
    age, smile = (list(tools.scorer.names).index(name) for name in ("age", "smile"))
    values = [
        tools.scorer(torch.from_numpy(view.edited).permute(2, 0, 1)[None] / 127.5 - 1)[0].tolist()
        for view in (render_edit(tools, face, Edit(edit)) for edit in ({}, {"age": 3}, {"age": -3}, {"smile": 3}))
    ]
    assert values[2][age] + 2 < values[0][age] < values[1][age] - 2
    assert values[3][smile] > values[0][smile] + 0.02
    unchanged, half = render_edit(tools, face, Edit({"age": 0})), render_edit(tools, face, Edit({"age": 2}, (4, 7)))
    assert np.array_equal(unchanged.code, face.code) and np.array_equal(unchanged.edited, unchanged.inversion)
    assert np.array_equal(half.code[:4], face.code[:4]) and not np.array_equal(half.code[4:], face.code[4:])
    with pytest.raises(SessionError, match="layers 5 to 2"):
        render_edit(tools, face, Edit({"age": 1}, (5, 2)))
    rows = read_out(tools, face, half)
    assert [row[0] for row in rows] == ["age", "smile"] and rows[0][1] == "years"
    assert float(rows[0][4]) > float(rows[0][3])


def test_the_smile_of_a_reference_is_reached(tools):
    face, reference = draw_face(tools, 3), draw_face(tools, 8)
    found, wanted, reached = transfer_smile(tools, face, reference, Edit())
    assert abs(reached - wanted) < 0.005 and 0 < abs(found) <= REACH
    view = render_edit(tools, face, Edit({"smile": found}))
    assert float(read_out(tools, face, view)[1][4]) == pytest.approx(wanted, abs=0.011)


def test_pasting_touches_the_face_only(tools, face):
    view = render_edit(tools, face, Edit({"age": 3}))
    photo = np.asarray(face.photo, np.int16)
    for mode in ("change", "face"):
        changed = np.abs(np.asarray(paste(face, view, mode), np.int16) - photo).max(-1) > 0
        rows, columns = np.nonzero(changed)
        quad = np.array(face.alignment.quad)
        assert changed.any() and rows.min() >= quad[:, 1].min() - 1 and rows.max() <= quad[:, 1].max() + 1
        assert columns.min() >= quad[:, 0].min() - 1 and columns.max() <= quad[:, 0].max() + 1
    unedited = paste(face, render_edit(tools, face, Edit()), "change")
    assert np.array_equal(np.asarray(unedited), photo)  # nothing was changed, nothing is lost
    assert paste(face, view, longest=100).size == (100, 100)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "empty", "tiny", "large", "cut short", "small face", "no face"])
def test_bad_uploads_get_a_sentence(kind, tools, tmp_path, astronaut):
    path = tmp_path / "up load.png"
    if kind == "no face" and not find("yunet_640"):
        pytest.skip("no weights of the face detector: python -m common.weights get yunet_640")
    expected = {
        "text": "image format",
        "empty": "empty",
        "tiny": "20x20 pixels",
        "large": "81 megapixels",
        "cut short": "truncated",
        "small face": "face in up load.png is too small",
        "no face": "no face",
    }[kind]
    if kind == "large":
        Image.new("1", (9000, 9000)).save(path)
    elif kind == "cut short":
        path.write_bytes(astronaut.read_bytes()[:90_000])
    elif kind in ("text", "empty"):
        path.write_bytes(b"not a picture" if kind == "text" else b"")
    else:
        Image.new("RGB", (20, 20) if kind == "tiny" else (200, 200), (90, 120, 60)).save(path)
    points = (np.array(POINTS) / 50).tolist() if kind == "small face" else None
    with pytest.raises(SessionError, match=expected) as caught:
        take_photo(tools, path, landmarks=points)
    message = str(caught.value)
    assert "up load.png" in message and str(tmp_path) not in message and "\n" not in message


def test_without_a_detector_the_points_can_be_given(tools, astronaut, monkeypatch):
    def absent(task):
        raise FileNotFoundError("yunet_n_640_640.onnx is not here")

    monkeypatch.setattr("demo_app.session.align_photo", absent)
    with pytest.raises(SessionError, match="give the five points by hand"):
        take_photo(tools, astronaut)


def test_points_are_read_however_they_are_typed():
    assert demo_app.page.parse_points(json.dumps({"landmarks": POINTS})) == POINTS
    assert demo_app.page.parse_points(" ".join(f"({x}; {y})" for x, y in POINTS)) == POINTS
    with pytest.raises(SessionError, match="got 3"):
        demo_app.page.parse_points("1 2 3")


# -- refining ------------------------------------------------------------------------------------------------------


def test_refining_comes_closer_and_can_be_stopped(tools, face):
    work = Refinement(tools, face, 30)
    work.join(120)
    assert work.error is None and work.step == 30 and work.picture.shape == (SIZE, SIZE, 3)
    assert work.result.method == "projector" and work.result.steps == 30
    target = np.asarray(face.crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    before, after = (
        np.square(render_edit(tools, each, Edit()).inversion - target).mean() for each in (face, work.result)
    )
    assert after < 0.7 * before
    stopped = Refinement(tools, face, MOST_STEPS)
    while not stopped.step:
        time.sleep(0.02)
    stopped.cancel()
    stopped.join(20)
    assert not stopped.running and stopped.result is None and stopped.error is None and stopped.step < 100


def test_refining_is_limited(tools, face):
    with pytest.raises(SessionError, match=str(MOST_STEPS)):
        Refinement(tools, face, MOST_STEPS + 1)
    with pytest.raises(SessionError, match="exact already"):
        Refinement(tools, draw_face(tools, 0), 10)


# -- files and commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["encoder", "projector", "drawn"])
def test_the_commands_give_the_same_pictures(how, tools, face, astronaut, tmp_path, monkeypatch):
    if how == "drawn":
        face = draw_face(tools, 5)
    if how == "projector":
        work = Refinement(tools, face, 4)
        work.join(60)
        face = work.result
    mode = "face" if how == "projector" else "change"
    edit = Edit({"age": 1.5, "smile": -2.0}, (0, 5) if how == "projector" else None)
    view = render_edit(tools, face, edit)
    monkeypatch.chdir(tmp_path)
    paths = save_results(tools, face, edit, view, tmp_path / "files", mode)
    shutil.copy(astronaut, tmp_path)
    zipfile.ZipFile(paths[-1]).extractall(tmp_path)
    text = (tmp_path / "commands.txt").read_text(encoding="utf-8")
    assert text.strip() == command_lines(tools, face, edit, mode)
    run_commands(text, monkeypatch)
    (frame,) = (tmp_path / "out" / "edited" / "frames").iterdir()
    assert np.array_equal(np.asarray(Image.open(frame)), view.edited)
    assert np.array_equal(np.asarray(Image.open(paths[0])), view.edited)
    if how != "drawn":
        pasted = read_image(tmp_path / "out" / "pasted" / astronaut.name)
        assert np.array_equal(np.asarray(pasted), np.asarray(Image.open(paths[1])))


def test_commands_name_the_weights_and_leave_out_what_the_page_went_without(tools, face):
    """`none` is a word of demo.py alone: the scripts know no such scorer or perceptual network."""
    bare = replace(tools, scorer_name="none", perceptual_name="none", weights_dir=Path("my weights"))
    align, invert, edit, paste_back = command_lines(bare, face, Edit({"age": 1.5})).splitlines()
    for line in (align, invert, edit):
        assert "none" not in shlex.split(line)
        assert line.endswith("--weights_dir 'my weights'")
    assert "--weights_dir" not in paste_back
    assert "--weights_dir" not in command_lines(tools, face, Edit({"age": 1.5}))


def test_the_downloaded_latents_render_the_picture(tools, face, tmp_path):
    edit = Edit({"smile": 2})
    view = render_edit(tools, face, edit)
    paths = save_results(tools, face, edit, view, tmp_path)
    assert [path.name for path in paths] == [
        "astro_naut_ü-edited.png",
        "astro_naut_ü-photo.png",
        "astro_naut_ü-latents.zip",
    ]
    zipfile.ZipFile(paths[-1]).extractall(tmp_path / "zip")
    for name, picture in (("inverted", view.inversion), ("edited", view.edited)):
        saved = load_latents(
            tmp_path / "zip" / name, expect_space="w++", expect_fingerprint=tools.generator.fingerprint
        )
        (rendered,) = render(tools.generator, saved.latents, noise=saved.noise)
        assert np.abs(rendered.astype(np.int16) - picture).max() <= 1  # another batch: rounding
    assert saved.extra["edit"]["distances"] == {"smile": 2}
