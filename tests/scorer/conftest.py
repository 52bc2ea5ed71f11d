"""Fixtures of the tests of scorers."""

import random
import signal

import pytest
from PIL import Image, ImageDraw
from scorers import write_csv

from common.cli import STOPPING


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """160 tiny faces whose open mouth is drawn, whose `size` column is that of the head, with holes in the labels."""
    folder, draw = tmp_path_factory.mktemp("planted ü"), random.Random(0)
    rows = []
    for i in range(160):
        open_mouth, head = i % 2, draw.uniform(8, 14)
        image = Image.new("RGB", (32, 32), tuple(draw.randint(0, 255) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        pen.ellipse((16 - head, 16 - head, 16 + head, 16 + head), fill=tuple(draw.randint(120, 255) for _ in range(3)))
        pen.ellipse((12, 19, 20, 26) if open_mouth else (12, 22, 20, 23), fill=(20, 0, 0))
        image.save(folder / f"{i:03d} ü.png")
        rows.append([f"{i:03d} ü.png", "" if i % 5 == 0 else open_mouth, "" if i % 7 == 0 else f"{head:.2f}", i // 2])
    write_csv(folder / "labels.csv", ["file", "mouth_open", "size", "identity"], *rows)
    return folder


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {name: signal.getsignal(name) for name in STOPPING}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)
