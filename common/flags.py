"""Flags that several scripts have, and settings whose fields are flags, without torch: a field `lr: float = flag(0.002,
"step size of Adam")` of a dataclass, `add_fields(parser, Settings)`, `settings = read_fields(Settings, vars(args))`."""

import math
from dataclasses import field, fields

from common.cli import FITS, PRECISIONS, UsageError, add_device_flags, count, seed_number

# Choices that flags and the modules behind them share
NOISES = ("const", "random", "none")
VIDEOS = (".mp4", ".gif", ".webp")
MEASURES = ("perceptual", "mse", "psnr", "ssim", "identity")


def flag(default, help: str, **options):
    """A field of a settings dataclass that is a flag as well; options: of `add_argument`."""
    return field(default=default, metadata={"help": help, **options})


def add_fields(group, settings: type, names=None) -> None:
    """Add a flag for each `flag` of a dataclass, those called `names` or all: its name, type, default and help."""
    for item in fields(settings):
        if item.metadata and (names is None or item.name in names):
            kind = {"action": "store_true"} if isinstance(item.default, bool) else {"type": type(item.default)}
            group.add_argument(f"--{item.name}", default=item.default, **kind | dict(item.metadata))


def read_fields(settings: type, values: dict):
    """The dataclass `settings` from the values of its fields' names, among others."""
    return settings(**{item.name: values[item.name] for item in fields(settings) if item.name in values})


def require(settings, names: str, fits, rule: str) -> None:
    """Raise UsageError, naming the flag, unless all fields `names` (with spaces between) fit the rule."""
    for name in names.split():
        if not fits(value := getattr(settings, name)):
            raise UsageError(f"--{name} {rule}, got {value}")


def not_negative(value) -> bool:
    return 0 <= value < math.inf


def add_training_flags(parser, *, published: str, keep: int, workers: int, wandb: str) -> None:
    """Add flags on where a training starts, what it keeps, and the machine. published, wandb: two published flags."""
    add = parser.add_argument_group("start", "a continued run keeps its options; a given flag wins").add_argument
    add("--resume", metavar="auto|PATH", help="continue a run; auto: its newest checkpoint, if any")
    add(f"--{published}", metavar="PATH", help="continue from this checkpoint (the published flag)")
    add("--init_from", metavar="PATH", help="weights for a new run; with --resume auto: until there is a checkpoint")
    add = parser.add_argument_group("run").add_argument
    add("--precision", choices=PRECISIONS, default="fp32", help="number type of convolutions; losses: fp32")
    add("--seed", type=seed_number, default=0, help="seed of weights, data order and every draw")
    add("--keep", type=count, default=keep, help="checkpoints that can be continued; 0: all; older ones: weights alone")
    add("--workers", type=count, default=workers, help="loader processes (0: decode in the training process)")
    add("--threads", type=count, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    add(f"--{wandb}", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    add_device_flags(parser)


def add_preset_flag(group) -> None:
    help = "the paper's settings, whatever the model's file recommends"
    group.add_argument("--preset", choices=("published",), help=help)


def add_face_flags(group) -> None:
    """Add --align and --fit, for images that are not aligned or not square."""
    add = group.add_argument
    add("--align", choices=("auto", "off"), default="off", help="auto: align raw photos first, into OUTPUT_DIR/aligned")
    add("--fit", choices=FITS, default="crop", help="for images that are not square")
