"""Settings of an encoder and its training, without torch. Fields with a help text are flags of scripts/train.py."""

from dataclasses import asdict, dataclass

from common.cli import PRECISIONS, UsageError, UserError, positive_int, seed_number
from common.flags import count, flag, not_negative, require
from pSp.data_configs import DATASETS

GRADUAL, E4E, IDENTITY = "GradualStyleEncoder", "Encoder4Editing", "IdentityStyleEncoder"
INTO_W, INTO_W_PLUS = "BackboneEncoderUsingLastLayerIntoW", "BackboneEncoderUsingLastLayerIntoWPlus"
TRAINED = (GRADUAL, IDENTITY, INTO_W, INTO_W_PLUS)
RESIZE_FACTORS = (1, 2, 4, 8, 16, 32)  # of super-resolution, when --resize_factors gives none


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run. Raises UserError for what cannot work."""

    dataset_type: str = flag("ffhq_encode", " | ".join(DATASETS))
    resize_factors: str | None = flag(None, "super-resolution: factors by which the source is shrunk", type=str)
    batch_size: int = flag(4, "images per step and process")
    test_batch_size: int = flag(2, "images per validation batch")
    test_workers: int = flag(2, "threads that read validation images", type=count)
    learning_rate: float = flag(1e-4, "learning rate of the optimiser")
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
        require(self, "batch_size test_batch_size learning_rate", lambda value: value > 0, "must be positive")
        require(self, "dataset_type", DATASETS.__contains__, f"is one of {', '.join(DATASETS)}")
        resize_factors(self.resize_factors)
        intervals = "max_steps image_interval board_interval val_interval save_interval"
        require(self, intervals, lambda steps: steps is None or steps >= 1, "must be at least 1")

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
        require(self, " ".join(values), not_negative, "must not be negative")
        if not any(values[name] for name in values if name != "w_norm_lambda"):
            raise UserError("every lambda that compares images is 0: there is nothing to learn from")


@dataclass(frozen=True)
class EncoderFlags:
    """The encoder of a new run; 0 and None: what suits the generator (EncoderConfig.for_generator)."""

    encoder_type: str | None = flag(None, f"default: {GRADUAL}", type=str, choices=TRAINED)
    n_iters_per_batch: int | None = flag(None, "passes of an encoder that corrects itself (ReStyle)", type=int)
    encoder_width: int = flag(0, "maps of stage 1; 0: 64, or 32 for a generator below 256 px")
    input_nc: int = flag(3, "channels of the input; 6: image and reconstruction (ReStyle)", choices=(3, 6))
    start_from_latent_avg: bool = flag(False, "the encoder gives offsets from the generator's average w")
    learn_in_w: bool = flag(False, f"one w for all layers, space W: W generators, with {INTO_W}")

    def __post_init__(self):
        if self.learn_in_w and self.encoder_type not in (None, INTO_W):
            raise UsageError(f"--learn_in_w is one w for all layers: {self.encoder_type} gives one per layer")


@dataclass(frozen=True)
class InferenceSettings:
    """Settings of an inversion of images. Raises UsageError for what does not fit together."""

    couple_outputs: bool = flag(False, "save every input beside its output, not each 100th only")
    resize_outputs: bool = flag(False, "save outputs at 256x256 where the generator's are larger")
    test_batch_size: int = flag(2, "images per forward pass", type=positive_int)
    test_workers: int = flag(2, "threads that read images", type=count)
    latent_mask: str | None = flag(None, "style mixing: layers (8,9,10) whose w comes from a random sample", type=str)
    mix_alpha: float | None = flag(None, "how far those go to the sample, 0 to 1 (default: all the way)", type=float)
    resize_factors: str = flag("1", "super-resolution: one factor by which inputs are shrunk")
    retrieval: int = flag(0, "images of which is told how many find their own original", type=count, metavar="N")
    precision: str = flag("fp32", "number type of the convolutions", choices=PRECISIONS)
    seed: int = flag(0, "seed of the samples of --latent_mask", type=seed_number)

    def __post_init__(self):
        require(self, "resize_factors", lambda t: len(resize_factors(t)) == 1, "is a list: inference takes one factor")
        fits = self.mix_alpha is None or (self.latent_mask and 0 <= self.mix_alpha <= 1)
        require(self, "mix_alpha", lambda _: fits, "is a number from 0 to 1 and goes with --latent_mask")

    @property
    def factor(self) -> int:
        return resize_factors(self.resize_factors)[0]


def resize_factors(text: str | None) -> tuple[int, ...]:
    """Factors of super-resolution; None: the published list. UsageError for what is no list of numbers from 1."""
    if text is None:
        return RESIZE_FACTORS
    try:
        factors = tuple(map(int, str(text).split(",")))  # a file may hold a number
    except ValueError:
        factors = (0,)
    if min(factors) < 1:
        raise UsageError(f"--resize_factors {text}: expected whole numbers from 1, such as 4 or 2,4,8")
    return factors
