"""Alignment, the library: the published formula, crops to a fraction of a pixel, pasting that leaves no trace, the
detector. The faces are generated images and scikit-image's astronaut."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from points import ASTRONAUT, FRONTAL, difference, turned, wave, wave_photo

import common.weights
from common.cli import UserError
from common.images import read_image
from faces.align import (
    TEMPLATE,
    AlignError,
    Alignment,
    align,
    crop_aligned,
    estimate_yaw,
    ffhq_quad,
    parse_landmarks,
    read_alignment,
    template_error,
)
from faces.paste import STRONGEST, paste_back


def template_quad(landmarks):
    """Corners of the frame in which eyes and mouth corners lie nearest to TEMPLATE: a least-squares similarity, by
    complex numbers, whose product turns and scales. The development data's faces were made so."""
    photo, frame = np.asarray(landmarks)[[0, 1, 3, 4]] @ (1, 1j), TEMPLATE @ (1, 1j)
    centred = photo - photo.mean()
    turn = np.vdot(centred, frame - frame.mean()) / np.vdot(centred, centred).real  # photo -> frame
    corners = (np.array([0, 1j, 1 + 1j, 1]) - frame.mean()) / turn + photo.mean()
    return np.stack([corners.real, corners.imag], axis=1)


# -- framing -------------------------------------------------------------------------------------------------------


def test_ffhq_formula_by_hand():
    """Eyes (0,0) and (1,0), mouth (0.2,1) and (0.8,1): centre (0.5, 0.1), half side max(2 * 1, 1.8 * 1) = 2."""
    quad = ffhq_quad(np.array([(0, 0), (1, 0), (0.5, 0.5), (0.2, 1), (0.8, 1)]))
    assert np.allclose(quad, [(-1.5, -1.9), (-1.5, 2.1), (2.5, 2.1), (2.5, -1.9)])
    longer = ffhq_quad(np.array([(0, 0), (1, 0), (0.5, 0.5), (0.2, 2), (0.8, 2)]))  # half side 1.8 * 2
    assert np.allclose(longer[2] - longer[0], (7.2, 7.2))


def test_frames_follow_the_face():
    for degrees, scale in ((0, 1), (30, 0.5), (-100, 3), (180, 1)):
        moved = ffhq_quad(turned(FRONTAL, degrees, scale, (50, -20)))
        assert np.allclose(moved, turned(ffhq_quad(FRONTAL), degrees, scale, (50, -20)))
    with pytest.raises(AlignError, match="coincide"):
        ffhq_quad(np.ones((5, 2)))


def test_distance_from_the_template():
    points = TEMPLATE * 200 - 0.5
    face = np.insert(points, 2, (100, 120), axis=0)
    assert template_error(face, (200, 200)) == pytest.approx(0, abs=1e-9)
    assert template_error(face + 2, (200, 200)) == pytest.approx(np.hypot(2, 2) / 200)
    assert template_error(face, (200, 201)) == float("inf")
    assert np.abs(ffhq_quad(face) - template_quad(face)).max() < 0.03 * 200, "FFHQ's frame of a mean face"


def test_yaw():
    assert estimate_yaw(FRONTAL) == pytest.approx(0, abs=1e-9)
    right = FRONTAL.copy()
    right[2] += (8, 0)
    assert 20 < estimate_yaw(right) < 30  # atan(8 / (0.87 * 20))
    assert estimate_yaw(turned(right, 40)) == pytest.approx(estimate_yaw(right)), "roll is no yaw"
    mirrored = (right * (-1, 1))[[1, 0, 2, 4, 3]]
    assert estimate_yaw(mirrored) == pytest.approx(-estimate_yaw(right))


def test_landmarks_by_hand():
    points = FRONTAL.tolist()
    for value in (points, {"landmarks": points}, FRONTAL.ravel().tolist(), [points], {"landmarks": [FRONTAL.ravel()]}):
        (face,) = parse_landmarks(value)
        assert np.array_equal(face, FRONTAL)
    assert len(parse_landmarks([points, points])) == 2
    for value in (
        None,
        [],
        3,
        "x",
        points[:4],
        [*points[:4], [1, None]],
        {"eyes": points},
        [points, points[:3]],
        [*points[:4], [1, float("nan")]],
    ):
        with pytest.raises(AlignError, match=r"a.json: expected five points"):
            parse_landmarks(value, "a.json")
    with pytest.raises(AlignError, match="the right eye is the one on the left"):
        parse_landmarks(FRONTAL[[1, 0, 2, 4, 3]])


# -- cropping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 100, 256])
@pytest.mark.parametrize("degrees", [0, 25, -70])
def test_crops_are_exact(size, degrees):
    """Every pixel of the crop is the photo's mean over the area that the quad says: up, down, turned.

    The photo's and the crop's rounding leave at most 1/3 on the mean (of two independent uniform errors), none in one
    direction, and 0.5 + 0.5 * 1.25^2 at most (1.25: sum of the absolute weights of Keys's cubic half-way). Measured:
    0.28, 0.06 and 1.07 at most.
    """
    photo = wave_photo(400, 360)
    alignment = align(photo, turned(FRONTAL - 120, degrees, 1, (200, 180)), size=size)
    crop = np.asarray(crop_aligned(photo, alignment), np.float64)
    quad = np.array(alignment.quad)
    parts = 800 // size
    place = (np.arange(parts * size) + 0.5) / (parts * size)
    points = quad[0] + place[None, :, None] * (quad[3] - quad[0]) + place[:, None, None] * (quad[1] - quad[0])
    expected = wave(points[..., 0], points[..., 1]).reshape(size, parts, size, parts, 3).mean((1, 3))
    error = crop - expected
    assert crop.shape == (size, size, 3)
    assert np.abs(error).mean() < 1 / 3 and np.abs(error).max() < 1.28
    assert np.abs(error.mean((0, 1))).max() < 0.1


@pytest.mark.parametrize("transposed", [False, True])
def test_border_is_that_of_ffhq(transposed):
    """The recipe's steps one by one, in closed form. The photo has fine dots of 200 on 100, a quarter of the pixels, in
    its first 64 columns, and 30 elsewhere. Frame of 400 pixels from column -60, so the image is mirrored over 120
    (0.3 sides): outwards the blur (8 pixels) leaves the dots' mean, 125, which fades to the median, 30, over those 120;
    inwards the blur fades out over a third, 40 columns. The step at 64 is three deviations from what is compared."""
    pixels = np.full((600, 600), 30.0)
    pixels[:, :64] = 100
    pixels[::2, :64:2] = 200
    quad = np.array([(-60, 100), (-60, 500), (340, 500), (340, 100)]) - 0.5
    if transposed:
        pixels, quad = pixels.T, quad[[0, 3, 2, 1], ::-1]
    photo = Image.fromarray(np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2))
    crop = crop_aligned(photo, placed(quad, photo, 400))
    x = np.arange(-40, 64)
    dots = np.where((x % 2 == 0) & (np.arange(100, 500) % 2 == 0)[:, None], 200, 100)
    inside = np.clip(x / 40, 0, 1)
    outside = np.clip(-x / 120, 0, 1)
    expected = (1 - outside) * (125 + inside * (dots - 125)) + outside * 30
    found = np.asarray(crop, np.float64)
    found = found.transpose(1, 0, 2) if transposed else found
    assert difference(found[:, 20:124], expected[..., None]).max() <= 1.0  # two roundings and the blur's remainder


@pytest.mark.parametrize("left, untouched", [(5, True), (3, False)])
def test_border_is_left_alone_when_the_frame_keeps_clear_of_it(left, untouched):
    photo = wave_photo(200, 180)
    quad = np.array([(left, 40), (left, 140), (left + 100, 140), (left + 100, 40)]) - 0.5
    crop = np.asarray(crop_aligned(photo, placed(quad, photo, 100)))
    same = np.asarray(photo)[40:140, left : left + 100]
    assert np.array_equal(crop, same) == untouched and np.array_equal(crop[:, 20:], same[:, 20:])


def placed(quad, photo, size):
    return Alignment(quad=quad.tolist(), photo_size=list(photo.size), size=size, landmarks=FRONTAL.tolist())


def test_faces_far_outside_are_refused():
    photo = wave_photo(100, 100)
    for landmarks in (FRONTAL + 1000, FRONTAL * 50):
        with pytest.raises(AlignError, match="frame nothing of a photo of 100x100"):
            align(photo, landmarks)


def test_aligned_photos_are_left_alone():
    photo = wave_photo(128, 128)
    face = np.insert(TEMPLATE * 128 - 0.5, 2, (64, 80), axis=0)
    alignment = align(photo, face + 2, size=128)
    assert alignment.whole and crop_aligned(photo, alignment).tobytes() == photo.tobytes()
    assert crop_aligned(photo, alignment, 64).size == (64, 64)
    assert not align(photo, face + 2, size=128, aligned_tolerance=0).whole
    assert not align(photo, face + 5, size=128).whole


# -- pasting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(astronaut):
    return align(astronaut, ASTRONAUT, size=256, name="astronaut", source="astronaut.png")


@pytest.mark.parametrize("size", [64, 173, 512])
def test_unedited_faces_leave_no_trace(astronaut, aligned, size):
    pasted = paste_back(astronaut, crop_aligned(astronaut, aligned, size), aligned)
    assert pasted.tobytes() == astronaut.tobytes()


@pytest.mark.parametrize("size", [64, 173])
def test_only_the_change_is_added(astronaut, aligned, size):
    """Whatever the generator makes of a face: what it draws alike before and after the edit leaves no trace."""
    drawn = np.random.default_rng(0).integers(60, 190, (size, size, 3), np.uint8)  # nothing like the photo
    assert paste_back(astronaut, drawn, aligned, unedited=drawn).tobytes() == astronaut.tobytes()
    brighter = drawn.copy()
    brighter[5 * size // 8 : 7 * size // 8, 3 * size // 8 : 5 * size // 8] += 30  # of the whole head, it would be light
    pasted = np.asarray(paste_back(astronaut, brighter, aligned, unedited=drawn), np.int16)
    change = pasted - np.asarray(astronaut, np.int16)
    corner, below, _, beside = np.array(aligned.quad)
    x, y = (corner + 0.75 * (below - corner) + 0.5 * (beside - corner)).round().astype(int)  # the mouth
    middle, added = change[y - 10 : y + 10, x - 10 : x + 10], STRONGEST * math.tanh(30 / STRONGEST)
    assert abs(np.median(middle) - added) < 1 and np.abs(middle - added).mean() < 3  # less where the photo is bright
    assert not change[:5, :5].any()
    with pytest.raises(AlignError, match=f"is {size} pixels wide, unedited 8"):
        paste_back(astronaut, brighter, aligned, unedited=drawn[:8, :8])


def test_only_the_frame_is_touched_and_softly(astronaut, aligned):
    """A tint is complete in the middle, fades at the border, and nowhere jumps."""
    tint = np.array((30, -20, 10))
    crop = np.asarray(crop_aligned(astronaut, aligned, 256), np.int64)
    edited = np.clip(crop + tint, 0, 255).astype(np.uint8)
    pasted = paste_back(astronaut, edited, aligned)
    change = np.asarray(pasted, np.int64) - np.asarray(astronaut, np.int64)
    quad = np.array(aligned.quad)
    centre = quad.mean(0).round().astype(int)
    patch = np.asarray(astronaut)[centre[1] - 15 : centre[1] + 15, centre[0] - 15 : centre[0] + 15]
    middle = change[centre[1] - 15 : centre[1] + 15, centre[0] - 15 : centre[0] + 15]
    free = ((patch > 40) & (patch < 215)).all(-1)
    assert np.abs(middle[free] - tint).max() <= 4
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    outside = np.ones(change.shape[:2], bool)
    outside[low[1] : high[1] + 1, low[0] : high[0] + 1] = False
    assert (change[outside] == 0).all()
    smooth = wave_photo(512, 512)
    tinted = np.clip(np.asarray(crop_aligned(smooth, aligned), np.int64) + tint, 0, 255).astype(np.uint8)
    step = np.asarray(paste_back(smooth, tinted, aligned), np.int64)[..., 0] - np.asarray(smooth)[..., 0]
    assert np.abs(np.diff(step, axis=0)).max() <= 4 and np.abs(np.diff(step, axis=1)).max() <= 4


def test_detail_goes_where_the_structure_changed(astronaut, aligned, monkeypatch):
    """The photo's own fine detail stays where nothing was edited, and leaves no ghost where it was."""
    small = crop_aligned(astronaut, aligned, 64)
    edited = np.asarray(small).copy()
    stripes = 90 + 60 * (np.arange(16)[:, None, None] // 2 % 2)
    edited[36:52, 24:40] = stripes  # the mouth
    pasted = paste_back(astronaut, edited, aligned)
    blurred = astronaut.resize((128, 128)).resize(astronaut.size)  # about as coarse as the crop
    monkeypatch.setattr("faces.paste.STRUCTURE_SCALE", 1e-3)
    drop = paste_back(astronaut, edited, aligned)
    monkeypatch.setattr("faces.paste.STRUCTURE_SCALE", 1e9)
    keep = paste_back(astronaut, edited, aligned)
    mouth, eyes = (slice(128, 150), slice(212, 230)), (slice(90, 110), slice(195, 255))
    assert difference(pasted, drop)[mouth].mean() < 0.2 * difference(keep, drop)[mouth].mean()
    assert difference(pasted, astronaut)[eyes].mean() < 0.1 * difference(blurred, astronaut)[eyes].mean()


def test_tensors_and_whole_photos(aligned):
    import torch

    photo = wave_photo(128, 128)
    face = np.insert(TEMPLATE * 128 - 0.5, 2, (64, 80), axis=0)
    whole = align(photo, face, size=64)
    assert whole.whole
    assert paste_back(photo, crop_aligned(photo, whole), whole).tobytes() == photo.tobytes()
    grey = paste_back(photo, torch.zeros(3, 64, 64), whole)
    assert difference(grey, np.full((128, 128, 3), 128)).max() <= 3, "no soft border: the face is all there is"


def test_mismatches_are_refused(astronaut, aligned):
    face = crop_aligned(astronaut, aligned)
    with pytest.raises(AlignError, match="astronaut.png has 511x512 pixels, but 512x512 when"):
        paste_back(astronaut.crop((0, 0, 511, 512)), face, aligned)
    with pytest.raises(AlignError, match="not square"):
        paste_back(astronaut, face.crop((0, 0, 100, 90)), aligned)


# -- detection -----------------------------------------------------------------------------------------------------


def test_finds_the_astronaut(detector, astronaut):
    (face,) = detector.detect(astronaut)
    assert np.abs(face.landmarks - ASTRONAUT).max() < 1.5 and face.score > 0.8
    left, top, width, height = face.box
    assert (ASTRONAUT > (left, top)).all() and (ASTRONAUT < (left + width, top + height)).all()
    again = detector.detect(astronaut)[0]
    assert np.array_equal(face.landmarks, again.landmarks), "deterministic"


LEANING = [(0.3, 0), (4, 0), (0.5, -15), (1, 25), (1, -40)]


@pytest.mark.parametrize("scale, degrees", LEANING)
def test_landmarks_follow_the_photo(detector, astronaut, scale, degrees):
    """Small, large and leaning photos: the lean is found to 5 degrees (UPRIGHT), and
    each point within 0.12 eye distances: 5 degrees at the eyes' 0.65 from the middle, and 0.06 of its own."""
    size = round(512 * scale)
    photo = astronaut.resize((size, size), Image.Resampling.LANCZOS).rotate(-degrees, Image.Resampling.BICUBIC)
    centre = (size - 1) / 2
    upright = detector.detect(astronaut)[0].landmarks
    expected = turned((upright + 0.5) * scale - 0.5 - centre, degrees, 1, centre)
    (face,) = detector.detect(photo)
    assert np.linalg.norm(face.landmarks - expected, axis=1).max() < 0.12 * 43.3 * scale
    frame, target = ffhq_quad(face.landmarks), ffhq_quad(expected)
    across, target = (complex(*(quad[3] - quad[0])) for quad in (frame, target))
    assert abs(np.degrees(np.angle(across / target))) <= detector.UPRIGHT


def test_several_faces_largest_first(detector, astronaut):
    photo = Image.new("RGB", (900, 520), (90, 110, 130))
    small = astronaut.crop((120, 0, 340, 240)).resize((110, 120), Image.Resampling.LANCZOS)
    photo.paste(small, (30, 200))
    photo.paste(astronaut, (380, 0))
    faces = detector.detect(photo, many=True)
    assert len(faces) == 2
    assert faces[0].landmarks[:, 0].min() > 500 and faces[1].landmarks[:, 0].max() < 150


@pytest.mark.parametrize("size", [(5, 5), (3, 2000), (300, 200)])
def test_images_without_faces(detector, size):
    assert detector.detect(Image.new("RGB", size, (120, 90, 70))) == []


def test_parts_of_a_large_face_are_no_faces_of_their_own():
    """Landmarks that the detector gave for two people, each of whom fills half of a photo of 10 megapixels."""
    from faces.detect import is_same_face

    left, right, eye, again = np.array(
        [
            [[68, 1893], [860, 1883], [361, 2395], [112, 2842], [841, 2832]],
            [[1934, 2172], [2319, 2140], [2286, 2591], [2021, 2879], [2340, 2858]],
            [[616, 1893], [1103, 1881], [854, 2229], [641, 2422], [1112, 2403]],
            [[41, 1883], [908, 1887], [409, 2393], [59, 2774], [887, 2777]],
        ]
    )
    assert is_same_face(left, eye) and is_same_face(again, left) and not is_same_face(left, right)


def test_absent_detector_is_named(monkeypatch, tmp_path):
    pytest.importorskip("cv2", reason="OpenCV (requirements.txt) runs the detector")
    from faces.detect import FaceDetector

    monkeypatch.setattr(common.weights, "search_folders", lambda weights_dir=None: [tmp_path])
    with pytest.raises(FileNotFoundError, match="yunet_n_640_640.onnx .*common.weights get yunet_640"):
        FaceDetector()


def test_real_photos_against_their_twins(detector, real_faces):
    """The development data's photos and their aligned twins, framed as those were. Mean distance of five points in 128
    pixels: 0.77 over all 36 that were not aligned before (2.30 at most), 0.49 to 0.71 for the four compared here."""
    photos, twins = real_faces.parent / "photos", real_faces.parent / "faces-heldout"
    if not photos.is_dir() or not twins.is_dir():
        pytest.skip(f"no photos beside {real_faces}")
    with open(photos / "photos.csv", encoding="utf-8", newline="") as file:
        reference = {row["photo"]: row["aligned_file_in_faces_heldout"] for row in csv.DictReader(file)}
    with open(twins / "labels.csv", encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    columns = "rex rey lex ley nx ny rmx rmy lmx lmy".split()
    errors = []
    for name in sorted(name for name in reference if name.startswith(("aaf", "lfw")))[::9]:
        photo = read_image(photos / name)
        landmarks = detector.detect(photo)[0].landmarks
        quad = template_quad(landmarks)
        axes = np.stack([quad[3] - quad[0], quad[1] - quad[0]], axis=1)
        place = np.linalg.solve(axes, (landmarks - quad[0]).T).T * 128 - 0.5
        expected = np.array([float(rows[reference[name]][column]) for column in columns]).reshape(5, 2)
        errors.append(np.linalg.norm(place - expected, axis=1).mean())
    assert np.mean(errors) < 1 and np.max(errors) < 1.5


# -- files and imports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"faces": [{}]}', '{"faces": [{"quad": 1, "photo_size": [1, 2], "size": 3, "landmarks": []}]}'],
)
def test_damaged_alignment_files_are_refused(tmp_path, content):
    (tmp_path / "alignment.json").write_text(content)
    with pytest.raises(UserError, match="alignment.json is no alignment.json of align_faces.py"):
        read_alignment(tmp_path / "alignment.json")


def test_library_needs_no_opencv_to_crop(root):
    code = "import sys, faces.align; sys.exit('cv2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(root), check=True, timeout=300)
