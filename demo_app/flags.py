"""Flags of the models that edit photos, shared by edit_photos.py and demo.py."""

import argparse
import shlex
from pathlib import Path

QUALITY = {"fast": 0, "good": 20, "best": 60}  # steps of refinement after the encoder
MODELS = ("ckpt", "encoder", "boundaries", "conditional", "scorer", "perceptual", "weights_dir")  # of load_models


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags called MODELS."""
    add = parser.add_argument_group("models (default: those in checkpoints/)").add_argument
    add("--ckpt", type=Path, help="generator (default: the largest checkpoints/face-wpp-SIZE)")
    add("--encoder", type=Path, help="pSp encoder for it (default: the one in checkpoints/ that fits)")
    add("--boundaries", type=Path, help="folder of boundary files (.npz); what they move --conditional does not")
    add("--conditional", help="conditional generator, or none (default: face-cgan-SIZE)")
    add("--scorer", default="face-scorer-eval", help="reader of attributes: a name or FILE.safetensors")
    add("--perceptual", default="mobilefacenet", help="distance that tuning minimises: also vgg, alex, scorer:NAME ...")
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")


def model_flags(args: argparse.Namespace) -> dict:
    """Keyword arguments of demo_app.models.load_models."""
    return {name: getattr(args, name) for name in MODELS}


def given_model_flags(args: argparse.Namespace) -> str:
    """Flags of the models that stood on the command line, quoted for another one."""
    pairs = ((f"--{name}", str(getattr(args, name))) for name in MODELS if name in args.given)
    return shlex.join(word for pair in pairs for word in pair)
