"""Flags of the commands that compare images by features, and their settings; no torch, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import ArgumentParser, add_device_flags, count, finite, positive_int, several, whole
from common.flags import NOISES, add_fields, flag

IMAGES = "folder of images, LMDB, checkpoint, folder of latents, or features (.npz)"
NAMES = "inception, vgg16, squeeze, scorer; auto: Inception (VGG-16 for the paper's prdc), else a fallback"
PROTOCOLS = "images to extractor: paper (pytorch-fid), tf-compat (torch-fidelity, most papers), clean (clean-fid)"
SIZE = "pixels of the images; default: as they are, or those of the generated images"
CACHE = "folder of the feature cache, or none; default $WPP_CACHE, else ~/.cache/wpp/features"
LARGEST_SEED = 1999  # times 2 SEED_STRIDE (metrics/sources.py) are below 2^32, the seeds of PyTorch


@dataclass(frozen=True)
class FeatureSettings:
    """Computation of features: the extractor, the images, the machine."""

    extractor: str = flag("auto", NAMES, metavar="NAME")
    protocol: str = flag("tf-compat", PROTOCOLS, choices=("paper", "tf-compat", "clean"))
    n_sample: int = flag(50_000, "images of each side; all there are, when fewer", type=positive_int)
    size: int | None = flag(None, SIZE, type=positive_int)
    batch: int = flag(64, "images per forward pass and process", type=positive_int)
    workers: int = flag(2, "threads that decode images; 0: one", type=count)
    weights_dir: str | None = flag(None, "folder with the extractor's weights, looked into first", type=str)
    cache_dir: str | None = flag(None, CACHE, type=str)


@dataclass(frozen=True)
class Sampling:
    """Draw of generated images; a source of files has no use for it."""

    truncation: float = 1.0
    truncation_mean: int = flag(10_000, "samples for the mean of w")
    noise: str = flag("random", "drawn for each image, the stored maps, or none", choices=NOISES)
    seed: int = flag(0, "seed of the images", type=whole(0, LARGEST_SEED))


@dataclass(frozen=True)
class PathSettings:
    """Measurement of path lengths."""

    sampling: str = flag("full", "pairs anywhere on the path, or at its start", choices=("full", "end"))
    epsilon: float = flag(1e-4, "step, as a share of the path")
    crop: bool = flag(False, "compare the centre of the face only, as for FFHQ")
    n_sample: int = flag(50_000, "pairs", type=positive_int)
    batch: int = flag(16, "pairs per forward pass and process", type=positive_int)
    seed: int = flag(0, "seed of the latents", type=whole(0, LARGEST_SEED))


def add_feature_flags(parser: ArgumentParser) -> None:
    """Flags of everything that extracts features: the extractor, the generated images, the device."""
    add_fields(parser.add_argument_group("features"), FeatureSettings)
    group = parser.add_argument_group("generated images")
    psi = "w = mean + psi (w - mean); several values: a sweep"
    group.add_argument("--truncation", type=several(finite), default="1", metavar="PSI[,PSI...]", help=psi)
    add_fields(group, Sampling)
    add_device_flags(parser)


def comparison_parser(description: str) -> ArgumentParser:
    """Parser of fid.py and prdc.py."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--real", "--dataset", "--inception", required=True, help=IMAGES)
    add("--fake", help="like --real, or a folder of checkpoints: each of them (default: ./checkpoint)")
    add("--ckpt", help="another name of --fake; with a --fake of latents: their generator")
    add("--start_num", type=int, default=0, help="first step of a folder of checkpoints")
    add("--output", type=Path, help="file to add results to; default: metrics.jsonl of the checkpoint's run, else here")
    add_feature_flags(parser)
    return parser
