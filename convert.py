"""Checkpoints from one program to another: NVIDIA's network pickles, rosinality's, TransStyleGAN's and our own.

IN is a pickle (.pkl) of NVlabs/stylegan2-ada-pytorch or NVlabs/stylegan3 (config stylegan2, no labels), read without
running anything in it, or a checkpoint (.pt) or exported generator (.safetensors) that the other scripts read. OUT.pt
holds `g_ema`, and `g`, `d`, `latent_avg` where IN has them, under rosinality's tensor names, with the config;
OUT.safetensors the EMA generator alone. At the end the file is read again, and draws a picture.

    python convert.py ffhq.pkl ffhq.pt
    python convert.py ffhq.pkl ffhq.safetensors --half
    python convert.py 550000.pt ffhq.safetensors
    python convert.py face.safetensors face-with-settings.safetensors --recommended settings.json

An exported generator keeps its number format and therefore its fingerprint, its step and its settings; the mean and the
standard deviation of its latents are computed once and stored with it. settings.json names flags per script, such as
{"projector": {"step": 300, "lr": 0.5}, "generate": {"truncation": 0.7}}: the scripts use them where no flag is given.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_strictly, save_checkpoint
from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.export import export_ema
from common.images import save_image, to_uint8
from interop.nvidia import differences, discriminator_tensors, generator_tensors, mean_latent
from interop.nvidia_pickle import read_networks
from model import Discriminator, Generator, GeneratorConfig, load_generator, read_generator

PICKLES = (".pkl", ".pickle")
SAMPLES = 10_000  # behind the stored statistics of w
KEPT = ("step", "condition", "noise", "recommended")  # of the header of IN


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", help="NVIDIA's .pkl, a checkpoint .pt, or a generator .safetensors")
    parser.add_argument("target", metavar="OUT", help="what to write: .pt (rosinality's layout) or .safetensors (EMA)")
    parser.add_argument(
        "--half", action="store_true", help="OUT.safetensors in 16 bits: half the file, a fingerprint of its own"
    )
    parser.add_argument(
        "--recommended",
        metavar="FILE.json",
        help="settings to store in OUT.safetensors: per script, flag names and values (default: those of IN)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the picture drawn as a check; z is what NVIDIA's scripts draw for it"
    )
    parser.add_argument("--picture", metavar="FILE", help="keep that picture, to compare with the other program's")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_source(path: Path, *, alone: bool) -> tuple[dict, list[str]]:
    """What a checkpoint of ours holds (g_ema, config; g, d, latent_avg, step, condition where IN has them), and
    sentences on what will differ. alone: the EMA generator is all that is wanted."""
    if path.suffix.lower() in PICKLES:
        return read_pickle(path, alone=alone)
    weights, config, known = read_generator(path)
    load_generator(path)  # refuses what does not fit or is damaged
    weights = weights if alone else {name: tensor.float() for name, tensor in weights.items()}
    state = {"g_ema": weights, "config": config.to_dict()}
    state |= {name: known[name] for name in KEPT if known.get(name) is not None}
    state |= {"noise": noise} if (noise := known.get("options", {}).get("noise")) else {}
    if path.suffix != ".safetensors" and not alone:
        for name in ("g", "d"):
            if name in known:
                state[name] = {key: value.float() for key, value in known[name].items()}
        if isinstance(known.get("latent_avg"), torch.Tensor):
            state["latent_avg"] = known["latent_avg"].float()
    return state, []


def read_pickle(path: Path, *, alone: bool) -> tuple[dict, list[str]]:
    networks = read_networks(path)
    if "G_ema" not in networks:
        raise UserError(f"{path} has no G_ema, the averaged generator: found {', '.join(networks)}")
    average = networks["G_ema"]
    g_ema, config = generator_tensors(average, f"{path}: G_ema")
    state = {"g_ema": g_ema, "config": config.to_dict()}
    notes = [f"G_ema: {note}" for note in differences(average)]
    if alone:
        return state, notes
    if (mean := mean_latent(average)) is not None:
        state["latent_avg"] = mean
    if "G" in networks:
        state["g"], _ = generator_tensors(networks["G"], f"{path}: G")
    if "D" in networks:
        state["d"] = discriminator_tensors(networks["D"], config, f"{path}: D")
        notes += [f"D: {note}" for note in differences(networks["D"])]
    return state, notes


# ---------------------------------------------------------------------------------------------------------------------
# Writing and checking


def write_checkpoint(path: Path, state: dict) -> None:
    """OUT.pt. A W generator goes without our `token` buffer, which rosinality's strict load does not know."""
    config = GeneratorConfig.from_dict(state["config"])
    networks = {"g": Generator, "g_ema": Generator, "d": Discriminator}
    written = dict(state)
    for name in networks.keys() & state.keys():
        network = networks[name](config)
        weights = {"token": network.token, **state[name]} if isinstance(network, Generator) else state[name]
        load_strictly(network, weights, name)
        written[name] = {k: v for k, v in weights.items() if not (config.w_space and k == "token")}
    save_checkpoint(path, written)


@torch.no_grad()
def draw(generator: Generator, seed: int) -> tuple[torch.Tensor, float]:
    """The picture of a seed, [1, 3, S, S], with the stored noise, and the largest activation on the way to it.

    z is numpy's RandomState(seed).randn, as in NVIDIA's scripts: their `--seeds=0 --trunc=1 --noise-mode=const`.
    """
    largest = []
    layers = [generator.conv1, *generator.convs]
    hooks = [layer.register_forward_hook(lambda _, __, out: largest.append(float(out.abs().max()))) for layer in layers]
    shape = generator.draw_z(1).shape
    z = torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()
    image, _ = generator(z, randomize_noise=False)
    for hook in hooks:
        hook.remove()
    return image, max(largest)


@torch.no_grad()
def latent_statistics(state: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean [1, L, style_dim] and standard deviation [L] of w, and the number of samples."""
    generator = Generator(GeneratorConfig.from_dict(state["config"]))
    load_strictly(generator, {name: tensor.float() for name, tensor in state["g_ema"].items()}, "g_ema")
    return *generator.latent_statistics(SAMPLES), SAMPLES


def read_settings(path: str) -> dict:
    """The table {script: {flag: value}} of a JSON file. Raises UserError for another shape."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file ({error})") from None
    if not isinstance(settings, dict) or not all(isinstance(flags, dict) for flags in settings.values()):
        raise UserError(f'{path}: expected flags per script, such as {{"projector": {{"step": 300}}}}')
    return settings


def check(path: Path, state: dict, seed: int, picture: str | None) -> None:
    """Read the file again, draw a picture with it and print what it is. Raises UserError when it is not finite."""
    generator = load_generator(path)
    config = generator.config
    image, largest = draw(generator, seed)
    if not torch.isfinite(image).all():
        raise UserError(f"{path} was written, but the picture it draws is not finite: diverged weights?")
    pixels = to_uint8(image)[0]
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
    held = ", ".join(name for name in ("g_ema", "g", "d", "latent_avg") if name in state)
    print(
        f"{path}: {config.space} generator, {config.size} px, {config.n_mlp} mapping layers, fingerprint "
        f"{generator.fingerprint}; holds {held}"
    )
    print(
        f"check: seed {seed} with the stored noise: mean {image.mean():.4f}, std {image.std():.4f}, largest "
        f"activation {largest:.1f}, pixels sha256 {digest}"
    )
    if picture:
        print(f"{save_image(pixels, picture)}: that picture")


def read_options(args) -> tuple[Path, Path]:
    source, target = Path(args.source), Path(args.target)
    if target.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"{target}: expected a name that ends with .pt or .safetensors")
    if args.half and target.suffix != ".safetensors":
        raise UsageError(f"--half is for .safetensors, not for {target}")
    if args.recommended and target.suffix != ".safetensors":
        raise UsageError(f"--recommended is for .safetensors, not for {target}")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed takes 0 to {2**32 - 1}, got {args.seed}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target}: IN and OUT are the same file")
    return source, target


def main(args) -> int:
    source, target = read_options(args)
    alone = target.suffix == ".safetensors"
    state, notes = read_source(source, alone=alone)
    if alone:
        recommended = state.get("recommended") if args.recommended is None else read_settings(args.recommended)
        export_ema(state, target, half=args.half, recommended=recommended, statistics=latent_statistics(state))
    else:
        write_checkpoint(target, state)
    check(target, state, args.seed, args.picture)
    for note in notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
