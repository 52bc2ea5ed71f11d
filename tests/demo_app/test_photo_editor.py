"""One photo through the editor: what an edit changes, what it reads, what it leaves alone."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import edit_photos
from common.images import read_image, to_tensor
from demo_app.curves import cut_curve, position_for
from demo_app.editor import READ, PhotoEditor, PhotoError, expression_of, scale_alignment
from demo_app.flags import MODELS, model_flags
from demo_app.inversions import inversion_file, load_faces, save_faces
from demo_app.models import CHECKPOINTS, Conditional, load_models
from demo_app.targets import Reading, Target, open_error
from faces.align import Alignment, crop_aligned, to_bytes
from faces.paste import STRONGEST, Change, edit_crop, motion, part_mask, paste_edit, warp
from perceptual.lpips import FeatureDistance

SHAPE = [[0, -1], [1, -1], [0.5, -0.5], [0.1, 0], [0.9, 0]]  # of five landmarks


def test_no_edit_leaves_the_photo(editor, astronaut):
    result = editor.edit({})
    assert np.array_equal(result.photo, read_image(astronaut))


def test_the_photo_shows_the_target(editor):
    result = editor.edit({"age": Target(3, relative=True)})
    reading = result.faces[0].readings["age"]
    assert reading.goal == pytest.approx(reading.before + 3)
    assert abs(reading.photo - reading.goal) < 1.2 and reading.visible, reading
    frame = np.array(editor.faces[0].alignment.quad)
    low, high = np.floor(frame.min(0)).astype(int), np.ceil(frame.max(0)).astype(int) + 1
    changed = np.argwhere((np.asarray(result.photo) != np.asarray(editor.photo)).any(-1))[:, ::-1]
    assert len(changed) and (changed >= low - 1).all() and (changed <= high).all(), "pixels outside the frame changed"


def test_an_edit_that_the_photo_does_not_show_is_left_out(editor, monkeypatch):
    before = editor.read([editor.faces[0].crop])
    age = before[0, editor.models.scorer.column("age")]
    monkeypatch.setattr(editor, "_before", lambda face, names: {"age": age})
    monkeypatch.setattr(editor, "_curve", lambda face, name, down: (np.array([0.0, 1]), age + np.array([0.0, 15])))
    for arrived, moved in ((0, False), (3, False), (5, True)):  # of 15 years
        monkeypatch.setattr(editor, "read", lambda images, add=arrived: np.repeat(before + add, len(images), 0))
        result = editor.edit({"age": Target(15, relative=True)})
        assert (result.faces[0].positions["age"] != 0) == moved
        assert np.array_equal(result.photo, editor.photo) != moved


def test_a_goal_that_the_photo_shows_already_moves_nothing(editor, monkeypatch):
    """Whatever is read further out, where it may be met again."""
    monkeypatch.setattr(editor, "_curve", None)
    result = editor.edit({"age": Target(0, relative=True)})
    assert result.faces[0].positions == {"age": 0.0} and np.array_equal(result.photo, editor.photo)


def test_strength_scales_the_edit(editor):
    at = [editor.edit({"age": Target(6, True)}, strength=s, rounds=0).faces[0].positions["age"] for s in (1, 0.5)]
    assert at[1] == pytest.approx(at[0] / 2)


def test_an_edit_ends_where_the_person_would_change(editor, monkeypatch):
    positions, similarities = [], []
    for person in (0.65, 0.9, 1.1):
        monkeypatch.setattr("demo_app.curves.PERSON", person)
        editor.faces[0].curves.clear()
        face_edit = editor.edit({"age": Target(200)}, rounds=0).faces[0]
        pair = torch.stack([to_tensor(crop.resize((READ, READ))) for crop in (editor.faces[0].crop, face_edit.crop)])
        positions.append(face_edit.positions["age"])
        similarities.append(editor.models.identity.similarity(pair[:1], pair[1:]).item())
    assert positions[0] > positions[1] > positions[2] == 0
    assert similarities[0] < similarities[1] < similarities[2]


def test_a_curve_is_cut_where_identity_crosses_the_floor(monkeypatch):
    monkeypatch.setattr("demo_app.curves.PERSON", 0.65)
    at, same = np.arange(4.0), np.array([1, 0.8, 0.6, 0.9])
    positions, values = cut_curve(-at, 10 * at, same)
    np.testing.assert_allclose(positions, -np.arange(18) / 10)  # 0.65 is crossed at 1.75; what comes back is lost
    np.testing.assert_allclose(values, -10 * positions)
    assert cut_curve(at, at, 0 * same)[0] == [0]  # the photo itself stays


def test_an_edit_suits_a_photo_of_another_size(editor):
    face_edit = editor.edit({"age": Target(3, True)}).faces[0]
    large = editor.photo.resize((1024, 1024))
    pasted = face_edit.paste(large)
    alignment = scale_alignment(face_edit.face.alignment, large.size)
    before, after = editor.read([crop_aligned(image, alignment) for image in (large, pasted)])[:, 0]
    assert after > before + 2


def test_unknown_attribute_and_no_photo(models, editor):
    with pytest.raises(PhotoError, match="hat cannot be edited.*only age"):
        editor.edit({"hat": Target(1)})
    with pytest.raises(PhotoError, match="first choose a photo"):
        PhotoEditor(models).edit({})


def test_the_expression_of_a_photo_is_read_without_inverting_it(models, editor, astronaut, monkeypatch):
    monkeypatch.setattr("demo_app.editor.EXPRESSION", ("age", "smile"))  # as if age were one; nothing reads a smile
    editor.set_photo(read_image(astronaut))
    expected = editor.read_faces(["age"])
    monkeypatch.delattr(PhotoEditor, "_encode")
    assert expression_of(astronaut, models) == {"age": Target(pytest.approx(expected["age"]))}


def test_the_expression_of_a_small_face_in_a_large_photo(models, astronaut, tmp_path, monkeypatch):
    """A frame of 60 pixels has 15 in a photo of 1000, of the 16 that the generator draws."""
    monkeypatch.setattr("demo_app.editor.EXPRESSION", ("age",))
    photo = Image.new("RGB", (4000, 1000), (128, 128, 128))
    face = read_image(astronaut).crop((150, 0, 350, 200)).resize((70, 70), Image.Resampling.LANCZOS)
    photo.paste(face, (2000, 400))
    photo.save(tmp_path / "far.png")
    assert list(expression_of(tmp_path / "far.png", models)) == ["age"]


def test_a_face_smaller_than_the_generator_draws(models, astronaut):
    with pytest.raises(PhotoError, match="too small"):
        PhotoEditor(models).set_photo(Image.new("RGB", (40, 40)), landmarks=2.0 * np.array(SHAPE) + 12)


def test_a_small_face_beside_a_large_one_is_counted(models, astronaut):
    editor, photo = PhotoEditor(models), read_image(astronaut)
    large, small = 60.0 * np.array(SHAPE) + 230, 2.0 * np.array(SHAPE) + 12
    assert len(editor._align(photo, [large, small], "all")) == editor.left_out == 1
    assert len(editor._align(photo, [large], "all")) == 1 and editor.left_out == 0


def test_refining_lowers_the_loss(editor):
    first = editor.refine(2)
    assert editor.refine(30) < first
    assert editor.faces[0].steps == 35


def test_drawn_face_is_exact(models):
    editor = PhotoEditor(models)
    editor.set_drawn(3)
    assert editor.refine(10) == 0 and editor.faces[0].exact
    assert editor.edit({}).photo.size == (256, 256)


def test_targets():
    assert Target(15, True).goal(30, "years") == 45 and Target(-10, True).goal(4, "years") == 0
    assert Target(1).goal(0.2, "probability") == pytest.approx(0.9)


def test_position_of_a_goal():
    at, values = np.array([-2.0, -1, 0, 1, 2]), np.array([10.0, 20, 30, 40, 35])
    assert position_for(at, values, 33, 1) == pytest.approx(0.3)
    assert position_for(at, values, 90, 1) == 1  # nowhere reached: the nearest
    assert position_for(at, values, 30, 1) == 0
    assert position_for(at, np.array([0.2, 0.5, 1.0, 0.9, 1.1]), 1.0, 0.1) == 0  # crossed elsewhere as well


def test_a_man_who_should_be_a_man_has_arrived():
    """Read as 1.00 in the photo, nothing is left to do, and nothing is missed; from 0.2 the goal is 0.9: above it is no
    error, 0.3 is one."""
    assert Target(1).goal(1.0, "probability") == 1.0 and Target(0).goal(0.02, "probability") == 0.02
    assert Reading(1.0, Target(1).goal(1.0, "probability"), 1.0, 1.0, "probability").visible
    goal = Target(1).goal(0.2, "probability")
    assert open_error(goal - 1.0, goal, "probability") == 0
    assert open_error(goal - 0.3, goal, "probability") == pytest.approx(0.6)
    assert open_error(0.1 - 0.0, 0.1, "probability") == 0 and open_error(0.1 - 0.5, 0.1, "probability") < 0
    assert open_error(0.5 - 0.8, 0.5, "probability") == pytest.approx(-0.3)
    assert open_error(46 - 50, 46, "years") == -4


def test_visible():
    assert not Reading(30, 45, 40, 32, "years").visible
    assert Reading(30, 45, 46, 44.5, "years").visible and Reading(60, 45, 46, 52, "years").visible
    assert Reading(30, 90, 46, 35, "years").visible  # five years are seen, whatever was asked
    assert not Reading(60, 45, 46, 70, "years").visible
    assert Reading(0.98, 0.97, 0.98, 0.98, "probability").visible  # no change was the target


# -- blending ----------------------------------------------------------------------------------------------------------


ANY = ("head", "eyes")  # the parts of an edit that may be any, which spares no feature


def face_images():
    """A grey face with a dark mouth: the photo (128 px), drawn smiling and as it is (32 px)."""
    drawn = np.full((32, 32, 3), 150, np.uint8)
    drawn[22:24, 10:22] = 60
    smiling = drawn.copy()
    smiling[20:22, 8:10] = smiling[20:22, 22:24] = smiling[24:26, 10:22] = 60
    return drawn.repeat(4, 0).repeat(4, 1), smiling, drawn


def edited(photo, before, after, *parts):
    """edit_crop with arrays of any type: float32 [H, H, 3], and the motion."""
    before, after = (np.clip(image, 0, 255).astype(np.uint8) for image in (before, after))
    change = Change(before, after, parts or ("head",))
    return edit_crop(Image.fromarray(np.asarray(photo).astype(np.uint8)), [change])


def test_equal_images_change_nothing():
    photo, _, drawn = face_images()
    new, flow = edited(photo, drawn, drawn)
    assert np.abs(new - photo).max() < 0.01 and not flow.any()


def test_what_motion_does_not_explain_is_added_softly():
    """Teeth appear 100 grey levels lighter than the lips, at most STRONGEST of which are added; the light stays."""
    drawn = np.full((32, 32, 3), 150, np.uint8)
    smiling, photo = drawn.copy(), (drawn.repeat(4, 0).repeat(4, 1) * 0.8).astype(np.uint8)
    smiling[20:26, 10:22] = 250
    added = edited(photo, drawn, smiling, *ANY)[0] - photo
    assert added[86:98, 50:78].min() > 40 and added.max() < STRONGEST + 1
    assert np.abs(added[:40]).max() < 1


def test_glasses_lie_on_a_face_that_does_not_move():
    """A dark frame arrives nearly whole, and only around the eyes."""
    face = blob(61, 49)
    framed = face.copy()
    framed[56:58, 30:98] = framed[100:102, 30:98] = 20
    new, flow = edited(face, face, framed, "glasses")
    added = new - face.astype(np.uint8)
    assert not flow.any() and added[56:58, 60:68].mean() < -2 * STRONGEST * 0.8 and abs(added[90:]).max() < 1


@pytest.mark.parametrize("at, own", [((61, 49), "eyes"), ((91, 64), "mouth"), ((73, 64), "")])
def test_features_are_spared_unless_the_edit_is_one_of_them(at, own):
    """Paler eyes, lips and nose arrive by a fifth; where the edit may be any, as when pasting back, all but whole."""
    (y, x), face, paler = at, blob(*at), np.minimum(blob(*at) + 40, 150)
    for part in ("head", "mouth"):
        added = (edited(face, face, paler, part)[0] - face.astype(np.uint8))[y, x, 0]
        assert (part == own and added > 25) or 0 <= added < 0.35 * 40, part
    if own != "mouth":
        assert (edited(face, face, paler, *ANY)[0] - face.astype(np.uint8))[y, x, 0] > 25


def blob(y, x, side=128, width=6.0):
    """A dark spot on grey, float32 [side, side, 3]."""
    at = np.arange(side, dtype=np.float32)
    spot = np.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / (2 * width**2))
    return np.repeat(150 - 100 * spot[..., None], 3, -1)


def test_the_photo_moves_as_the_drawn_face_does():
    """A stripe on a spot, which the inversion missed, goes where the edit moves the spot, and leaves no shadow."""
    before, after, photo = blob(64, 60), blob(64, 63), blob(64, 60)
    photo[62:66, 54:66] += 60
    flow = motion(after, before, part_mask(128))
    assert np.abs(flow[60:69, 58:68] - (-3, 0)).max() < 1 and not flow[:3].any()
    assert np.abs(warp(before, flow) - after)[50:80, 50:80].mean() < 4
    new, _ = edited(photo, before, after, *ANY)
    there, here = (new - after)[62:66, 60:67], (new - after)[50:78, 45:54]
    assert there.mean() > 45 and np.abs(here).max() < 15


def test_detail_finer_than_the_crop_moves_along():
    """A line of one pixel in a photo four times as large as the crop: 3 pixels of the crop are 12 of the photo."""
    photo = blob(64, 60).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    photo[240:272, 240] = 255
    end = 511.5
    alignment = Alignment(
        [[-0.5, -0.5], [-0.5, end], [end, end], [end, -0.5]], [512, 512], 128, landmarks=[], whole=True
    )
    drawn, moved = (blob(64, x).astype(np.uint8) for x in (60, 63))
    pasted = np.asarray(paste_edit(Image.fromarray(photo), [Change(drawn, moved, ANY)], alignment), float)
    row = pasted[256, 220:280].mean(-1)
    assert abs(int(row.argmax()) + 220 - 252) <= 3 and row.max() > row[18:22].max() + 60, row


def test_an_edit_stays_in_its_part_of_the_face():
    """A spot on the mouth and one between the eyes move; of an edit of the mouth only that one."""
    before, after = (np.minimum(blob(90, x), blob(40, x)) for x in (62, 65))
    head, mouth = (edited(before, before, after, *p)[0] - before.astype(np.uint8) for p in (ANY, ("mouth",)))
    assert np.abs(mouth)[80:100].max() > 25 and np.abs(head)[30:50].max() > 25
    assert np.abs(mouth)[:64].max() < 0.01  # above the ellipse
    assert np.abs(mouth - head)[88:100, 50:78].max() < 8  # below the nose
    both = part_mask(128, ("eyes", "mouth"))
    np.testing.assert_array_equal(both, np.maximum(part_mask(128, ("eyes",)), part_mask(128, ("mouth",))))


def test_a_tint_is_no_edit():
    photo, _, drawn = face_images()
    new, flow = edited(photo, drawn, drawn.astype(int) + 20)
    assert np.abs(new - photo).max() < 1 and np.abs(flow).max() < 0.1


def test_paste_of_nothing_is_the_photo(editor):
    face = editor.faces[0]
    drawn = np.zeros((16, 16, 3), np.uint8)
    assert np.array_equal(paste_edit(editor.photo, [Change(drawn, drawn)], face.alignment), editor.photo)


# -- kept inversions ---------------------------------------------------------------------------------------------------


def test_kept_inversions_give_the_same_edit(editor, models, tmp_path):
    save_faces(tmp_path / "a.npz", editor.faces)
    again = PhotoEditor(models)
    again.photo, again.faces = editor.photo, load_faces(tmp_path / "a.npz", editor.photo, models)
    target = {"age": Target(5, True)}
    assert np.array_equal(again.edit(target).photo, editor.edit(target).photo)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    assert load_faces(tmp_path / "a.npz", editor.photo, models) is None


def test_their_file_depends_on_photo_settings_and_networks(models, astronaut, no_face):
    files = {inversion_file("x", p, models, steps=s) for p in (astronaut, no_face) for s in (0, 60)}
    assert len(files) == 4
    retrained = FeatureDistance(torch.nn.Linear(1, 1), models.perceptual.name)
    assert inversion_file("x", astronaut, replace(models, perceptual=retrained), steps=0) not in files
    conditional = Conditional(models.generator, reader=None)
    assert inversion_file("x", astronaut, replace(models, conditional=conditional), steps=0) not in files


def test_flags_of_the_models_are_the_parameters_of_load_models():
    parameters = inspect.signature(load_models).parameters
    assert set(MODELS) == set(parameters) - {"device"}
    flags = model_flags(edit_photos.build_parser().parse_args(["a.jpg"]))
    assert {name: flags[name] or None for name in MODELS} == {n: parameters[n].default for n in MODELS}


# -- the bundled models ------------------------------------------------------------------------------------------------


def test_the_light_conditional_generator_edits_and_given_boundaries_go_first(monkeypatch):
    """An attribute of the condition, at a position as a curve gives it (np.float64), draws another face."""
    monkeypatch.setattr("demo_app.models.load_encoder", lambda *args: None)
    models = load_models()
    assert models.conditional.light and not models.boundaries and {"age", "eyeglasses"} < set(models.attributes)
    assert models.perceptual.network is models.identity and models.perceptual.name == "mobilefacenet", "loaded once"
    assert {"age", "gender", "smile"} == set(load_models(boundaries=CHECKPOINTS).boundaries)
    editor = PhotoEditor(models)
    editor.set_drawn(3)
    editor.invert_conditional(0)
    face, drawn = editor.faces[0], {}
    for layers in (None, range(4), range(0)):
        editor.set_layers(layers)
        ((smile, glasses),) = editor._draw(face, [{"eyeglasses": np.float64(1.2), "smile": np.float64(1.2)}])
        assert smile.parts == ("mouth",) and glasses.parts == ("glasses",), "which come last"
        drawn[layers] = smile.edited
        assert (np.abs(smile.edited.astype(float) - smile.unedited).mean() > 1) == (layers != range(0))
    assert not np.array_equal(drawn[None], drawn[range(4)]) and np.array_equal(drawn[range(0)], smile.unedited)
    editor.set_layers(None)
    ((smile, glasses),) = editor._draw(face, [{"eyeglasses": 1.2, "smile": 1.2}])
    crops = [to_bytes(edit_crop(face.crop, changes)[0]) for changes in ([smile, glasses], [smile])]
    (both, bare), column = editor.read(crops), models.scorer.column
    read = editor._read_edited(face, ["age", "eyeglasses"], [smile, glasses], crops[0])
    assert (
        read == {"age": bare[column("age")], "eyeglasses": both[column("eyeglasses")]}
        and read["age"] != both[column("age")]
    )


def test_edits_of_the_face_share_its_range(monkeypatch):
    """Age and gender move the head; glasses, which lie on it, leave them all of their range."""
    monkeypatch.setattr("demo_app.models.load_encoder", lambda *args: None)
    editor = PhotoEditor(load_models())
    editor.set_drawn(3)
    monkeypatch.setattr(editor, "_curve", lambda face, name, down: (np.array([0.0, 1]), np.array([0.0, 1])))
    for other, expected in (("eyeglasses", 1), ("gender", 0.5**0.5)):
        before = {"age": 0.0, other: 0.0}
        targets = {"age": Target(90), other: Target(1)}
        positions, _ = editor._search(editor.faces[0], before, targets, strength=1, rounds=0)
        assert positions["age"] == pytest.approx(expected, abs=0.05)


def test_another_choice_of_layers_reads_the_edits_again(editor):
    face = editor.faces[0]
    face.curves["smile", False] = [], []
    editor.set_layers(range(3))
    assert not face.curves
