"""Data of an encoder: the published data-set types, and where their images lie.

Paths are looked for in this order: the flag of pSp/scripts/train.py, the environment ($WPP_FFHQ ...), the table below.

    ffhq_encode               source = target; trained on FFHQ, validated on CelebA-HQ's test images
    ffhq_frontalize           source and target mirrored independently
    celebs_super_resolution   source = target shrunk by a random factor of --resize_factors, and enlarged again
"""

import os
from pathlib import Path
from typing import NamedTuple

from common.cli import ROOT, UserError

# Folders of images or LMDBs, and a generator: fill in your own
PATHS = {"ffhq": "", "celeba_train": "", "celeba_test": "", "stylegan": ""}
BUNDLED_GENERATOR = ROOT / "checkpoints" / "face-wpp-128.safetensors"


class DatasetType(NamedTuple):
    train: str  # names in PATHS
    test: str
    source: str  # same | mirrored | shrunk


DATASETS = {
    "ffhq_encode": DatasetType("ffhq", "celeba_test", "same"),
    "ffhq_frontalize": DatasetType("ffhq", "celeba_test", "mirrored"),
    "celebs_super_resolution": DatasetType("celeba_train", "celeba_test", "shrunk"),
}


def find_path(given: str | None, name: str) -> str | None:
    """The flag's value, else that of $WPP_NAME, else the table's; None when all are empty."""
    return given or os.environ.get(f"WPP_{name.upper()}") or PATHS[name] or None


def training_path(given: str | None, name: str) -> str:
    """Path of the training images. Raises UserError naming the three places where it may be given."""
    source = DATASETS[name].train
    if path := find_path(given, source):
        return path
    ways = f"set $WPP_{source.upper()}, or fill in PATHS in pSp/data_configs.py"
    raise UserError(f"--dataset_type {name}: where are its images? pass --train_path FOLDER|LMDB, {ways}")


def generator_path(given: str | None, exp_dir: str | Path) -> Path:
    """The generator of a new run: the flag, $WPP_STYLEGAN, the table, generator.{safetensors,pt} in --exp_dir, or the
    bundled one."""
    if path := find_path(given, "stylegan"):
        return Path(path)
    inside = (Path(exp_dir) / f"generator{suffix}" for suffix in (".safetensors", ".pt"))
    return next((path for path in inside if path.is_file()), BUNDLED_GENERATOR)
