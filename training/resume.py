"""Start of a training: one read of the checkpoint it continues or of the weights it takes, and what follows from it.

start = read_start("runs/faces", resume="auto")
config = resolve_architecture({"size": 64}, start)  # also of a start without a file
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.checkpoint import CheckpointError, load_checkpoint, load_safetensors
from common.cli import UsageError
from common.generator_file import discriminator_file, infer_config, read_generator
from common.runs import find_start
from model import GeneratorConfig
from training.settings import WIDTHS, TrainSettings
from training.trainer import Trainer
from training.transfer import add_condition_columns, can_grow, can_widen, grow_discriminator, grow_generator, widen

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
    if path is None:
        return Start()
    return read_checkpoint(path) if continues else read_weights(path)


def read_checkpoint(path: str | Path, *, continues: bool = True) -> Start:
    """A training checkpoint; of other programs too, which tell the step in the file name only."""
    path = Path(path)
    state = rename_keys(load_checkpoint(path))
    generator = state.get("g_ema", {} if continues else state)
    try:
        config = GeneratorConfig.from_dict(state["config"]) if "config" in state else infer_config(generator)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if continues and "step" not in state and (digits := re.findall(r"\d+", path.stem)):
        state["step"] = int(digits[-1])
    return Start(path, continues, config, state)


def read_weights(path: str | Path) -> Start:
    """Weights for a new run: a checkpoint, or an exported generator with the discriminator beside it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_checkpoint(path, continues=False)
    generator, config, metadata = read_generator(path)
    state = {"g_ema": generator, "condition": metadata.get("condition"), "options": {"noise": metadata.get("noise")}}
    return Start(path, False, config, state | read_discriminator(path))


def read_discriminator(path: Path) -> dict:
    """`d`, `aux_d`, `vision_aided` from the file that convert.py wrote beside an exported generator; {} without."""
    file = discriminator_file(path)
    if not file.is_file():
        return {}
    tensors, metadata = load_safetensors(file)
    state = {"vision_aided": rename_keys(metadata).get("vision_aided", "")}
    for name, tensor in tensors.items():
        network, _, name = name.partition(".")
        state.setdefault(RENAMED.get(network, network), {})[name] = tensor.float()
    return state


def rename_keys(state: dict) -> dict:
    """`state` with the names of today for those of earlier versions, in its options as well."""
    state = {RENAMED.get(name, name): value for name, value in state.items()}
    if isinstance(state.get("options"), dict):
        state["options"] = {RENAMED.get(name, name): value for name, value in state["options"].items()}
    return state


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


def resolve_noise(given: str | None, start: Start) -> str:
    """--noise of a continued run from its file; else as given, else that of the weights' training, else random."""
    stored = start.options.get("noise")
    if start.continues and stored:
        require_kept("noise", given, stored, start)
    return given or stored or TrainSettings.noise


def resolve_vision_aided(given: str | None, start: Start) -> str:
    """--vision_aided of a continued run from its file; else as given."""
    stored = start.state.get("vision_aided", "") if start.continues else ""
    if start.continues:
        require_kept("vision_aided", given, stored, start)
    return given or stored


def require_kept(flag: str, given: str | None, stored: str, start: Start) -> None:
    """Raises CheckpointError for a flag that a continued run cannot change."""
    if given not in (None, stored):
        trained = f"{start.path} was trained with --{flag} {stored or '(none)'}, not {given or '(none)'}"
        raise CheckpointError(f"{trained}: --init_from starts a new run from its weights")


def require_same_architecture(config: GeneratorConfig, other: GeneratorConfig, path) -> None:
    if config.widths == other.widths:  # several rules give the same networks
        other = replace(other, **{name: getattr(config, name) for name in WIDTHS})
    pairs = ((name, value, getattr(other, name)) for name, value in config.to_dict().items())
    differing = [f"--{name} {here} here, {there} in the file" for name, here, there in pairs if here != there]
    if differing:
        raise CheckpointError(f"{path} holds another architecture: {'; '.join(differing)}")


def init_from(trainer: Trainer, start: Start) -> None:
    """Weights of g, d and g_ema as far as `start` has them; step, optimisers and averages start anew. A smaller or
    narrower generator is grown, an unconditional one gets the condition that is trained (training/transfer.py). Raises
    CheckpointError for any other difference."""
    state, config = start.state, start.config
    weights = state if "g_ema" in state else {"g_ema": state}
    generators = [name for name in ("g", "g_ema") if name in weights]
    n = trainer.config.condition_dim
    if n and not config.condition_dim:
        weights = weights | {name: add_condition_columns(weights[name], config, n) for name in generators}
        config = replace(config, condition_dim=n)
    if can_grow(config, trainer.config):
        grown = {name: grow_generator(weights[name], config, trainer.g) for name in generators}
        weights = grown | ({"d": grow_discriminator(weights["d"], config, trainer.d)} if "d" in weights else {})
    elif can_widen(config, trainer.config):
        networks = {"g": trainer.g, "g_ema": trainer.g, "d": trainer.d}
        weights = weights | {name: widen(weights[name], networks[name]) for name in networks if name in weights}
    else:
        require_same_architecture(trainer.config, config, start.path)
    trainer.warm_start(weights, start.path)
