"""Checkpoints read, written and exported: what convert.py does, as functions.

state, notes = read_source(Path("ffhq.pkl"))
export_generator("ffhq.pkl", "ffhq.safetensors", half=True)
"""

from __future__ import annotations

from pathlib import Path

import torch

from common.checkpoint import load_strictly, save_checkpoint
from common.cli import UserError
from common.export import export_discriminator, export_ema
from common.files import read_json
from interop.nvidia import differences, discriminator_tensors, generator_tensors, mean_latent
from interop.nvidia_pickle import read_networks
from model import Discriminator, Generator, GeneratorConfig, load_generator, read_generator

PICKLES = (".pkl", ".pickle")
SAMPLES = 10_000  # behind the stored statistics of w
KEPT = ("step", "condition", "noise", "recommended", "vision_aided", "aid")  # of what the source says of itself


def read_source(path: Path, *, ema_only: bool = False) -> tuple[dict, list[str]]:
    """The state of a checkpoint, and sentences on what will differ.

    The state has `g_ema` and `config`; `g`, `d`, `aux_d`, `latent_avg`, `step`, `condition`, `noise`, `recommended`
    where the file has them. ema_only: the EMA generator alone, in its own number format (else float32).
    Raises FileNotFoundError, or CheckpointError or UserError naming what is wrong with the file.
    """
    if path.suffix.lower() in PICKLES:
        return read_pickle(path, ema_only=ema_only)
    load_generator(path)  # refuses what does not fit or is damaged
    weights, config, file = read_generator(path)
    state = {"g_ema": weights, "config": config.to_dict()}
    state |= {name: file[name] for name in KEPT if file.get(name) is not None}
    state |= {"noise": noise} if (noise := file.get("options", {}).get("noise")) else {}
    if not ema_only:
        state["g_ema"] = {name: tensor.float() for name, tensor in weights.items()}
        for network in ("g", "d", "aux_d", "critic"):  # the last: aux_d in earlier versions
            if network in file and path.suffix != ".safetensors":
                state[network] = {name: tensor.float() for name, tensor in file[network].items()}
        if isinstance(file.get("latent_avg"), torch.Tensor):
            state["latent_avg"] = file["latent_avg"].float()
    return state, []


def read_pickle(path: Path, *, ema_only: bool) -> tuple[dict, list[str]]:
    """`read_source` of NVIDIA's pickles."""
    networks = read_networks(path)
    if "G_ema" not in networks:
        raise UserError(f"{path} has no G_ema, the averaged generator: found {', '.join(networks)}")
    average = networks["G_ema"]
    g_ema, config = generator_tensors(average, f"{path}: G_ema")
    state = {"g_ema": g_ema, "config": config.to_dict()}
    notes = [f"G_ema: {note}" for note in differences(average)]
    if ema_only:
        return state, notes
    if (mean := mean_latent(average)) is not None:
        state["latent_avg"] = mean
    if "G" in networks:
        state["g"], _ = generator_tensors(networks["G"], f"{path}: G")
    if "D" in networks:
        state["d"] = discriminator_tensors(networks["D"], config, f"{path}: D")
        notes += [f"D: {note}" for note in differences(networks["D"])]
    return state, notes


def write_checkpoint(path: Path, state: dict) -> None:
    """A .pt with rosinality's tensor names and the config. Raises CheckpointError for tensors that do not fit it."""
    config = GeneratorConfig.from_dict(state["config"])
    networks = {"g": Generator, "g_ema": Generator, "d": Discriminator}
    written = dict(state)
    for name in networks.keys() & state.keys():
        network = networks[name](config)
        load_strictly(network, state[name], name)
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
    """Write the EMA generator of a checkpoint as .safetensors, with the statistics of its w.

    Returns its fingerprint, and sentences on what will differ. Raises UserError, before anything is written, for a
    source without the discriminator that `with_d` needs, and what `read_source` and `export_ema` raise.
    """
    source, target = Path(source), Path(target)
    state, notes = read_source(source, ema_only=not with_d)
    if with_d and "d" not in state:
        raise UserError(f"--with_d: {source} holds no discriminator: expected a checkpoint of train.py")
    settings = state.get("recommended") if recommended is None else read_settings(recommended)
    generator = Generator(GeneratorConfig.from_dict(state["config"])).eval()
    load_strictly(generator, {name: tensor.float() for name, tensor in state["g_ema"].items()}, source)
    statistics = (*generator.latent_statistics(SAMPLES), SAMPLES)
    identity = export_ema(state, target, half=half, base=base, recommended=settings, statistics=statistics)
    if with_d:
        export_discriminator(state, target, half=half)
    return identity, notes


def read_settings(path: str | Path) -> dict:
    """{script: {flag: value}} of a JSON file. Raises UserError for another shape."""
    return read_json(path, {str: {str: (str, float, bool, None, list)}}, what="table of flags per script")
