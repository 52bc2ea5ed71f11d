"""Flags of the commands that compare images by features; no torch, so that `--help` is quick."""

import math
from pathlib import Path

from common.cli import ArgumentParser, add_device_flags

IMAGES = "folder of images, LMDB, checkpoint, folder of latents, or features (.npz)"


def numbers(text: str) -> list[float]:
    """A `type` for flags: finite numbers with commas between."""
    values = [float(part) for part in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise ValueError
    return values


def add_feature_flags(parser: ArgumentParser) -> None:
    """Flags of everything that extracts features: the extractor, the generated images, the device."""
    add = parser.add_argument_group("features").add_argument
    names = "inception, vgg16, squeeze, scorer; auto: Inception (paper's precision and recall: VGG-16), else a fallback"
    add("--extractor", default="auto", metavar="NAME", help=names)
    protocols = "images to extractor: paper (pytorch-fid), tf-compat (torch-fidelity, most papers), clean (clean-fid)"
    add("--protocol", choices=("paper", "tf-compat", "clean"), default="tf-compat", help=protocols)
    add("--n_sample", type=int, default=50_000, help="images of each side; all there are, when fewer")
    add("--size", type=int, help="pixels of the images; default: as they are, or those of the generated images")
    add("--batch", type=int, default=64, help="images per forward pass and process")
    add("--workers", type=int, default=2, help="threads that decode images")
    add("--weights_dir", help="folder with the extractor's weights, looked into first")
    add("--cache_dir", help="folder of the feature cache, or none; default $WPP_CACHE, else ~/.cache/wpp/features")

    add = parser.add_argument_group("generated images").add_argument
    add(
        "--truncation",
        type=numbers,
        default="1",
        metavar="PSI[,PSI...]",
        help="w = mean + psi (w - mean); several values: a sweep",
    )
    add("--truncation_mean", type=int, default=10_000, help="samples for the mean of w")
    add("--noise", default="random", help="random (drawn for each image), const (the stored maps), none")
    add("--seed", type=int, default=0, help="seed of the images")
    add_device_flags(parser)


def comparison_parser(description: str) -> ArgumentParser:
    """Parser of fid.py and prdc.py; its flags are the settings of `metrics.evaluation.compare`."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--real", "--dataset", "--inception", required=True, help=IMAGES)
    add("--fake", help="like --real, or a folder of checkpoints: each of them (default: ./checkpoint)")
    add("--ckpt", help="another name of --fake; with a --fake of latents: their generator")
    add("--start_num", type=int, default=0, help="first step of a folder of checkpoints")
    add("--output", type=Path, help="file to add results to; default: metrics.jsonl of the checkpoint's run, else here")
    add_feature_flags(parser)
    return parser
