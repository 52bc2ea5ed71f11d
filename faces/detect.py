"""Face detection by YuNet (Wu et al. 2023) in OpenCV: boxes and five landmarks, coordinates as in faces/align.py."""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from common.weights import require

GREY = (128, 128, 128)  # beyond the borders of a photo


class DetectorError(ValueError):
    """The detector cannot take a photo."""


@dataclass(frozen=True)
class Detection:
    """A face in a photo: landmarks [5, 2], box (left, top, width, height) in pixels; score 0..1."""

    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    score: float


class FaceDetector:
    """YuNet, with landmarks refined: found in the whole photo, then measured again on the face alone. For one thread at
    a time. Raises FileNotFoundError without the weights."""

    PASSES = (640, 1600, 320)  # longer side that the photo is scaled to; the next only when nothing was found
    MANY_PASSES = (640, 1600)
    # Refinement: the square of twice the box at these sizes, each also mirrored; the mean of the four. On FFHQ and
    # CelebA-HQ one look misses the rotation by 2.5 degrees (standard deviation), the four by 2.05.
    WINDOWS = (224, 320)
    UPRIGHT = 5.0  # degrees: YuNet underestimates a larger lean (45 by 21), so that a turned window is searched
    OVERLAP = 0.4  # intersection over union from which two detections are one face
    SCORE = 0.6  # from which a detection counts

    def __init__(self, weights_dir=None):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns about a target nobody set
        model = require("yunet_640", weights_dir).read_bytes()  # bytes: OpenCV cannot open every path on every system
        buffer, empty = np.frombuffer(model, np.uint8), np.empty(0, np.uint8)
        self.net = cv2.FaceDetectorYN.create("onnx", buffer, empty, (320, 320), self.SCORE, 0.3, 5000)

    def detect(self, photo: Image.Image, *, many: bool = False) -> list[Detection]:
        """The faces in a photo (PIL, RGB), largest first. many: look for small ones in large photos as well."""
        photo = photo.convert("RGB")
        found, longer = [], max(photo.size)
        for side in self.MANY_PASSES if many else self.PASSES:
            if side > 640 and side > longer:
                continue  # nothing is gained by enlarging that much
            margin = 0.25 if side < 640 else 0.0  # a face that fills the photo needs space around it
            span = np.array(photo.size) * (1 + 2 * margin)
            size = np.round(np.maximum(span * side / longer, 16)).astype(int)
            found += self._look(_window(photo, (np.array(photo.size) - 1) / 2, span, size))
            if found and not many:
                break
        unique: list[np.ndarray] = []
        for row in sorted(found, key=lambda row: (-row[14], *row[:4])):
            if all(_overlap(row[:4], other[:4]) < self.OVERLAP for other in unique):
                unique.append(row)
        faces: list[Detection] = []
        for face in (self._refine(photo, row) for row in unique):
            if not any(is_same_face(face.landmarks, other.landmarks) for other in faces):
                faces.append(face)
        return sorted(faces, key=lambda face: (-face.box[2] * face.box[3], face.box))

    def _look(self, window, mirrored=False) -> list[np.ndarray]:
        """Rows (box 4, landmarks 10, score) of the faces in a window, in pixels of the photo."""
        pixels = window.pixels[:, ::-1] if mirrored else window.pixels
        height, width = pixels.shape[:2]
        try:
            self.net.setInputSize((width, height))
            _, rows = self.net.detect(np.ascontiguousarray(pixels[:, :, ::-1]))  # OpenCV's order is B, G, R
        except cv2.error as error:
            raise DetectorError(f"OpenCV's detector fails on {width}x{height} pixels: {error.err}") from error
        results = []
        for row in np.empty((0, 15)) if rows is None else rows.astype(np.float64):
            points = row[4:14].reshape(5, 2)
            if mirrored:
                row[0] = width - 1 - row[0] - row[2]
                points = (points * (-1, 1) + (width - 1, 0))[[1, 0, 2, 4, 3]]
            extent = row[2:4] * np.linalg.norm(window.matrix, axis=0)
            centre = window.to_photo(row[:2] + row[2:4] / 2)
            results.append(np.concatenate((centre - extent / 2, extent, window.to_photo(points).ravel(), row[14:])))
        return results

    def _refine(self, photo, row) -> Detection:
        landmarks, degrees = row[4:14].reshape(5, 2), 0.0
        for _ in range(2):
            looks = self._looks_at_face(photo, row[:4], degrees)
            if not looks:
                break
            landmarks = np.mean([look[4:14].reshape(5, 2) for look in looks], axis=0)
            if abs(_roll(landmarks) - degrees) <= self.UPRIGHT:
                break
            degrees = _roll(landmarks)
        return Detection(landmarks, tuple(float(v) for v in row[:4]), float(row[14]))

    def _looks_at_face(self, photo, box, degrees) -> list[np.ndarray]:
        """Rows of the face in `box` as seen in windows of several sizes, turned by `degrees`, each also mirrored."""
        looks, span = [], np.full(2, 2 * max(box[2:4]))
        for size in self.WINDOWS:
            window = _window(photo, box[:2] + box[2:4] / 2, span, (size, size), degrees)
            for mirrored in (False, True):
                best = max(self._look(window, mirrored), key=lambda other: _overlap(box, other[:4]), default=None)
                if best is not None and _overlap(box, best[:4]) >= self.OVERLAP:
                    looks.append(best)
        return looks


def is_same_face(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether landmarks [5, 2] have centres nearer to each other than eyes: parts of a large face look like faces."""
    eyes = max(np.linalg.norm(points[1] - points[0]) for points in (a, b))
    return bool(np.linalg.norm(a.mean(0) - b.mean(0)) < eyes)


@dataclass(frozen=True)
class _Window:
    """Pixels uint8 [H, W, 3] of a part of the photo, and where they lie: matrix (window + 1/2) + corner - 1/2."""

    pixels: np.ndarray
    matrix: np.ndarray
    corner: np.ndarray

    def to_photo(self, points):
        return (np.asarray(points) + 0.5) @ self.matrix.T + self.corner - 0.5


def _window(photo, middle, span, size, degrees=0.0) -> _Window:
    """View of the photo around `middle`, `span` wide in it and `size` pixels (width, height), turned so that what leans
    by `degrees` is upright; grey beyond the photo's borders."""
    cos, sin, size = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), np.asarray(size)
    matrix = np.array([[cos, -sin], [sin, cos]]) * (span / size)
    corner = middle + 0.5 - matrix @ (size / 2)
    shrink = max(1, int(np.min(span / size)))  # else the mapping would alias
    ((a, b), (c, d)), (x, y) = matrix / shrink, corner / shrink
    part = photo.reduce(shrink) if shrink > 1 else photo
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    view = part.transform(tuple(size.tolist()), affine, (a, b, x, c, d, y), bilinear, fillcolor=GREY)
    return _Window(np.asarray(view), matrix, corner)


def _roll(landmarks) -> float:
    """Roll of a face in degrees, clockwise in the image; from the eye line and the upright, as FFHQ's frame."""
    right_eye, left_eye, _, right_mouth, left_mouth = landmarks
    across, down = left_eye - right_eye, (right_mouth + left_mouth - right_eye - left_eye) / 2
    return float(np.degrees(np.arctan2(across[1] - down[0], across[0] + down[1])))


def _overlap(a, b) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:4], b[:2] + b[2:4])
    shared = float(np.prod(np.maximum(high - low, 0)))
    return shared / max(float(a[2] * a[3] + b[2] * b[3]) - shared, 1e-9)
