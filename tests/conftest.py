"""Fixtures shared by all tests: the root on sys.path, faces real and generated, a network small enough for one core."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WPP_DATA") or ROOT.parent / "shared" / "data")  # real faces and third-party weights
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WPP_WEIGHTS", str(DATA / "weights"))

TINY = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 8}
AWKWARD_NAMES = ("ü 中文.png", "a b/two  spaces.PNG")  # every path in the toolkit must survive these


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def real_faces() -> Path:
    """The folder of real 128 px faces beside the checkout, or below $WPP_DATA."""
    faces = DATA / "faces"
    if not faces.is_dir():
        pytest.skip(f"no real faces: {faces} is absent; set WPP_DATA to a folder that holds faces/*.jpg")
    return faces


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory) -> Path:
    """24 generated "faces" of 40x40: PNGs in a tree, with a Unicode name and one with spaces. No real data."""
    folder = tmp_path_factory.mktemp("faces")
    draw = random.Random(0)
    for i, name in enumerate([*AWKWARD_NAMES, *(f"face {i:02d}.png" for i in range(22))]):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        _draw_face(draw, i).save(path)
    return folder


def _draw_face(draw: random.Random, index: int):
    from PIL import Image, ImageDraw

    def colour(low, high):
        return tuple(draw.randint(low, high) for _ in range(3))

    image = Image.new("RGB", (40, 40), colour(40, 220))
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 4, 32, 37), fill=(draw.randint(140, 240), draw.randint(110, 190), draw.randint(90, 160)))
    for x in (15, 25):
        pen.ellipse((x - 2, 15, x + 2, 15 + draw.randint(1, 3)), fill=colour(0, 70))
    pen.arc((14, 22, 26, 30 + index % 3), 20, 160, fill=(160, 40, 50), width=2)
    return image


@pytest.fixture(scope="session")
def some_faces(face_folder, tmp_path_factory) -> Path:
    """A folder of 24 faces: real ones where there are any, else the generated ones."""
    files = sorted((DATA / "faces").glob("*.jpg"))[::850][:24]
    if len(files) < 24:
        return face_folder
    folder = tmp_path_factory.mktemp("some faces")
    for file in files:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def face_lmdb(some_faces, tmp_path_factory) -> Path:
    """An LMDB of `some_faces` at 8, 16 and 32 px, made by the command line of prepare_data.py."""
    import prepare_data
    from common.cli import run

    out = tmp_path_factory.mktemp("lmdb") / "faces ü.lmdb"
    flags = ["--out", str(out), "--size", "8,16,32", "--n_worker", "1", str(some_faces)]
    assert run(prepare_data.main, prepare_data.build_parser(), flags) == 0
    return out


@pytest.fixture
def tiny_config():
    """GeneratorConfig of a W++ network that a core trains in milliseconds."""
    from model import GeneratorConfig

    return GeneratorConfig(**TINY)


@pytest.fixture
def tiny_w_config():
    from model import GeneratorConfig

    return GeneratorConfig(**TINY, w_space=True)


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """`tiny_config` as flags of train.py."""
    return [part for name, value in TINY.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def undrawn(monkeypatch):
    """The loss curves of an inversion are an empty file: to draw them takes longer than a small inversion."""
    monkeypatch.setattr("inversion.report.plot_curves", lambda curves, every, path: path.touch())


@pytest.fixture
def store(tmp_path):
    """Seven images of 8 and 16 pixels in an LMDB of rosinality's."""
    from stores import rosinality_items, write_lmdb

    return write_lmdb(tmp_path / "ü 中文.lmdb", rosinality_items(), 7)
