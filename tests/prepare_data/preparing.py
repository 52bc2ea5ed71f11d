"""prepare_data.py from a test: its command, and what it wrote."""

import json
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

import prepare_data
from common.cli import run
from common.images import read_image

ROOT = Path(prepare_data.__file__).parent


def noise(seed, width=40, height=40):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def command(*args):
    return run(prepare_data.main, prepare_data.build_parser(), [str(arg) for arg in args])


def contents(folder):
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def decoded(folder, size, index):
    return np.asarray(read_image(contents(folder)[f"{size}-{index:05d}".encode()]))


def manifest(folder):
    return json.loads(contents(folder)[b"manifest"])
