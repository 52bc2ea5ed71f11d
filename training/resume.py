"""Start of a training: one read of the checkpoint it continues or of the weights it takes, and what follows from it."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.checkpoint import CheckpointError, load_checkpoint, load_safetensors, load_strictly
from common.cli import UsageError, UserError
from common.generator_file import (
    average_of,
    discriminator_file,
    infer_config,
    provenance,
    read_generator,
    without_module,
)
from common.precision import bf16_pays
from common.runs import find_start
from editing.attributes import EXPRESSION, Condition
from model import GeneratorConfig
from training.settings import ARCHITECTURE, WIDTHS
from training.trainer import Trainer
from training.transfer import can_enlarge, enlarge
from training.vision_aided import find_features

RENAMED = {"critic": "aux_d", "aid": "vision_aided", "aid_weight": "vision_aided_weight", "salt": "rng_offset"}


@dataclass(frozen=True)
class Start:
    """The file that a run starts from, read once; without a path: a new run from random weights."""

    path: Path | None = None
    continues: bool = False  # with optimisers, step and options; else weights alone (--init_from)
    config: GeneratorConfig | None = None
    state: dict = field(default_factory=dict)  # as Trainer.state_dict(), as far as the file has it

    @property
    def options(self) -> dict:
        """Flags of the run that wrote the file; {} for files of other programs."""
        return self.state.get("options") or {}


def read_start(exp_name: str | Path, *, resume: str | None = None, init_from: str | None = None) -> Start:
    """Find and read the file that a run in the folder `exp_name` starts from; see common.runs.find_start. Raises
    UserError where an earlier run would be overwritten, CheckpointError for a file that is none."""
    path, continues = find_start(Path(exp_name) / "checkpoint", resume, init_from, flag="exp_name")
    return Start() if path is None else read_checkpoint(path, continues=continues)


def read_checkpoint(path: str | Path, *, continues: bool = True) -> Start:
    """A training checkpoint; of other programs too, which tell the step in the file name only. For a new run weights
    alone as well: a generator's, or an exported one with the discriminator beside it."""
    path = Path(path)
    if path.suffix == ".safetensors" and not continues:
        return read_export(path)
    state = rename_keys(load_checkpoint(path))
    try:
        if not continues:
            networks = {name: without_module(state[name]) for name in ("g", "d") if name in state}
            state = state | networks | {"g_ema": average_of(state)}
        generator = state.get("g_ema", {})
        config = GeneratorConfig.from_dict(state["config"]) if "config" in state else infer_config(generator)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if continues and "step" not in state and (digits := re.findall(r"\d+", path.stem)):
        state["step"] = int(digits[-1])
    return Start(path, continues, config, state)


def read_export(path: Path) -> Start:
    """Weights for a new run from an export, with the discriminator that lies beside it. Raises CheckpointError."""
    generator, config, metadata = read_generator(path)
    state = {"g_ema": generator, **provenance(metadata)}
    if (file := discriminator_file(path)).is_file():  # as convert.py wrote it
        tensors, metadata = load_safetensors(file)
        state["vision_aided"] = rename_keys(metadata).get("vision_aided", "")
        state["ada"] = {"p": float(metadata.get("augment_p", 0.0))}
        state["mean_path_length"] = float(metadata.get("mean_path_length", 0.0))
        for name, tensor in tensors.items():
            network, _, name = name.partition(".")
            state.setdefault(RENAMED.get(network, network), {})[name] = tensor.float()
    return Start(path, False, config, state)


def rename_keys(state: dict) -> dict:
    """`state` with the names of today for those of earlier versions, in its options as well."""
    state = {RENAMED.get(name, name): value for name, value in state.items()}
    if isinstance(state.get("options"), dict):
        state["options"] = {RENAMED.get(name, name): value for name, value in state["options"].items()}
    return state


def cpu_preset(size: int | None, batch: int, start: Start) -> dict:
    """Flags of a new, short run on processors; docs/training.md says what each brings."""
    size, warm = size or (start.config or GeneratorConfig()).size, start.path is not None
    r1 = f"{0.0002 * size**2 / (batch * int(os.environ.get('WORLD_SIZE') or 1)):.3g}"  # ADA's rule
    chosen = {} if warm else {"channel_base": 32 * size, "channel_max": 256}
    chosen |= {"precision": "bf16" if bf16_pays() else "fp32", "lr": 0.0025 if warm else 0.006, "r1": float(r1)}
    chosen |= {"g_reg_every": 8, "one_stage": True, "augment": True, "ada_length": 60_000}
    return chosen | {"vision_aided": find_features(), "noise": "none"}


def resolve(flags: dict, start: Start) -> tuple[GeneratorConfig, dict]:
    """Architecture, and `flags` (None: not given) with all that the file decides filled in. --noise of a new run: as
    given, else that of the weights' training, else random."""
    config = resolve_architecture({name: flags[name] for name in ARCHITECTURE}, start)
    options = flags | {name: getattr(config, name) for name in ARCHITECTURE}
    options |= resolve_condition(flags["condition"], flags["attributes"], flags["light"], start)
    options["noise"] = keep("noise", flags["noise"], provenance(start.state).get("noise"), start) or "random"
    stored = start.state.get("vision_aided", "") if start.continues else None
    return config, options | {"vision_aided": keep("vision_aided", flags["vision_aided"], stored, start) or ""}


def resolve_architecture(given: dict, start: Start) -> GeneratorConfig:
    """Config of the networks: flags, else the file, else the published one. Raises UsageError for what cannot be
    built, CheckpointError for flags that contradict a continued run."""
    try:
        changes = {name: value for name, value in given.items() if value is not None}
        config = replace(start.config or GeneratorConfig(), **changes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if start.continues:
        require_same_architecture(config, start.config, start.path)
    return config


def keep(flag: str, given, stored, start: Start):
    """`given`, else `stored`. Raises CheckpointError for a flag that a continued run cannot change."""
    if start.continues and stored is not None and given not in (None, stored):
        trained = f"{start.path} was trained with --{flag} {stored or '(none)'}, not {given or '(none)'}"
        raise CheckpointError(f"{trained}: --init_from starts a new run from its weights")
    return given or stored


def resolve_condition(scorer: str | None, attributes: str | None, light: bool | None, start: Start) -> dict:
    """The options condition, attributes and light of a run, from the flags and the file. Raises UsageError for flags
    that do not fit together, UserError for those that do not fit the file."""
    conditional = start.config is not None and start.config.condition_dim
    stored = Condition.from_dict(start.state.get("condition") or {}, start.path) if conditional else None
    if light and start.path is None:
        raise UsageError("--light trains what the condition adds to a trained generator: pass one as --init_from")
    if start.continues and stored is None:
        scorer = keep("condition", scorer, "", start)
    elif start.continues:
        scorer, light = scorer or stored.scorer, keep("light", light, stored.light, start)
    if not scorer:
        if stored is not None:
            raise UserError(f"{start.path} is a conditional generator: pass --condition SCORER to train it on")
        if light or attributes:
            raise UsageError("--light and --attributes are for a conditional GAN: pass --condition SCORER")
        return {"condition": None, "attributes": None, "light": False}
    names = tuple(name.strip() for name in attributes.split(",")) if attributes else None
    if stored is not None and names not in (None, stored.attributes):
        raise UserError(f"--attributes {attributes}, but {start.path} was trained for {','.join(stored.attributes)}")
    names = names or (EXPRESSION if stored is None else stored.attributes)
    scorer = str(Path(scorer).resolve()) if Path(scorer).is_file() else scorer
    return {"condition": scorer, "attributes": ",".join(names), "light": bool(light)}


def require_same_architecture(config: GeneratorConfig, other: GeneratorConfig, path) -> None:
    """Raise CheckpointError, naming the flags, where the file's config `other` makes other networks."""
    if config.widths == other.widths:  # several rules give the same networks
        other = replace(other, **{name: getattr(config, name) for name in WIDTHS})
    pairs = ((name, value, getattr(other, name)) for name, value in config.to_dict().items())
    differing = [f"--{name} {here} here, {there} in the file" for name, here, there in pairs if here != there]
    if differing:
        raise CheckpointError(f"{path} holds another architecture: {'; '.join(differing)}")


def init_from(trainer: Trainer, start: Start) -> None:
    """Weights of g, d and g_ema as far as `start` has them, ADA's p and the mean path length; the rest starts anew. A
    smaller or narrower network is enlarged, an unconditional generator gets the condition that is trained
    (training/transfer.py). Raises CheckpointError for any other difference."""
    weights, config = start.state, start.config
    networks = {name: getattr(trainer, name) for name in ("g", "d", "g_ema") if name in weights}
    if config != trainer.config and can_enlarge(config, trainer.config):
        for name, network in networks.items():
            load_strictly(type(network)(config), weights[name], start.path)  # nothing is missing, nothing left over
            weights = weights | {name: enlarge(weights[name], config, network)}
    else:
        require_same_architecture(trainer.config, config, start.path)
    trainer.warm_start(weights, start.path)
