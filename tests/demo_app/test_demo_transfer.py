"""The expression of a reference face on the demo page: cast by the conditional generator, shown, saved, by commands."""

import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from photos import CKPT, POINTS, SIZE, run_commands
from PIL import Image

import demo
from common.images import read_image, save_image
from demo_app.commands import cast_lines, save_cast
from demo_app.expression import ConditionalInversion, cast_expression, load_conditional
from demo_app.page import Page, Sitting
from demo_app.session import PASTES, SessionError, draw_face, paste, read_out, take_photo
from editing.attributes import ConditionError
from sampling.render import latents_source, render, select_condition

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas, in gradio's queue

SERIOUS, SMILING = 0, 31  # seeds; of five serious ones the generator makes one smile fully, three half, one not at all


def invert(tools, face, steps=4):
    work = ConditionalInversion(tools.conditional, tools.perceptual, face, steps)
    work.join(120)
    assert work.error is None and work.step == steps and work.picture.shape == (SIZE, SIZE, 3)
    return work


@pytest.fixture(scope="module")
def inverted(tools, face):
    return invert(tools, face).result


@pytest.fixture(scope="module")
def smiling(tools, tmp_path_factory):
    """Photo of a face that smiles, aligned already, and the face."""
    path = save_image(draw_face(tools, SMILING).crop, tmp_path_factory.mktemp("lenders") / "le nder ü.png")
    picture = Image.open(path).resize((96, 96), Image.Resampling.BICUBIC)
    path = save_image(picture, path)
    return path, take_photo(tools, path, landmarks="aligned")


# -- the work ------------------------------------------------------------------------------------------------------


def test_its_own_expression_changes_nothing(tools, face, inverted):
    cast = cast_expression(tools.conditional, face, inverted, face, 4)
    assert np.allclose(cast.condition, inverted.condition, atol=1e-6)
    assert np.abs(cast.view.edited.astype(int) - cast.view.inversion).max() <= 1
    other = cast_expression(tools.conditional, face, inverted, draw_face(tools, SERIOUS), 4)
    assert np.abs(other.view.edited.astype(int) - other.view.inversion).mean() > 1
    assert np.array_equal(other.view.inversion, cast.view.inversion)


def test_a_smile_is_cast(tools, smiling):
    face = draw_face(tools, SERIOUS)
    inverted = invert(tools, face, 60).result
    cast = cast_expression(tools.conditional, face, inverted, smiling[1], 60)
    conditional = tools.conditional.tools
    (start,) = render(conditional.generator, conditional.mean, noise=inverted.noise, condition=inverted.condition[None])
    before, after = (np.square(picture - np.asarray(face.crop, int)).mean() for picture in (start, cast.view.inversion))
    assert after < 0.3 * before, "the inversion has come closer to the face"
    rows = read_out(replace(tools, scorer=tools.conditional.reader.scorer), face, cast.view)
    ((before, after),) = [map(float, row[3:]) for row in rows if row[0] == "smile"]
    assert float(cast.asked[0]) > 0.6 and after > before + 0.3


def test_an_inversion_can_be_stopped_and_needs_a_distance(tools, face):
    work = ConditionalInversion(tools.conditional, tools.perceptual, face, 1000)
    work.cancel()
    work.join(20)
    assert not work.running and work.result is None and work.error is None
    with pytest.raises(SessionError, match="perceptual network"):
        ConditionalInversion(tools.conditional, None, face, 4)


# -- files and commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["change", "face", "drawn"])
def test_the_commands_give_the_same_pictures(how, tools, face, smiling, inverted, astronaut, tmp_path, monkeypatch):
    if how == "drawn":
        face = draw_face(tools, SERIOUS)
        inverted = invert(tools, face).result
    mode = how if how in PASTES else "change"
    path, reference = smiling
    cast = cast_expression(tools.conditional, face, inverted, reference, 4)
    monkeypatch.chdir(tmp_path)
    paths = save_cast(tools, cast, tmp_path / "files", mode)
    shutil.copy(astronaut, tmp_path)
    shutil.copy(path, tmp_path)
    zipfile.ZipFile(paths[-1]).extractall(tmp_path)
    text = (tmp_path / "commands.txt").read_text(encoding="utf-8")
    assert text.strip() == cast_lines(tools, cast, mode)
    run_commands(text, monkeypatch)
    frames = [np.asarray(Image.open(tmp_path / f"out/cast/frames/origin_0_ref_0_{j}.png")) for j in (0, 1)]
    assert np.array_equal(frames[0], cast.view.inversion) and np.array_equal(frames[1], cast.view.edited)
    assert np.array_equal(np.asarray(Image.open(paths[0])), cast.view.edited)
    if how != "drawn":
        pasted = read_image(tmp_path / "out" / "pasted" / astronaut.name)
        assert np.array_equal(np.asarray(pasted), np.asarray(Image.open(paths[1])))
        assert np.array_equal(np.asarray(pasted), np.asarray(paste(face, cast.view, mode)))
        assert not np.array_equal(np.asarray(pasted), np.asarray(face.photo))


def test_the_downloaded_latents_render_the_picture(tools, face, smiling, inverted, tmp_path):
    cast = cast_expression(tools.conditional, face, inverted, smiling[1], 4)
    zipfile.ZipFile(save_cast(tools, cast, tmp_path)[-1]).extractall(tmp_path / "zip")
    generator = tools.conditional.tools.generator
    for name, picture in (("inverted", cast.view.inversion), ("edited", cast.view.edited)):
        source = latents_source(
            generator, tmp_path / "zip" / name, truncation=1, mean=None, noise=None, noise_seed=None
        )
        (rendered,) = render(
            generator, source.codes([0]), noise=source.noise, condition=select_condition(source.condition, [0])
        )
        assert np.abs(rendered.astype(int) - picture).max() <= 1, "rounding"


# -- the buttons ---------------------------------------------------------------------------------------------------


SETTINGS = (0, 7, "change", 0, 0)  # layers, pasting, the sliders of age and smile


def last(steps):
    return list(steps)[-1][0]


@pytest.fixture
def page(tools, tmp_path):
    return Page(tools, tmp_path)


def test_a_cast_is_shown_until_a_slider_moves(page, tools, smiling, tmp_path):
    path, _ = smiling
    sitting = Sitting()
    sitting.take(draw_face(tools, SERIOUS))
    told = last(page.cast(sitting, str(path), True, 4))
    assert told.startswith(f"The expression of {path.name} was cast: smile 0.") and "mouth open" in told
    work = sitting.inverted
    _, _, inversion, edited, _, readout, commands, _ = page.show(sitting, *SETTINGS)
    assert "edit_conditional.py" in commands and "smile" in readout
    assert not np.array_equal(np.asarray(inversion), np.asarray(edited))
    assert {path.name for path in map(type(path), page.files(sitting, *SETTINGS)[1]["value"])} == {
        f"seed{SERIOUS:04d}-edited.png",
        f"seed{SERIOUS:04d}-latents.zip",
    }
    last(page.cast(sitting, str(path), True, 4))
    assert sitting.inverted is work, "inverted once for all references"
    moved = page.move(sitting, *SETTINGS[:3], 2, 0)
    assert sitting.cast is None and "edit_attribute.py" in moved[6] and "edit_conditional.py" not in moved[6]
    last(page.cast(sitting, str(path), True, 4))
    page.pick(sitting, SERIOUS + 1, *SETTINGS)
    assert sitting.cast is None and sitting.inverted is None


@pytest.mark.parametrize("kind", ["nothing", "no face yet", "text", "tiny"])
def test_a_bad_reference_gets_a_sentence(kind, page, tools, smiling, tmp_path):
    sitting, path = Sitting(), tmp_path / "refe rence.png"
    if kind != "no face yet":
        sitting.take(draw_face(tools, SERIOUS))
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "tiny":
        Image.new("RGB", (20, 20)).save(path)
    expected = {
        "nothing": "first upload a reference",
        "no face yet": "first take a face",
        "text": "refe rence.png cannot be read as an image",
        "tiny": "20x20 pixels",
    }[kind]
    given = {"nothing": None, "no face yet": str(smiling[0])}.get(kind, str(path))
    told = last(page.cast(sitting, given, False, 4))
    assert expected in told and str(tmp_path) not in told and sitting.cast is None and sitting.inverted is None
    assert expected in page.transfer(sitting, given, False, *SETTINGS)[1]


def test_points_of_both_photos_are_kept(tools, face, smiling, inverted, tmp_path):
    cast = cast_expression(tools.conditional, face, inverted, smiling[1], 4)
    zipfile.ZipFile(save_cast(tools, cast, tmp_path)[-1]).extractall(tmp_path / "zip")
    points = json.loads((tmp_path / "zip" / "landmarks.json").read_text(encoding="utf-8"))
    assert points[face.source] == POINTS and set(points) == {face.source, smiling[0].name}


# -- flags ---------------------------------------------------------------------------------------------------------


def read_flags(*flags):
    flags = ["--device", "cpu", "--identity", "none", "--scorer", "none", "--perceptual", "none", *flags]
    return demo.read_tools(demo.build_parser().parse_args(flags))


def test_the_conditional_generator_is_found_refused_or_left_out(tools, tmp_path):
    found = read_flags().conditional
    assert found.tools.ckpt.name.startswith("face-cgan-")
    assert found.known.attributes == tools.conditional.known.attributes
    assert read_flags("--conditional", "none").conditional is None
    with pytest.raises(ConditionError, match="is an unconditional generator"):
        load_conditional(CKPT)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_conditional(tmp_path / "absent.safetensors")


def test_small_faces_are_refined_by_the_scorer(monkeypatch):
    """Also where LPIPS is here; larger ones, or none read by a scorer, by what is here."""
    monkeypatch.setattr(demo, "perceptual_or_none", lambda *_: "LPIPS")
    flags = ("--scorer", "face-scorer", "--perceptual")
    assert read_flags(*flags, "auto").perceptual_name == "scorer:face-scorer"
    assert read_flags(*flags, "squeeze").perceptual == "LPIPS"
    assert read_flags("--perceptual", "auto").perceptual == "LPIPS"
    monkeypatch.setattr(demo, "SMALL", 32)
    large = read_flags(*flags, "auto")
    assert (large.perceptual, large.perceptual_name) == ("LPIPS", "auto")
