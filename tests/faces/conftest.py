"""Fixtures of the alignment's tests: a photo with a face, and the detector."""

import pytest
from PIL import Image

import common.weights
import faces.folder


@pytest.fixture(scope="module")
def astronaut():
    data = pytest.importorskip("skimage.data", reason="scikit-image (requirements.txt) brings the test photo")
    return Image.fromarray(data.astronaut())


@pytest.fixture(scope="module")
def detector():
    if common.weights.find("yunet_640") is None:
        pytest.skip("no YuNet weights: python -m common.weights get yunet_640")
    pytest.importorskip("cv2", reason="OpenCV (requirements.txt) runs the detector")
    from faces.detect import FaceDetector

    return FaceDetector()


class NoDetector:
    """In place of YuNet where every face is given by hand: sees nothing, needs no weights."""

    def __init__(self, weights_dir=None):
        pass

    def detect(self, photo, *, many=False):
        return []


@pytest.fixture
def no_detector(monkeypatch):
    monkeypatch.setattr(faces.folder, "FaceDetector", NoDetector)
    faces.folder._detector.cache_clear()
    yield
    faces.folder._detector.cache_clear()  # other tests shall not meet this replacement
