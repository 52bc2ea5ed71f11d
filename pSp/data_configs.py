"""Data of an encoder: the published data-set types, where their images lie, and how the source image differs from the
target that the encoder shall reproduce.

Paths are looked for in this order: the flag of pSp/scripts/train.py, the environment variable, the table below.

    ffhq_encode               source = target; trained on FFHQ, validated on CelebA-HQ's test images
    ffhq_frontalize           source and target mirrored independently
    celebs_super_resolution   source = target shrunk by a random factor of --resize_factors, and enlarged again
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common.cli import Flags, UserError

# name: (environment variable, folder of images or LMDB; fill in your own)
PATHS = {
    "ffhq": ("WPP_FFHQ", ""),
    "celeba_train": ("WPP_CELEBA_TRAIN", ""),
    "celeba_test": ("WPP_CELEBA_TEST", ""),
    "stylegan_weights": ("WPP_STYLEGAN", ""),
}
BUNDLED_GENERATOR = Path(__file__).resolve().parents[1] / "checkpoints" / "face-wpp-64.safetensors"
RESIZE_FACTORS = (1, 2, 4, 8, 16, 32)  # of super-resolution, when --resize_factors gives none


@dataclass(frozen=True)
class DatasetType:
    train: str  # names in PATHS
    test: str
    source: str  # same | mirrored | shrunk


DATASETS = {
    "ffhq_encode": DatasetType("ffhq", "celeba_test", "same"),
    "ffhq_frontalize": DatasetType("ffhq", "celeba_test", "mirrored"),
    "celebs_super_resolution": DatasetType("celeba_train", "celeba_test", "shrunk"),
}
NEEDS_LABELS = ("celebs_sketch_to_face", "celebs_seg_to_face")


def dataset_type(name: str) -> DatasetType:
    """Raises UserError for a type that does not exist, or that needs label maps."""
    if name in NEEDS_LABELS:
        raise UserError(
            f"--dataset_type {name} is not supported: sketches and segmentation maps need paired label "
            f"images; supported are {', '.join(DATASETS)}"
        )
    if name not in DATASETS:
        raise UserError(f"--dataset_type {name}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def find_path(given: str | None, name: str) -> str | None:
    """The flag's value, else the environment variable's, else the table's; None when all are empty."""
    variable, default = PATHS[name]
    return given or os.environ.get(variable) or default or None


def training_path(given: str | None, name: str) -> str:
    """Path of the training images. Raises UserError naming the three places where it may be given."""
    path = find_path(given, DATASETS[name].train)
    if path is None:
        variable = PATHS[DATASETS[name].train][0]
        raise UserError(
            f"--dataset_type {name}: where are its images? pass --train_path FOLDER|LMDB, set ${variable}, "
            "or fill in PATHS in pSp/data_configs.py"
        )
    return path


def generator_path(given: str | None, exp_dir: str | Path) -> Path:
    """The generator to invert into: the flag, $WPP_STYLEGAN, the table, generator.{safetensors,pt} in --exp_dir, or the
    bundled one.

    Raises UserError naming these places when it is in none.
    """
    path = find_path(given, "stylegan_weights")
    if path is not None:
        return Path(path)
    inside = [Path(exp_dir) / f"generator{suffix}" for suffix in (".safetensors", ".pt")]
    for candidate in (*inside, BUNDLED_GENERATOR):
        if candidate.is_file():
            return candidate
    raise UserError(
        "which generator? pass --stylegan_weights FILE (a checkpoint of train.py, an export or a published "
        f"one), set $WPP_STYLEGAN, or put it at {inside[0]}"
    )


def add_preset_flag(parser) -> None:
    help = "the paper's settings, whatever the generator's file recommends"
    parser.add_argument("--preset", choices=("published",), help=help)


def fill_recommended(args: Flags, generator, path) -> str:
    """Set the flags that were not given to what the generator's file recommends for its encoder.

    Returns a sentence that names them; "" when nothing changed, or with --preset published.
    """
    changed = {} if args.preset else args.fill(generator.recommended.get("encoder", {}))
    flags = " ".join(f"--{name} {value}" for name, value in changed.items())
    return f"{path} recommends {flags} (--preset published: the paper's settings)" if flags else ""


def resize_factors(text: str | None) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4); None -> the published list. UserError for what is no list of numbers from 1."""
    if text is None:
        return RESIZE_FACTORS
    try:
        factors = tuple(int(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or min(factors) < 1:
        raise UserError(f"--resize_factors {text}: expected whole numbers from 1, such as 4 or 2,4,8")
    return factors


# ---------------------------------------------------------------------------------------------------------------------
# From target to source


def normalise(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 [N, 3, S, S] -> float32 in [-1, 1] on the device."""
    return images.to(device).float().div_(127.5).sub_(1)


def mirror(images: torch.Tensor) -> torch.Tensor:
    """Each image mirrored with probability one half, drawn from the global generator."""
    chosen = torch.rand(images.shape[0], 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


def make_pair(images: torch.Tensor, kind: str, *, factors=RESIZE_FACTORS, training: bool):
    """Source and target [N, 3, S, S] from images in [-1, 1]; the very same tensor where they do not differ.

    Training mirrors at random and draws the factors; otherwise nothing is mirrored and factors are taken in turn.
    """
    target = mirror(images) if training else images
    if kind == "same":
        return target, target
    if kind == "mirrored":
        return (mirror(images) if training else images.flip(3)), target
    n = len(images)
    chosen = torch.randint(len(factors), (n,)).tolist() if training else [i % len(factors) for i in range(n)]
    return torch.cat([shrink(target[i : i + 1], factors[k]) for i, k in enumerate(chosen)]), target


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Shrunk bicubically with antialiasing to 1/factor of its side (at least 1 px), enlarged again bilinearly."""
    if factor == 1:
        return images
    side = images.shape[-1]
    small = F.interpolate(images, size=(max(1, side // factor),) * 2, mode="bicubic", antialias=True)
    return F.interpolate(small.clamp(-1, 1), size=(side, side), mode="bilinear", align_corners=False)
