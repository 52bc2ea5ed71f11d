"""Where are the faces? YuNet (Wu et al. 2023) through OpenCV: boxes and five landmarks.

    faces = FaceDetector().detect(photo)                 # photo: PIL image, RGB; list of Face, largest first

Coordinates are pixels of the photo with pixel centres at whole numbers. Landmarks are in YuNet's order: right eye, left
eye, nose, right and left mouth corner, where right is the person's right, the picture's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from common.weights import find, require


class DetectorError(ValueError):
    """The detector cannot be built; the message is one sentence."""


@dataclass(frozen=True)
class Face:
    """landmarks [5, 2], box (left, top, width, height) in pixels; score 0..1."""

    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    score: float


class FaceDetector:
    """YuNet, with landmarks refined: found in the whole photo, then measured again on the face alone.

    score_threshold: below it a detection is no face. Not for several threads at once. Raises FileNotFoundError naming
    the weights when they are absent, DetectorError without OpenCV.
    """

    PASSES = (640, 1600, 320)  # longer side that the photo is scaled to; the next only when nothing was found
    MANY_PASSES = (640, 1600)
    # Refinement: the square of twice the box at these sizes, each also mirrored; the mean of the four. Measured on FFHQ
    # and CelebA-HQ, whose frames are known: one look at the photo misses the rotation by 2.5 degrees (mean of the two
    # sets' standard deviations) and leans 0.6 to one side; the four looks miss it by 2.05 and lean 0.25.
    WINDOWS = (224, 320)
    OVERLAP = 0.4  # intersection over union from which two detections are one face

    def __init__(self, weights_dir=None, *, score_threshold: float = 0.6):
        self.cv2 = _import_cv2()
        name = "yunet_640" if find("yunet_640", weights_dir) or not find("yunet_320", weights_dir) else "yunet_320"
        model = require(name, weights_dir).read_bytes()  # bytes: OpenCV cannot open every path on every system
        if len(model) < 1000:
            raise DetectorError(f"{name} holds only {len(model)} bytes")
        buffer, empty = np.frombuffer(model, np.uint8), np.empty(0, np.uint8)
        self.net = self.cv2.FaceDetectorYN.create("onnx", buffer, empty, (320, 320), score_threshold, 0.3, 5000)

    def detect(self, photo: Image.Image, *, many: bool = False) -> list[Face]:
        """The faces in a photo (PIL, RGB), largest first. many: look for small ones in large photos as well."""
        photo = photo.convert("RGB")
        found: list[np.ndarray] = []
        longer = max(photo.size)
        for side in self.MANY_PASSES if many else self.PASSES:
            if side > 640 and side > longer:
                continue  # nothing is gained by enlarging that much
            margin = 0.25 if side < 640 else 0.0  # a face that fills the photo needs space around it
            span = np.array(photo.size) * (1 + 2 * margin)
            found += self._look(photo, -margin * np.array(photo.size), span, np.maximum(span * side / longer, 16))
            if found and not many:
                break
        faces = [self._refine(photo, row) for row in self._unique(found)]
        return sorted(faces, key=lambda face: (-face.box[2] * face.box[3], face.box))

    def _look(self, photo, corner, span, size, mirrored=False) -> list[np.ndarray]:
        """Rows (box 4, landmarks 10, score) of the part of the photo at `corner`, `span` wide, scaled to `size`."""
        window, scale, offset = _window(photo, corner, span, np.round(size).astype(int))
        width = window.shape[1]
        if mirrored:
            window = window[:, ::-1]
        self.net.setInputSize((width, window.shape[0]))
        _, rows = self.net.detect(np.ascontiguousarray(window[:, :, ::-1]))  # OpenCV's order is B, G, R
        results = []
        for row in np.empty((0, 15)) if rows is None else rows.astype(np.float64):
            points = row[4:14].reshape(5, 2)
            if mirrored:
                row[0] = width - 1 - row[0] - row[2]
                points = (points * (-1, 1) + (width - 1, 0))[[1, 0, 2, 4, 3]]
            box = np.concatenate(((row[:2] + 0.5) / scale + offset - 0.5, row[2:4] / scale))
            results.append(np.concatenate((box, ((points + 0.5) / scale + offset - 0.5).ravel(), row[14:])))
        return results

    def _unique(self, rows) -> list[np.ndarray]:
        kept: list[np.ndarray] = []
        for row in sorted(rows, key=lambda row: (-row[14], *row[:4])):
            if all(_overlap(row[:4], other[:4]) < self.OVERLAP for other in kept):
                kept.append(row)
        return kept

    def _refine(self, photo, row) -> Face:
        box, span = row[:4], 2 * max(row[2:4])
        corner = box[:2] + (box[2:4] - span) / 2
        looks = []
        for size in self.WINDOWS:
            for mirrored in (False, True):
                seen = self._look(photo, corner, np.full(2, span), np.full(2, size), mirrored)
                best = max(seen, key=lambda other: _overlap(box, other[:4]), default=None)
                if best is not None and _overlap(box, best[:4]) >= self.OVERLAP:
                    looks.append(best[4:14].reshape(5, 2))
        landmarks = np.mean(looks, axis=0) if looks else row[4:14].reshape(5, 2)
        return Face(landmarks, tuple(float(v) for v in box), float(row[14]))


def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        raise DetectorError(f"finding faces needs OpenCV: pip install opencv-python-headless ({error})") from error
    cv2.setNumThreads(1)  # the photos are what is done in parallel
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns about a target nobody set
    return cv2


def _window(photo, corner, span, size):
    """A part of the photo scaled to `size` (width, height), grey beyond its borders, and the exact mapping.

    Returns uint8 [H, W, 3], and scale and offset with photo position = (window position + 0.5) / scale + offset - 0.5.
    """
    low = np.clip(np.floor(corner), 0, np.array(photo.size) - 1).astype(int)
    high = np.clip(np.ceil(corner + span), low + 1, photo.size).astype(int)
    scale = size / span
    inner = np.maximum(np.round((high - low) * scale), 1).astype(int)
    place = np.round((low - corner) * scale).astype(int)
    part = photo.resize(tuple(inner), Image.Resampling.BILINEAR, box=(*low, *high), reducing_gap=3.0)
    canvas = Image.new("RGB", tuple(int(v) for v in size), (128, 128, 128))
    canvas.paste(part, tuple(int(v) for v in place))
    scale = inner / (high - low)
    return np.asarray(canvas), scale, low - place / scale


def _overlap(a, b) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:4], b[:2] + b[2:4])
    shared = float(np.prod(np.maximum(high - low, 0)))
    return shared / max(float(a[2] * a[3] + b[2] * b[3]) - shared, 1e-9)
