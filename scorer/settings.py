"""Settings of a scorer's training, without torch: the fields are flags of train_scorer.py."""

from dataclasses import dataclass

from common.cli import positive, positive_int, seed_number
from common.flags import flag


@dataclass(frozen=True)
class ScorerSettings:
    """Hyperparameters of a scorer's training."""

    iter: int = flag(3000, "training steps in all", type=positive_int)
    batch: int = flag(64, "faces per step", type=positive_int)
    lr: float = flag(0.003, "AdamW's peak learning rate", type=positive)
    weight_decay: float = flag(0.05, "decay of kernels and matrices")
    seed: int = flag(0, "seed of weights, order and augmentation", type=seed_number)
