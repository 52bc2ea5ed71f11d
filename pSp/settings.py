"""Settings of an encoder and its training, without torch. Fields with a help text are flags of scripts/train.py."""

from dataclasses import asdict, dataclass

from common.cli import UsageError, UserError
from common.flags import flag

GRADUAL, E4E = "GradualStyleEncoder", "Encoder4Editing"
INTO_W, INTO_W_PLUS = "BackboneEncoderUsingLastLayerIntoW", "BackboneEncoderUsingLastLayerIntoWPlus"
TRAINED = (GRADUAL, INTO_W, INTO_W_PLUS)
RESIZE_FACTORS = (1, 2, 4, 8, 16, 32)  # of super-resolution, when --resize_factors gives none
POSITIVE = ("batch_size", "test_batch_size", "learning_rate")
INTERVALS = ("max_steps", "image_interval", "board_interval", "val_interval", "save_interval")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run. Raises UserError for what cannot work."""

    dataset_type: str = flag("ffhq_encode", "ffhq_encode | ffhq_frontalize | celebs_super_resolution")
    resize_factors: tuple[int, ...] = RESIZE_FACTORS
    batch_size: int = flag(4, "images per step and process")
    test_batch_size: int = flag(2, "images per validation batch")
    test_workers: int = 0
    learning_rate: float = flag(1e-4, "of the optimiser")
    optim_name: str = flag("ranger", "optimiser", choices=("ranger", "adam"))
    train_decoder: bool = False
    precision: str = "fp32"
    seed: int = 0
    max_steps: int = flag(500_000, "training steps in all")
    image_interval: int = flag(1000, "steps between grids of training images")
    board_interval: int = flag(50, "steps between log lines")
    val_interval: int = flag(1000, "steps between validations")
    save_interval: int | None = flag(None, "steps between checkpoints (default: only the last step)", type=int)
    keep: int = 2  # checkpoints that keep their optimiser state; 0: all

    def __post_init__(self):
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in INTERVALS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")

    def due(self, step: int) -> set[str]:
        """Events after this step: image, board, val, save; everything but image after the last."""
        save = self.save_interval or self.max_steps
        every = {"image": self.image_interval, "board": self.board_interval, "val": self.val_interval, "save": save}
        due = {name for name, interval in every.items() if step % interval == 0}
        return due | {"board", "val", "save"} if step == self.max_steps else due


@dataclass(frozen=True)
class LossWeights:
    """The lambdas. Raises UserError for negative ones, or when all are 0."""

    lpips_lambda: float = flag(0.8, "weight of LPIPS")
    l2_lambda: float = flag(1.0, "weight of the mean squared error")
    id_lambda: float = flag(0.1, "weight of the identity loss")
    w_norm_lambda: float = flag(0.0, "weight of the distance of w from the average w")
    lpips_lambda_crop: float = flag(0.0, "weight of LPIPS on the inner face")
    l2_lambda_crop: float = flag(0.0, "weight of the mean squared error on the inner face")

    def __post_init__(self):
        values = asdict(self)
        for name, value in values.items():
            if value < 0:
                raise UserError(f"--{name} must not be negative, got {value}")
        if not any(values[name] for name in values if name != "w_norm_lambda"):
            raise UserError("every lambda that compares images is 0: there is nothing to learn from")


@dataclass(frozen=True)
class EncoderFlags:
    """The encoder of a new run; 0 and None: what suits the generator (EncoderConfig.for_generator)."""

    encoder_type: str | None = flag(None, f"default: {GRADUAL}", type=str, choices=TRAINED)
    n_iters_per_batch: int | None = flag(None, "passes of an encoder that corrects itself (ReStyle)", type=int)
    encoder_width: int = flag(0, "maps of stage 1; 0: 64, or 32 for a generator below 256 px")
    encoder_depth: int = flag(0, "18 | 50 | 100 | 152; 0: 50, or 18 for a generator below 256 px")
    encoder_mode: str = flag("ir_se", "without or with squeeze and excitation", choices=("ir", "ir_se"))
    input_size: int = flag(0, "pixels; 0: 256, or the generator's size where that is smaller")
    input_nc: int = flag(3, "channels of the input; 6: image and reconstruction (ReStyle)", choices=(3, 6))
    encoder_init: str = flag("auto", "IR-SE50 ArcFace weights to start from: auto (where they fit), none or a file")
    start_from_latent_avg: bool = flag(False, "the encoder gives offsets from the generator's average w")
    learn_in_w: bool = flag(False, f"one w for all layers, space W: W generators, with {INTO_W}")

    def __post_init__(self):
        if self.learn_in_w and self.encoder_type not in (None, INTO_W):
            needs = f"it needs --encoder_type {INTO_W}, {self.encoder_type} gives one per layer"
            raise UsageError(f"--learn_in_w is one w for all layers: {needs}")


def resize_factors(text: str | None) -> tuple[int, ...]:
    """'1,2,4' -> (1, 2, 4); None -> the published list. UserError for what is no list of numbers from 1."""
    if text is None:
        return RESIZE_FACTORS
    try:
        factors = tuple(int(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or min(factors) < 1:
        raise UserError(f"--resize_factors {text}: expected whole numbers from 1, such as 4 or 2,4,8")
    return factors
