"""Checkpoints from one program to another: NVIDIA's network pickles, rosinality's, TransStyleGAN's and our own.

IN is a pickle (.pkl) of NVlabs/stylegan2-ada-pytorch or NVlabs/stylegan3 (config stylegan2, no labels), read without
running anything in it, or a checkpoint (.pt) or exported generator (.safetensors) that the other scripts read. OUT.pt
holds `g_ema`, and `g`, `d`, `latent_avg` where IN has them, under rosinality's tensor names, with the config;
OUT.safetensors the EMA generator alone. At the end the file is read again, and draws an image.

    python convert.py ffhq.pkl ffhq.pt
    python convert.py runs/faces/checkpoint/100000.pt faces.safetensors --half
    python convert.py faces.safetensors faces-with-settings.safetensors --recommended settings.json

OUT.safetensors also stores the mean and the standard deviation of the latents, so that no script computes them again.
An exported generator keeps its number format and therefore its fingerprint, its step and its settings. settings.json
names flags per script, {"projector": {"step": 300, "lr": 0.5}, "generate": {"truncation": 0.7}}: the scripts use them
where no flag is given.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.export import discriminator_file
from common.images import save_image, to_uint8
from interop.export import export_generator, read_source, write_checkpoint
from model import load_generator


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", help="NVIDIA's .pkl, a checkpoint .pt, or a generator .safetensors")
    parser.add_argument("target", metavar="OUT", help="what to write: .pt (rosinality's layout) or .safetensors (EMA)")
    export = parser.add_argument_group("for OUT.safetensors")
    export.add_argument("--half", action="store_true", help="16 bits: half the file, a fingerprint of its own")
    export.add_argument(
        "--recommended",
        metavar="FILE.json",
        help="settings to store: per script, flag names and values (default: those of IN)",
    )
    export.add_argument(
        "--with_d",
        action="store_true",
        help="write the discriminator too (OUT-d.safetensors), with which train.py --init_from continues",
    )
    export.add_argument(
        "--base",
        metavar="FILE",
        help="an export in the same folder, whose equal tensors are left out: for a --light conditional generator that "
        "was made from it",
    )
    check = parser.add_argument_group("the image drawn as a check")
    check.add_argument("--seed", type=int, default=0, help="its seed; z is what NVIDIA's scripts draw for it")
    check.add_argument("--image", metavar="FILE", help="keep it, to compare with the other program's")
    parser.add_hidden_alias("--picture", "--image")
    return parser


@torch.no_grad()
def check(path: Path, held: str, seed: int, image_path: str | None) -> None:
    """Read the file again, draw an image with it and print what it is. Raises UserError when it is not finite.

    z is numpy's RandomState(seed).randn, as in NVIDIA's scripts: their `--seeds=0 --trunc=1 --noise-mode=const`.
    """
    generator = load_generator(path)
    config = generator.config
    z = torch.from_numpy(np.random.RandomState(seed).randn(*generator.draw_z(1).shape)).float()
    image, _ = generator(z, randomize_noise=False)
    if not torch.isfinite(image).all():
        raise UserError(f"{path} was written, but the image it draws is not finite: diverged weights?")
    pixels = to_uint8(image)[0]
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
    print(
        f"{path}: {config.space} generator, {config.size} px, {config.n_mlp} mapping layers, fingerprint "
        f"{generator.fingerprint}; holds {held}\ncheck: seed {seed} with the stored noise: mean {image.mean():.4f}, "
        f"std {image.std():.4f}, pixels sha256 {digest}"
    )
    if image_path:
        print(f"{save_image(pixels, image_path)}: that image")


def check_flags(args, source: Path, target: Path) -> None:
    """Raise UsageError for flags that do not fit the files."""
    if target.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"{target}: expected a name that ends with .pt or .safetensors")
    for flag in ("half", "recommended", "with_d", "base"):
        if getattr(args, flag) and target.suffix != ".safetensors":
            raise UsageError(f"--{flag} is for .safetensors, not for {target}")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed takes 0 to {2**32 - 1}, got {args.seed}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target}: IN and OUT are the same file")


def main(args) -> int:
    source, target = Path(args.source), Path(args.target)
    check_flags(args, source, target)
    if target.suffix == ".safetensors":
        options = {"half": args.half, "base": args.base, "with_d": args.with_d, "recommended": args.recommended}
        (_, notes), held = export_generator(source, target, **options), "g_ema"
    else:
        state, notes = read_source(source)
        write_checkpoint(target, state)
        held = ", ".join(name for name in ("g_ema", "g", "d", "latent_avg") if name in state)
    if args.with_d:
        held += f", beside it the discriminator: {discriminator_file(target)}"
    check(target, held, args.seed, args.image)
    for note in notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
