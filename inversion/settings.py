"""Settings of `project`, without torch; fields with a help text are flags of projector.py."""

from dataclasses import dataclass

from common.flags import flag, not_negative, require


@dataclass(frozen=True)
class ProjectorSettings:
    """The published settings. Raises UsageError, naming the flag, for values that cannot work."""

    steps: int = 1000
    lr: float = flag(0.1, "step size of Adam")
    lr_rampup: float = flag(0.05, "fraction of the steps in which lr rises from 0")
    lr_rampdown: float = flag(0.25, "fraction of the steps in which lr falls, as a cosine")
    noise: float = flag(0.05, "perturbation of w at first, in deviations; only from the mean")
    noise_ramp: float = flag(0.75, "fraction of the steps in which it falls to 0")
    noise_regularize: float = flag(1e5, "weight of the noise regularisation")
    mse: float = flag(0, "weight of the mean squared error in the loss", type=float)
    early_stop: float = flag(0.0, "end images that gain less per twentieth; alone: 0.02", nargs="?", const=0.02)

    def __post_init__(self):
        require(self, "steps", lambda value: value >= 1, "must be at least 1")
        require(self, "lr noise noise_regularize mse", not_negative, "must be 0 or more")
        fractions = "lr_rampup lr_rampdown noise_ramp early_stop"
        require(self, fractions, lambda value: 0 <= value <= 1, "is a fraction from 0 to 1")
