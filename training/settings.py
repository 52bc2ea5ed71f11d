"""Settings of a training, without torch. The fields that have a help text are flags of train.py."""

import math
from dataclasses import dataclass

from common.cli import count, positive_int
from common.flags import flag, not_negative, require

WIDTHS = ("channel_multiplier", "channel_max", "channel_base")
ARCHITECTURE = ("size", "style_dim", "n_mlp", "w_space", "independent", *WIDTHS)  # flags, None: as in the start file


@dataclass(frozen=True)
class TrainSettings:
    """Hyperparameters of the networks' training. Raises UsageError for what cannot work."""

    batch: int = flag(16, "images per step and process")
    micro_batch: int = 0  # images per forward pass; 0: the whole batch
    lr: float = flag(0.002, "Adam learning rate before the lazy-regularisation ratio")
    d_lr: float = flag(0.0, "learning rate of the discriminator; 0: --lr")
    r1: float = flag(10.0, "weight of the R1 penalty; 0: none")
    ema_images: int = flag(0, "images in which the average of the generator halves; 0: 312.5 steps, as published")
    path_regularize: float = flag(2.0, "weight of path length regularisation; 0: none")
    path_batch_shrink: int = flag(2, "batch divisor for path length regularisation")
    d_reg_every: int = flag(16, "steps between R1 penalties")
    g_reg_every: int = flag(4, "steps between path length penalties")
    one_stage: bool = flag(False, "both networks step at once, from one forward pass: less work per image")
    mixing: float = flag(0.9, "probability of style mixing (W only: W++ has one z per token)")
    augment: bool = flag(False, "adaptive discriminator augmentation (for small sets)")
    augment_p: float = flag(0.0, "fixed augmentation probability; 0: adaptive")
    ada_target: float = flag(0.6, "target of E[sign(D(real))] for adaptive p")
    ada_length: int = flag(500_000, "images in which p may go from 0 to 1")
    vision_aided: str = ""  # network of the vision-aided discriminator (training/vision_aided.py)
    vision_aided_weight: float = flag(1.0, "weight of its loss beside the discriminator's")
    texture_weight: float = flag(0.0, "weight of the texture discriminators' loss; 0: none (training/texture.py)")
    part_weight: float = flag(0.0, "weight of the vision-aided loss on eyes and mouth of aligned faces; 0: none")
    noise: str = "random"  # none: no noise enters the generator, w alone decides the image
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        positive = "batch lr path_batch_shrink d_reg_every g_reg_every ada_length"
        require(self, positive, lambda value: value > 0, "must be positive")
        weights = "r1 path_regularize d_lr vision_aided_weight texture_weight part_weight ema_images"
        require(self, weights, not_negative, "must not be negative")
        require(self, "part_weight", lambda weight: self.vision_aided or not weight, "needs --vision_aided")
        require(self, "mixing augment_p", lambda p: 0 <= p <= 1, "is a probability, 0 to 1")
        require(self, "ada_target", lambda r: -1 < r < 1, "is a number between -1 and 1")
        require(self, "augment_p", lambda p: self.augment or not p, "needs --augment")
        divides = f"must divide --batch {self.batch}"
        require(self, "micro_batch", lambda n: n >= 0 and self.batch % (n or 1) == 0, divides)

    @property
    def forward(self) -> int:
        """Images per forward pass."""
        return self.micro_batch or self.batch


@dataclass(frozen=True)
class ConditionSettings:
    """Hyperparameters of the condition (training/conditional.py). Raises UsageError for what cannot work."""

    condition: str | None = flag(None, "face-scorer, or a .safetensors of train_scorer.py", type=str, metavar="SCORER")
    attributes: str | None = flag(None, "with commas between (default: smile,eyes_open,mouth_open)", type=str)
    attr_weight: float = flag(5.0, "weight of the L1 loss of the attributes")
    attr_ramp: int = flag(1000, "steps in which it rises from 0 with --init_from")
    attr_permute: float = flag(0.5, "probability that an attribute is taken from another face")
    light: bool = False  # train only what the condition adds
    light_lr: float = flag(0.01, "Adam learning rate under --light")

    def __post_init__(self):
        require(self, "attr_weight attr_ramp", not_negative, "must not be negative")
        require(self, "light_lr", lambda value: 0 < value < math.inf, "must be positive")
        require(self, "attr_permute", lambda p: 0 <= p <= 1, "is a probability, 0 to 1")


@dataclass(frozen=True)
class LoopSettings:
    """Length of a run, and the steps between what it writes."""

    iter: int = flag(800_000, "training steps in all", type=positive_int)
    n_sample: int = flag(64, "images in a sample grid", type=positive_int)
    sample_every: int = flag(500, "steps between sample grids and attention maps", type=positive_int)
    save_every: int = flag(10_000, "steps between checkpoints", type=positive_int)
    log_every: int = flag(50, "steps between log lines", type=positive_int)
    eval_every: int = flag(0, "steps between evaluations; lowest FID: best.safetensors; 0: none", type=count)
    metric: str = flag("fid,prdc", "what --eval_every computes: fid, kid, prdc, several with commas between")
    eval_samples: int = flag(5000, "real and generated images of an evaluation")
    extractor: str = flag("auto", "features for --eval_every: inception, or a named fallback (fid-squeeze)")
    keep: int = 3  # checkpoints that can be continued; of older ones the EMA generator stays; 0: all
    on_nan: str = flag("stop", "at a loss that is not finite", choices=("stop", "rollback"))
