"""Fixtures of the alignment's tests: a photo with a face, and the detector."""

import json

import pytest
from PIL import Image
from points import ASTRONAUT

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


@pytest.fixture
def photos(tmp_path, astronaut, no_detector):
    """Photos as they come. Faces are given by hand, so that no weights are needed."""
    folder = tmp_path / "pho tos"
    for name in ("ü 中文.jpg", "a b/two  spaces.PNG", "same.png", "same.jpg", "a b/same.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        astronaut.save(path)
        path.with_suffix(".json").write_text(json.dumps({"landmarks": ASTRONAUT.tolist()}), encoding="utf-8")
    Image.new("RGB", (60, 50)).save(folder / "nobody.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    astronaut.save(folder / "wrong order.png")
    wrong = {"landmarks": ASTRONAUT[[1, 0, 2, 4, 3]].tolist()}
    (folder / "wrong order.json").write_text(json.dumps(wrong), encoding="utf-8")
    astronaut.save(folder / "other program.png")
    (folder / "other program.json").write_text('{"title": "holiday"}', encoding="utf-8")
    return folder
