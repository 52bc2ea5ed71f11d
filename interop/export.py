"""Checkpoints read, written and exported: what convert.py does, as functions.

state, notes = read_source(Path("ffhq.pkl"))
export_generator("ffhq.pkl", "ffhq.safetensors", half=True)
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_strictly, save_checkpoint
from common.cli import UserError
from common.files import read_json
from common.generator_file import export_discriminator, export_ema, provenance, read_generator, without_module
from common.images import save_image, to_uint8
from interop.nvidia import differences, discriminator_tensors, generator_tensors
from interop.nvidia_pickle import read_networks
from model import Discriminator, Generator, GeneratorConfig, load_generator

SAMPLES = 10_000  # behind the stored statistics of w
KEPT = ("recommended", "vision_aided", "aid")  # of a source's metadata, beside its provenance
SETTINGS = {str: {str: (str, float, bool, None, list)}}  # per script, flag names and values


def read_source(path: Path, *, ema_only: bool = False) -> tuple[dict, list[str]]:
    """The state of a checkpoint, and sentences on what will differ: `g_ema`, `config`, and `g`, `d`, `aux_d`,
    `texture_d`, `part_d`, `ada`, `mean_path_length`, `latent_avg`, `recommended` and what `provenance` reads where
    the file has them. ema_only: the EMA generator alone, in its own number format (else float32). Raises
    FileNotFoundError, CheckpointError or UserError."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        return _read_pickle(path, ema_only)
    load_generator(path)  # refuses what does not fit or is damaged
    weights, config, file = read_generator(path)
    state = {"g_ema": weights, "config": config.to_dict(), **provenance(file)}
    state |= {name: file[name] for name in KEPT if file.get(name) is not None}
    if ema_only:
        return state, []
    state["g_ema"] = {name: tensor.float() for name, tensor in weights.items()}
    for network in ("g", "d", "aux_d", "texture_d", "part_d", "critic"):  # the last: aux_d in earlier versions
        if network in file and path.suffix != ".safetensors":
            state[network] = {name: tensor.float() for name, tensor in without_module(file[network]).items()}
    state |= {name: file[name] for name in ("ada", "mean_path_length") if name in file}
    if isinstance(file.get("latent_avg"), torch.Tensor):
        state["latent_avg"] = file["latent_avg"].float()
    return state, []


def _read_pickle(path: Path, ema_only: bool) -> tuple[dict, list[str]]:
    networks = read_networks(path)
    if "G_ema" not in networks:
        raise UserError(f"{path} has no G_ema, the averaged generator: found {', '.join(networks)}")
    average = networks["G_ema"]
    g_ema, config = generator_tensors(average, f"{path}: G_ema")
    state = {"g_ema": g_ema, "config": config.to_dict()}
    notes = [f"G_ema: {note}" for note in differences(average)]
    if ema_only:
        return state, notes
    if (mean := average.tensors.get("mapping.w_avg")) is not None:  # [w_dim], where NVIDIA truncates towards
        state["latent_avg"] = mean.float().clone()
    if "G" in networks:
        state["g"], _ = generator_tensors(networks["G"], f"{path}: G")
    if "D" in networks:
        state["d"] = discriminator_tensors(networks["D"], config, f"{path}: D")
        notes += [f"D: {note}" for note in differences(networks["D"])]
    return state, notes


def write_checkpoint(path: Path, state: dict) -> None:
    """A .pt with rosinality's tensor names and the config. Raises CheckpointError for tensors that do not fit it."""
    config = GeneratorConfig.from_dict(state["config"])
    written = dict(state)
    for name, kind in {"g": Generator, "g_ema": Generator, "d": Discriminator}.items():
        if name in state:
            load_strictly(network := kind(config), state[name], name)
            written[name] = network.state_dict()
    save_checkpoint(path, written)


def export_generator(
    source: str | Path,
    target: str | Path,
    *,
    half: bool = False,  # 16-bit floats; an export that has them already keeps them
    base: str | Path | None = None,  # an export in the same folder, whose equal tensors are left out
    with_d: bool = False,  # the discriminator as well, beside it
    recommended: str | Path | None = None,  # JSON of settings per script; default: those of the source
) -> tuple[str, list[str]]:
    """Write the EMA generator of a checkpoint as .safetensors, with the statistics of its w. Returns its fingerprint,
    and sentences on what will differ. Raises, before anything is written, UserError for a source without the
    discriminator of `with_d`, and what `read_source` raises."""
    source, target = Path(source), Path(target)
    state, notes = read_source(source, ema_only=not with_d)
    if with_d and "d" not in state:
        raise UserError(f"--with_d: {source} holds no discriminator: expected a checkpoint of train.py")
    settings = state.get("recommended")
    if recommended is not None:
        settings = read_json(recommended, SETTINGS, what="table of flags per script")
    generator = Generator(GeneratorConfig.from_dict(state["config"])).eval()
    load_strictly(generator, {name: tensor.float() for name, tensor in state["g_ema"].items()}, source)
    statistics = (*generator.latent_statistics(SAMPLES), SAMPLES)
    identity = export_ema(state, target, half=half, base=base, recommended=settings, statistics=statistics)
    if with_d:
        export_discriminator(state, target, half=half)
    return identity, notes


@torch.no_grad()
def draw_check(path: Path, seed: int, image_path: str | None) -> str:
    """Read a written file again, draw an image with it and tell, in two lines, what both are. z is numpy's
    RandomState(seed).randn, as in NVIDIA's `--seeds=0 --trunc=1 --noise-mode=const`. image_path: where the image is
    kept. Raises UserError when it is not finite."""
    generator = load_generator(path)
    config = generator.config
    z = torch.from_numpy(np.random.RandomState(seed).randn(*generator.draw_z(1).shape)).float()
    image, _ = generator(z, randomize_noise=False)
    if not torch.isfinite(image).all():
        raise UserError(f"{path} was written, but the image it draws is not finite: diverged weights?")
    pixels = to_uint8(image)[0]
    if image_path:
        save_image(pixels, image_path)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
    network = f"{config.space} generator, {config.size} px, {config.n_mlp} mapping layers"
    drawn = f"seed {seed} with the stored noise: mean {image.mean():.4f}, std {image.std():.4f}"
    return f"{network}, fingerprint {generator.fingerprint}\ncheck: {drawn}, pixels sha256 {digest}"
