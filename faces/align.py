"""Photos to aligned faces: the frame of a face by FFHQ's formula (Karras et al. 2019, arXiv 1812.04948), and the crop.

    face = FaceDetector().detect(photo)[0]                                  # faces/detect.py; photo: PIL image
    crop = crop_aligned(photo, align(photo, face.landmarks, size=256))      # PIL image, 256 x 256

Coordinates are pixels of the upright photo with pixel centres at whole numbers. Landmarks are in YuNet's order: right
eye, left eye, nose, right and left mouth corner, where right is the person's right, the image's left.
"""

import os
from dataclasses import dataclass, fields
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageFilter

from common.cli import UserError
from common.files import read_json

# Where eyes and mouth corners lie in an FFHQ frame, in units of the side: the mean of FFHQ's own faces to 0.2 pixels of
# 128, solved from the development data's aligned faces, least-squares similarities to these four points.
TEMPLATE = (np.array([[47.809, 60.110], [79.820, 59.877], [50.022, 93.644], [78.452, 93.339]]) + 0.5) / 128
MAX_SIZE = 1 << 14  # pixels of a crop's side
NOSE_PROTRUSION = 0.87  # of the nose tip before the eyes, in half eye distances, of an average head (27 of 31 mm)


class AlignError(UserError):
    """A face cannot be framed, cropped or pasted; the message is one sentence."""


@dataclass(frozen=True)
class Alignment:
    """Geometry of a crop in its photo, as plain values."""

    quad: list[list[float]]  # corners upper left, lower left, lower right, upper right
    photo_size: list[int]  # width, height
    size: int  # of the crop in pixels
    landmarks: list[list[float]]
    whole: bool = False  # the crop is the whole photo, resized (it was aligned already)
    yaw: float = 0.0  # degrees, an estimate, positive towards the image's right
    box: list[float] | None = None
    score: float | None = None
    name: str = ""  # of the crop, without suffix
    source: str = ""  # of the photo, relative to its folder

    @property
    def side(self) -> float:
        """Side of the crop in pixels of the photo."""
        return float(np.linalg.norm(np.subtract(self.quad[3], self.quad[0])))


# A face in alignment.json, for read_json
FACE = {"quad": [[float]], "photo_size": [int], "size": int, "landmarks": [[float]], "whole?": bool, "yaw?": float}
FACE |= {"box?": ([float], None), "score?": (float, None), "name?": str, "source?": str}


def read_alignment(path) -> dict[str, Alignment]:
    """{name: Alignment} of an alignment.json. Raises FileNotFoundError, or UserError when it is something else."""
    state = read_json(path, {"faces": [FACE]}, what="alignment.json of align_faces.py")
    return {face.name: face for face in map(alignment_of, state["faces"])}


def alignment_of(values: dict) -> Alignment:
    """The Alignment of a dict of the shape FACE. Raises AlignError for no frame, and for names that lead elsewhere."""
    face = Alignment(**{field.name: values[field.name] for field in fields(Alignment) if field.name in values})
    source = PurePosixPath(face.source.replace("\\", "/") if os.name == "nt" else face.source)
    if face.name != PurePosixPath(face.name).name or source.is_absolute() or ".." in source.parts:
        raise AlignError(f"the face {face.name!r} of {face.source!r} is no name in a folder of photos")
    if np.shape(face.quad) != (4, 2) or np.shape(face.landmarks) != (5, 2) or np.shape(face.photo_size) != (2,):
        raise AlignError(f"the face {face.name!r} has no quad of 4, landmarks of 5 or photo_size of 2 numbers")
    if not 1 <= face.size <= MAX_SIZE:
        raise AlignError(f"the face {face.name!r} has a size of {face.size} pixels")
    _require_frame(np.array(face.quad), face.photo_size)
    return face


def _require_frame(quad, photo_size) -> None:
    width, height = photo_size
    inside = (quad.max(0) > 0) & (quad.min(0) < (width - 1, height - 1))
    if not inside.all() or not 1 <= np.linalg.norm(quad[3] - quad[0]) <= 10 * max(photo_size):
        raise AlignError(f"the landmarks frame nothing of a photo of {width}x{height} pixels")


def parse_landmarks(value, where="landmarks") -> list[np.ndarray]:
    """Faces [5, 2] given by hand: five [x, y], ten numbers, a list of such, or {"landmarks": any of these}. Raises
    AlignError for anything else, and for points in another order."""
    value = value.get("landmarks") if isinstance(value, dict) else value
    try:
        points = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.shape[-2:] == (5, 2) or points.shape[-1:] == (10,):
        points = points.reshape(-1, 5, 2)
    if points.ndim != 3 or len(points) == 0 or not np.isfinite(points).all():
        raise AlignError(f"{where}: expected five points [x, y] per face, got {str(value)[:80]}")
    for face in points:
        across, down = face[1] - face[0], face[3:].mean(0) - face[:2].mean(0)
        if across[0] * down[1] - across[1] * down[0] <= 0:
            order = "right eye, left eye, nose, right and left mouth corner"
            raise AlignError(f"{where}: the points must be {order}; the right eye is the one on the left of the image")
    return list(points)


def ffhq_quad(landmarks) -> np.ndarray:
    """Corners [4, 2] of the FFHQ frame: centre a tenth below the eyes towards the mouth, level between the eye line and
    the upright of eyes and mouth, half side max(2 eye distances, 1.8 eye-mouth distances)."""
    right_eye, left_eye, _, right_mouth, left_mouth = np.asarray(landmarks, np.float64)
    eyes, mouth = (right_eye + left_eye) / 2, (right_mouth + left_mouth) / 2
    across, down = left_eye - right_eye, mouth - eyes
    x = across + (down[1], -down[0])  # the eye line plus the eye-mouth line turned by 90 degrees
    length, half = np.hypot(*x), max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    if length < 1e-6 or half < 1:
        raise AlignError("the landmarks of a face coincide")
    x = x / length * half
    y, centre = np.array((-x[1], x[0])), eyes + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def estimate_yaw(landmarks) -> float:
    """Degrees by which the head is turned to the right of the image, by how far the nose leaves the midline; +-10."""
    right_eye, left_eye, nose, right_mouth, left_mouth = np.asarray(landmarks, np.float64)
    eyes, across = (right_eye + left_eye) / 2, left_eye - right_eye
    down = (right_mouth + left_mouth) / 2 - eyes
    length = max(np.hypot(*down), 1e-9)
    aside = ((nose - eyes)[0] * down[1] - (nose - eyes)[1] * down[0]) / length
    half_eyes = max((across[0] * down[1] - across[1] * down[0]) / length / 2, 1e-9)
    return float(np.degrees(np.arctan2(aside, NOSE_PROTRUSION * half_eyes)))


def template_error(landmarks, photo_size) -> float:
    """Mean distance of eyes and mouth corners from their places in an FFHQ frame, of the side; inf if not square."""
    if photo_size[0] != photo_size[1]:
        return float("inf")
    points = (np.asarray(landmarks, np.float64)[[0, 1, 3, 4]] + 0.5) / photo_size[0]
    return float(np.linalg.norm(points - TEMPLATE, axis=1).mean())


def align(photo, landmarks, *, size=256, aligned_tolerance=0.04, **info) -> Alignment:
    """The Alignment of one face. photo: PIL image; landmarks [5, 2]; info: score, box, name, source. A square photo
    whose template_error is at most aligned_tolerance is taken as it is (0: never). Raises AlignError for landmarks that
    frame nothing, or something far from the photo."""
    width, height = photo.size
    whole = template_error(landmarks, photo.size) <= aligned_tolerance
    quad = np.array([[0, 0], [0, height], [width, height], [width, 0]]) - 0.5 if whole else ffhq_quad(landmarks)
    _require_frame(quad, photo.size)
    quad, points = np.round(quad, 3).tolist(), np.round(landmarks, 3).tolist()
    return Alignment(quad, [width, height], size, points, whole, round(estimate_yaw(landmarks), 1), **info)


def outside_share(alignment: Alignment) -> float:
    """Share of the frame, 0..1, that lies outside the photo: `crop_aligned` fills it by mirroring."""
    steps = (np.arange(64) + 0.5) / 64
    quad = np.array(alignment.quad)
    points = quad[0] + steps[:, None, None] * (quad[3] - quad[0]) + steps[None, :, None] * (quad[1] - quad[0])
    inside = (points >= -0.5) & (points <= np.array(alignment.photo_size) - 0.5)
    return 1 - float(inside.all(-1).mean())


def crop_aligned(photo: Image.Image, alignment: Alignment, size: int | None = None) -> Image.Image:
    """The face, PIL image [size, size] (default: alignment.size); beyond the photo mirrored and blurred, as in FFHQ."""
    size = size or alignment.size
    if alignment.whole:
        return photo if photo.size == (size, size) else photo.resize((size, size), Image.Resampling.LANCZOS)
    quad, side = np.array(alignment.quad) + 0.5, alignment.side
    border = max(round(0.1 * side), 3)
    target_low, target_high = np.floor(quad.min(0)) - border, np.ceil(quad.max(0)) + border
    low, high = np.maximum(target_low, 0).astype(int), np.minimum(target_high, photo.size).astype(int)
    part = photo.crop((*low, *high))
    quad, missing = quad - low, np.concatenate((low - target_low, target_high - high))

    shrink = int(0.5 * side / size)
    if shrink > 1:
        before = np.array(part.size)
        after = np.maximum(np.round(before / shrink), 1)
        part = part.resize(tuple(int(v) for v in after), Image.Resampling.LANCZOS, reducing_gap=3.0)
        quad, side, border, missing = quad * (after / before), side / shrink, border / shrink, missing / shrink

    if missing.max() > border - 4:  # the frame itself comes near the photo's border
        pad = np.maximum(np.ceil(missing), round(0.3 * side)).astype(int)
        part, quad = _extend(part, pad, side), quad + pad[:2]
    fine = size * max(1, int(np.ceil(side / size)))  # no coarser than the photo, so that nothing aliases
    across, down = (quad[3] - quad[0]) / fine, (quad[1] - quad[0]) / fine
    mapping = (across[0], down[0], quad[0, 0], across[1], down[1], quad[0, 1])
    return Image.fromarray(to_bytes(resample(part, (fine, fine), mapping, fine // size)))


def resample(image: Image.Image, size, mapping, reduce=1) -> np.ndarray:
    """float32 [H, W(, 3)]: affine, then averaged over blocks of `reduce` pixels. Pillow's transforms cut fractions off
    bytes, and the bicubic one (a = -1) bends gradients by up to 0.1 pixel; its resize does neither. So that
    enlarges first (by an odd factor where nothing is averaged: pixels stay), then the bilinear transform will do."""
    enlarge = {1: 3, 2: 2}.get(reduce, 1)
    mapping = [enlarge * value for value in mapping]
    planes = []
    for plane in image.split():
        plane = plane.convert("F")
        if enlarge > 1:
            plane = plane.resize((enlarge * plane.width, enlarge * plane.height), Image.Resampling.BICUBIC)
        plane = plane.transform(size, Image.Transform.AFFINE, mapping, Image.Resampling.BILINEAR)
        planes.append(np.asarray(plane.reduce(reduce) if reduce > 1 else plane))
    return planes[0] if len(planes) == 1 else np.stack(planes, axis=-1)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _extend(part: Image.Image, pad, side: float) -> Image.Image:
    """Mirror the image over its borders by `pad` (left, top, right, bottom) pixels, and blur it towards the outside,
    down to its median colour: the recipe and constants of FFHQ."""
    left, top, right, bottom = (int(v) for v in pad)
    mirrored = np.pad(np.asarray(part), ((top, bottom), (left, right), (0, 0)), "reflect")
    height, width = mirrored.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    # outside: 1 at the outer edge, 0 at the photo's border, negative inside
    inside = np.minimum(np.minimum(x / left, (width - 1 - x) / right), np.minimum(y / top, (height - 1 - y) / bottom))
    outside = 1 - inside[..., None]
    blurred = np.asarray(Image.fromarray(mirrored).filter(ImageFilter.GaussianBlur(0.02 * side)), np.float32)
    pixels = mirrored + (blurred - mirrored) * np.clip(3 * outside + 1, 0, 1)
    pixels += (np.median(pixels, axis=(0, 1)) - pixels) * np.clip(outside, 0, 1)
    return Image.fromarray(to_bytes(pixels))
