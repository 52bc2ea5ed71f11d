"""Training of a pSp encoder: one step, validation, and the state that makes a stopped run go on exactly.

Every random number of a step is drawn from (seed, step, rank), as in training/trainer.py: nothing about random state is
saved. Each rank normalises its own batch (or all together with --sync_batchnorm on CUDA); the running statistics are
averaged over ranks before they are used. `scripts/train.py` is the command line, `coach.py` the loop around this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from common.checkpoint import CheckpointError
from common.distributed import Distributed, all_reduce_mean, gather_list, mix_seeds, shard
from common.precision import DTYPES
from pSp.data_configs import DATASETS, RESIZE_FACTORS, make_pair, normalise
from pSp.losses import EncoderLoss
from pSp.psp import pSp, psp_state
from pSp.ranger import Ranger

OPTIMISERS = ("ranger", "adam")


@dataclass(frozen=True)
class EncoderSettings:
    """What the training depends on; the names are the flags. Raises ValueError for what cannot work."""

    dataset_type: str = "ffhq_encode"
    resize_factors: tuple[int, ...] = RESIZE_FACTORS
    batch_size: int = 4  # per process
    learning_rate: float = 1e-4
    optim_name: str = "ranger"
    train_decoder: bool = False
    sync_batchnorm: bool = False
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.optim_name not in OPTIMISERS:
            raise ValueError(f"--optim_name is one of {', '.join(OPTIMISERS)}, not {self.optim_name}")


class EncoderTrainer:
    """A pSp network, its loss and its optimiser on one device."""

    def __init__(self, net: pSp, loss: EncoderLoss, settings: EncoderSettings, dist: Distributed):
        self.settings, self.dist, self.loss = settings, dist, loss
        net.requires_grad_(False)
        net.encoder.requires_grad_(True)
        net.decoder.requires_grad_(settings.train_decoder)
        if settings.sync_batchnorm and dist.world_size > 1:
            if dist.device.type != "cuda":
                raise ValueError("--sync_batchnorm works on CUDA only: PyTorch has no such layer elsewhere")
            net.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(net.encoder)
        self.net = net.to(dist.device).train()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        kind = Ranger if settings.optim_name == "ranger" else torch.optim.Adam
        self.optimiser = kind(self.parameters, lr=settings.learning_rate)
        self.source = DATASETS[settings.dataset_type].source
        self.dtype = DTYPES[settings.precision]
        self.last: tuple | None = None  # source, target and output of the latest batch
        self.shown: tuple | None = None  # the same of the first batch of the latest validation
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    @property
    def step(self) -> int:
        return self.net.step

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, images: torch.Tensor) -> None:
        """One update on this process's uint8 batch [B, 3, S, S], mirrored at random."""
        self._seed()
        images = normalise(images, self.dist.device)
        source, target = make_pair(images, self.source, factors=self.settings.resize_factors, training=True)
        loss, values = self.forward(source, target, randomize_noise=True)
        loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # the mapping network has none, on any rank
        all_reduce_mean(gradients)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.net.step += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._count += 1

    def _seed(self):
        torch.manual_seed(mix_seeds(self.settings.seed, self.step, self.dist.rank))

    def forward(self, source, target, *, randomize_noise: bool):
        """Loss and its named parts of a batch in [-1, 1]; keeps (source, target, output) for the sample sheet."""
        output, codes = self.net(self.net.fit(source), randomize_noise=randomize_noise, dtype=self.dtype)
        pooled = self.net.face_pool(target)
        source = pooled if source is target else self.net.face_pool(source)
        self.last = (source, pooled, output.detach())
        return self.loss(output, pooled, source, codes, self.net.latent_avg)

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batches, n: int) -> dict[str, float]:
        """Mean of each loss over the `n` held-out images, of which `batches` gives this rank's share as uint8 batches.

        Stored noise, no mirroring, running statistics: a pure function of the weights. All ranks must call it.
        """
        self.average_statistics()
        self.net.eval()
        self.shown = None
        sums: dict[str, float] = {}
        for images in batches:
            images = normalise(images, self.dist.device)
            source, target = make_pair(images, self.source, factors=self.settings.resize_factors, training=False)
            _, values = self.forward(source, target, randomize_noise=False)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(images)
            self.shown = self.shown or self.last
        self.net.train()
        parts = gather_list(sums)
        names = next(part for part in parts if part)  # a rank may have had no image
        return {name: sum(part.get(name, 0.0) for part in parts) / n for name in names}

    def average_statistics(self) -> None:
        """The encoder's running means and variances, averaged over ranks; averaging early or late gives the same."""
        all_reduce_mean([b for b in self.net.encoder.buffers() if b.is_floating_point()])

    def share(self, n: int) -> range:
        """This rank's indices among n held-out images."""
        return shard(n, self.dist.rank, self.dist.world_size)

    def read_metrics(self) -> dict[str, float]:
        """Means of the losses since the last call, over steps and ranks; waits for the device."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() / self._count for name in names])
        all_reduce_mean([means])
        self._sums, self._count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self, opts: dict, *, optimiser: bool = True) -> dict:
        """The checkpoint: psp_state, with the optimiser's state unless told otherwise. All ranks must call it."""
        self.average_statistics()
        state = psp_state(self.net, opts)
        if optimiser:
            state |= {"optimiser": self.optimiser.state_dict(), "optim_name": self.settings.optim_name}
        return state

    def resume(self, state: dict, source) -> None:
        """Optimiser and step of state_dict(); the network has been built from the same file (psp_from_state).

        Raises CheckpointError when the file has no such state, or that of another optimiser or network.
        """
        if "optimiser" not in state:
            raise CheckpointError(
                f"{source} cannot be continued, it holds no optimiser state; --init_from starts a "
                "new run from its weights"
            )
        if state["optim_name"] != self.settings.optim_name:
            raise CheckpointError(
                f"{source} was trained with --optim_name {state['optim_name']}, this run has {self.settings.optim_name}"
            )
        try:
            self.optimiser.load_state_dict(state["optimiser"])
        except ValueError as error:
            raise CheckpointError(
                f"{source}: the optimiser belongs to another network ({error}); was --train_decoder the same?"
            ) from None
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate  # the flag of this run, not of the file
        self.net.step = int(state["step"])


def bad_values(metrics: dict[str, float]) -> list[str]:
    """Names of the losses that are not finite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]
