"""Where a training starts: the checkpoint it continues, or the weights it takes, and what they say of the networks.

state, path = find_start(args)
config = read_architecture(args, stored_architecture(args, state, path))
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from common.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, load_safetensors
from common.cli import UsageError, UserError
from common.export import discriminator_file
from model import GeneratorConfig, generator_state, infer_config
from training.trainer import Trainer, TrainSettings
from training.transfer import add_condition_columns, can_grow, can_widen, grow_discriminator, grow_generator, widen

WIDTHS = ("channel_multiplier", "channel_max", "channel_base")
ARCHITECTURE = ("size", "style_dim", "n_mlp", "w_space", "independent", *WIDTHS)


def read_architecture(args, stored: GeneratorConfig | None = None) -> GeneratorConfig:
    """The networks' config; flags that were not given take the value of `stored`, the file that the run starts from,
    or the published one, and are filled in. Raises UsageError for what cannot be built."""
    for name in ARCHITECTURE:
        if getattr(args, name) is None:
            setattr(args, name, getattr(stored or GeneratorConfig(), name))
    try:
        return replace(stored or GeneratorConfig(), **{name: getattr(args, name) for name in ARCHITECTURE})
    except ValueError as error:
        raise UsageError(str(error)) from None


def stored_architecture(args, state: dict | None, path: Path | None) -> GeneratorConfig | None:
    """The config of the networks in the checkpoint `state`, or in the file of --init_from; None for a fresh run."""
    if state is None:
        return generator_state(args.init_from)[1] if args.init_from else None
    try:
        if "config" in state:
            return GeneratorConfig.from_dict(state["config"])
        return infer_config(state.get("g_ema", {}))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_noise(args, state: dict | None, path: Path | None) -> str:
    """--noise: of the run in the checkpoint `state`, else as given, else of the file of --init_from; random where
    neither tells. Raises CheckpointError for a flag that would change the run under way."""
    if state is None and args.noise is None and args.init_from:
        if Path(args.init_from).suffix == ".safetensors":
            return load_safetensors(args.init_from)[1].get("noise") or TrainSettings.noise
        return stored_noise(load_checkpoint(args.init_from)) or TrainSettings.noise
    stored = stored_noise(state or {})
    if stored and args.noise not in (None, stored):
        raise CheckpointError(
            f"{path} was trained with --noise {stored}, not {args.noise}: --init_from starts a new run from its weights"
        )
    return stored or args.noise or TrainSettings.noise


def stored_noise(state: dict) -> str | None:
    """--noise of the run that wrote a checkpoint; None in files of other programs, or older than the flag."""
    return state.get("options", {}).get("noise")


def find_start(args) -> tuple[dict | None, Path | None]:
    """The state to continue from, with its file; (None, None) for a new run. Refuses to overwrite an earlier run, or
    to go on in its folder from anything but its newest checkpoint."""
    folder = Path(args.exp_name) / "checkpoint"
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if args.resume and args.resume != "auto":
        path = Path(args.resume)
        state = load_checkpoint(path)
        if newest is not None and newest.resolve() != path.resolve():
            raise UserError(
                f"{args.exp_name} already holds a run, up to {newest.name}: continue {path} in another --exp_name"
            )
    elif newest is not None and args.resume == "auto":
        path, state = newest, load_checkpoint(newest)
    elif newest is not None:
        raise UserError(
            f"{args.exp_name} already holds a run ({newest.name}): --resume auto continues it, "
            "another --exp_name starts a new one"
        )
    else:
        return None, None
    if "step" not in state and (digits := re.findall(r"\d+", path.stem)):
        state["step"] = int(digits[-1])  # rosinality and TransStyleGAN tell the step in the file name only
    return state, path


def require_same_architecture(config: GeneratorConfig, other: GeneratorConfig, path) -> None:
    if config.widths == other.widths:  # several rules give the same networks
        other = replace(other, **{name: getattr(config, name) for name in WIDTHS})
    differing = [
        f"--{name} {value} here, {getattr(other, name)} in the file"
        for name, value in config.to_dict().items()
        if getattr(other, name) != value
    ]
    if differing:
        raise CheckpointError(f"{path} holds another architecture: {'; '.join(differing)}")


def read_discriminator(path: str) -> dict:
    """`d`, `critic`, `aid` from the file that generate.py --with_d wrote beside an exported generator; {} without."""
    file = discriminator_file(path)
    if not file.is_file():
        return {}
    tensors, known = load_safetensors(file)
    judges = {
        kind: {
            name.removeprefix(f"{kind}."): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith(f"{kind}.")
        }
        for kind in ("d", "critic")
    }
    return {kind: state for kind, state in judges.items() if state} | {"aid": known.get("aid", "")}


def init_from(trainer: Trainer, path: str) -> None:
    """Transfer: weights of g, d and g_ema where the file, or the one beside an export, has them; step, optimisers and
    averages start anew.

    A smaller or narrower generator of else the same architecture is grown, an unconditional one gets the condition that
    is trained (training/transfer.py). Raises CheckpointError if it cannot be.
    """
    state, config = generator_state(path)
    weights = (
        {"g_ema": state, **read_discriminator(path)} if Path(path).suffix == ".safetensors" else load_checkpoint(path)
    )
    n = trainer.config.condition_dim
    if n and not config.condition_dim:
        weights |= {name: add_condition_columns(weights[name], config, n) for name in ("g", "g_ema") if name in weights}
        config = replace(config, condition_dim=n)
    if can_grow(config, trainer.config):
        grown = {name: grow_generator(weights[name], config, trainer.g) for name in ("g", "g_ema") if name in weights}
        if "d" in weights:
            grown["d"] = grow_discriminator(weights["d"], config, trainer.d)
        weights = grown
    elif can_widen(config, trainer.config):
        networks = {"g": trainer.g, "g_ema": trainer.g, "d": trainer.d}
        weights |= {name: widen(weights[name], network) for name, network in networks.items() if name in weights}
    else:
        require_same_architecture(trainer.config, config, path)
    trainer.adopt(weights, path)
