"""The GAN game: the four phases of a training step, their optimisers, averages and state.

Non-saturating logistic loss with lazy R1 and lazy path-length regularisation (Karras et al. 2020, arXiv 1912.04958,
sections 3.1 and 3.2), the regularisers in float32. `train.py` is the command line around `Trainer`.

Every random number of a step is drawn from (seed, step, phase, micro-batch): nothing about random state needs saving,
a resumed run repeats the uninterrupted one, and R processes draw what one process draws over R micro-batches.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.checkpoint import CheckpointError, load_strictly
from common.distributed import Distributed, all_reduce_mean, mix_seeds
from common.precision import DTYPES
from model import Discriminator, Generator, GeneratorConfig
from training.augment import AdaptiveAugment
from training.vision_aided import build_critic, over_heads

EMA_DECAY = 0.5 ** (32 / 10_000)  # per step, whatever the batch: the published constant
PATH_DECAY = 0.01
PHASES = ("d", "r1", "g", "path")
WEIGHT_STREAM = 0x77656967


@dataclass(frozen=True)
class TrainSettings:
    """What the game depends on; the names are train.py's flags. Raises ValueError for what cannot work."""

    batch: int = 16  # per process
    micro_batch: int = 0  # images per forward pass; 0: the whole batch
    lr: float = 0.002
    d_lr: float = 0.0  # of the discriminator; 0: lr
    r1: float = 10.0
    path_regularize: float = 2.0
    path_batch_shrink: int = 2
    d_reg_every: int = 16
    g_reg_every: int = 4
    mixing: float = 0.9  # W only: W++ has one z per token already
    augment: bool = False
    augment_p: float = 0.0  # 0: adaptive; else fixed
    ada_target: float = 0.6
    ada_length: int = 500_000
    aid: str = ""  # a perceptual distance whose network lends its eyes to a second critic (training/vision_aided.py)
    aid_weight: float = 1.0
    noise: str = "random"  # none: no noise enters the generator, whose codes must then say everything
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        for name in ("batch", "lr", "path_batch_shrink", "d_reg_every", "g_reg_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("r1", "path_regularize", "d_lr", "aid_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("mixing", "augment_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a probability, 0 to 1, got {getattr(self, name)}")
        if self.micro_batch < 0 or (self.micro_batch and self.batch % self.micro_batch):
            raise ValueError(f"--micro_batch {self.micro_batch} must divide --batch {self.batch}")

    @property
    def n_micro(self) -> int:
        return self.batch // self.micro_batch if self.micro_batch else 1


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def d_logistic_loss(real_logits, fake_logits):
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def g_nonsaturating_loss(fake_logits):
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits, real):
    """Mean squared gradient norm of the logits at the real images (Mescheder et al. 2018, arXiv 1801.04406)."""
    (grad,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def path_lengths(images, latents):
    """|J^T y| per image, [N]: y ~ N(0, 1/pixels), RMS over tokens of the codes [N, L, C] (arXiv 1912.04958, 3.2)."""
    noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
    return grad.square().sum(2).mean(1).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class Trainer:
    """Generator, its moving average, discriminator and optimisers on one device; `train_step` plays one round."""

    def __init__(self, config: GeneratorConfig, settings: TrainSettings, dist: Distributed):
        self.config, self.settings, self.dist = config, settings, dist
        # All ranks start from the same weights; not from the numbers that latents of the same seed are made of, else a
        # latent would be a row of the first mapping layer and its code far outside of all others.
        torch.manual_seed(mix_seeds(WEIGHT_STREAM, settings.seed))
        self.g = Generator(config).to(dist.device)
        self.d = Discriminator(config).to(dist.device)
        self.g_ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.ada = AdaptiveAugment(
            settings.augment_p,
            None if settings.augment_p else settings.ada_target,
            settings.ada_length,
            device=dist.device,
        )
        self.dtype = DTYPES[settings.precision]
        self.critic = build_critic(settings.aid, self.dtype).to(dist.device) if settings.aid else None
        self.g_optim = self._adam(self.g, settings.lr, settings.g_reg_every)
        self.d_optim = self._adam(self.d, settings.d_lr or settings.lr, settings.d_reg_every)
        self.mean_path_length = torch.zeros((), device=dist.device)
        self.step = 0
        self.salt = 0  # raised by a rollback, so that the same numbers are not drawn again
        self._average = get_ema_multi_avg_fn(EMA_DECAY)
        self._path_mean = torch.zeros((), device=dist.device)  # over this step's micro-batches
        self._sums: dict[str, torch.Tensor] = {}  # [sum, count] of each metric since the last log tick
        if settings.noise == "none":
            for strength in self._silence():
                strength.register_hook(torch.zeros_like)

    @torch.no_grad()
    def _silence(self) -> list[torch.Tensor]:
        """Sets the noise strengths to zero, and returns those that are trained."""
        for network in (self.g_ema, self.g):
            strengths = [p for name, p in network.named_parameters() if name.endswith("noise.weight")]
            torch._foreach_zero_(strengths)
        return strengths

    def weights_of(self, network) -> list[nn.Parameter]:
        """What is trained together: the critic's heads go with the discriminator."""
        heads = self.critic.parameters() if self.critic is not None and network is self.d else ()
        return [*network.parameters(), *heads]

    def _adam(self, network, lr, reg_every):
        """Adam corrected for lazy regularisation (arXiv 1912.04958, appendix B)."""
        ratio = reg_every / (reg_every + 1)
        fused = self.dist.device.type in ("cuda", "cpu")
        return torch.optim.Adam(self.weights_of(network), lr=lr * ratio, betas=(0.0**ratio, 0.99**ratio), fused=fused)

    # -- one round ----------------------------------------------------------------------------------------------------

    def train_step(self, images: torch.Tensor) -> None:
        """One step on this process's uint8 batch [B, 3, S, S]: D, every d_reg_every R1, G, every g_reg_every path."""
        settings = self.settings
        self._optimise(self.d_optim, self.d, self.d_phase, images, "d")
        if settings.r1 and self.step % settings.d_reg_every == 0:
            self._optimise(self.d_optim, self.d, self.r1_phase, images, "r1")
        self._optimise(self.g_optim, self.g, self.g_phase, images, "g")
        if settings.path_regularize and self.step % settings.g_reg_every == 0:
            self._optimise(self.g_optim, self.g, self.path_phase, images, "path")
            self.mean_path_length.copy_(self._path_mean)
            self._path_mean.zero_()
            all_reduce_mean([self.mean_path_length])
        if settings.augment:
            self.ada.update(all_reduce=torch.distributed.all_reduce if self.dist.world_size > 1 else None)
        self.average()
        self.step += 1

    def _optimise(self, optimiser, network, phase, images, name):
        self.select(network)
        self.accumulate_gradients(phase, images, name)
        gradients = [p.grad for p in self.weights_of(network) if p.grad is not None]
        all_reduce_mean(gradients)
        if self.dtype == torch.float16:  # overflow in one image must not end the run (stylegan2-ada-pytorch does this)
            for gradient in gradients:
                gradient.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def select(self, network):
        """Gradients for the weights of one network alone."""
        self.g.requires_grad_(network is self.g)
        self.d.requires_grad_(network is self.d)
        if self.critic is not None:
            self.critic.requires_grad_(network is self.d)

    def accumulate_gradients(self, phase, images, name):
        """Backward passes of one phase over the micro-batches; gradients are those of the mean over the batch."""
        n_micro = self.settings.n_micro
        for k, micro in enumerate(images.chunk(n_micro)):
            self._seed(name, self.dist.rank * n_micro + k)
            phase(self.prepare(micro), 1 / n_micro)

    def _seed(self, phase: str, micro_index: int):
        torch.manual_seed(mix_seeds(self.settings.seed, self.salt, self.step, PHASES.index(phase), micro_index))

    def prepare(self, images):
        """uint8 [N, 3, S, S] -> float32 in [-1, 1], each image mirrored with probability one half."""
        images = images.to(self.dist.device).float().div_(127.5).sub_(1)
        mirror = torch.rand(images.shape[0], 1, 1, 1, device=images.device) < 0.5
        return torch.where(mirror, images.flip(3), images)

    def draw_codes(self, n):
        """w codes [n, L, C] of fresh latents; in W with style mixing (Karras et al. 2019, arXiv 1812.04948, 3.1).

        Both latents are mapped whether or not they are mixed, so that the shapes are the same in every step.
        """
        g, config, device = self.g, self.config, self.dist.device
        z = torch.randn(n, *g.draw_z(0).shape[1:], device=device)
        codes = g.get_latent(z)
        if not config.w_space or not self.settings.mixing:
            return codes
        second = g.get_latent(torch.randn_like(z))
        mixed = torch.rand((), device=device) < self.settings.mixing
        crossover = torch.randint(1, config.n_tokens, (), device=device)
        first_layers = torch.where(mixed, crossover, config.n_tokens)  # those of the first latent
        return torch.where(torch.arange(config.n_tokens, device=device)[:, None] < first_layers, codes, second)

    def synthesise(self, n, dtype):
        """Images and codes of n fresh latents."""
        return self.g(self.draw_codes(n), input_is_latent=True, dtype=dtype)

    def judge(self, images, dtype):
        return self.d(self.ada(images) if self.settings.augment else images, dtype=dtype)

    def d_phase(self, real, weight):
        with torch.no_grad():
            fake, _ = self.synthesise(real.shape[0], self.dtype)
        real_logits, fake_logits = self.judge(real, self.dtype), self.judge(fake, self.dtype)
        if self.settings.augment:
            self.ada.accumulate(real_logits)
        loss = d_logistic_loss(real_logits, fake_logits)
        total = loss
        if self.critic is not None:
            aided = over_heads(d_logistic_loss, self.critic(real, self.dtype), self.critic(fake, self.dtype))
            total = loss + self.settings.aid_weight * aided
            self.note(critic=aided)
        (total * weight).backward()
        self.note(d=loss, real=real_logits.mean(), fake=fake_logits.mean())

    def r1_phase(self, real, weight):
        real = real.requires_grad_()
        penalty = r1_penalty(self.judge(real, torch.float32), real)
        (penalty * (self.settings.r1 / 2 * self.settings.d_reg_every * weight)).backward()
        self.note(r1=penalty)

    def g_phase(self, real, weight):
        fake, _ = self.synthesise(real.shape[0], self.dtype)
        (self.realism_loss(fake) * weight).backward()

    def realism_loss(self, fake):
        """What G minimises: the discriminator's verdict, and the critic's where there is one."""
        loss = g_nonsaturating_loss(self.judge(fake, self.dtype))
        self.note(g=loss)
        if self.critic is None:
            return loss
        aided = over_heads(g_nonsaturating_loss, self.critic(fake, self.dtype))
        self.note(g_critic=aided)
        return loss + self.settings.aid_weight * aided

    def path_phase(self, real, weight):
        n = max(1, real.shape[0] // self.settings.path_batch_shrink)
        fake, codes = self.synthesise(n, torch.float32)
        lengths = path_lengths(fake, codes)
        mean = torch.lerp(self.mean_path_length, lengths.mean(), PATH_DECAY)
        penalty = (lengths - mean).square().mean()
        (penalty * (self.settings.path_regularize * self.settings.g_reg_every * weight)).backward()
        self._path_mean += mean.detach() * weight
        self.note(path=penalty, path_length=lengths.mean())

    def sheet(self, z):
        """What a sample sheet of latents z [n, ...] shows: latents, conditions or None, pictures per row."""
        return z, None, math.ceil(len(z) ** 0.5)

    @torch.no_grad()
    def average(self):
        """Moving average of the parameters; buffers (noise maps, token) are carried over as they are."""
        self._average(list(self.g_ema.parameters()), list(self.g.parameters()), None)
        torch._foreach_copy_(list(self.g_ema.buffers()), list(self.g.buffers()))

    def broken_networks(self) -> list[str]:
        """Names of the networks that hold a NaN or an infinity; waits for the device."""
        networks = {"g": self.g, "d": self.d, "g_ema": self.g_ema}
        return [
            name for name, network in networks.items() if not all(torch.isfinite(p).all() for p in network.parameters())
        ]

    def rehearse(self, images: torch.Tensor) -> None:
        """The backward passes of all four phases, without a trace: to see whether a micro-batch fits in memory."""
        ada = self.ada.state_dict()
        phases = [
            (self.g, self.g_phase, "g"),
            (self.g, self.path_phase, "path"),
            (self.d, self.d_phase, "d"),
            (self.d, self.r1_phase, "r1"),
        ]
        try:
            for network, phase, name in phases:
                self.select(network)
                self.accumulate_gradients(phase, images, name)
        finally:
            for network in (self.g, self.d):
                network.zero_grad(set_to_none=True)
            self.ada.load_state_dict(ada)
            for tensor in (self._path_mean, *self._sums.values()):
                tensor.zero_()

    # -- metrics ------------------------------------------------------------------------------------------------------

    def note(self, **values):
        """Add up a scalar per name on the device, to be read at the next log tick."""
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(2, device=self.dist.device)
            self._sums[name][0] += value.detach()
            self._sums[name][1] += 1

    def read_metrics(self) -> dict[str, float]:
        """Means over the steps since the last call and over ranks; the one place that waits for the device."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])  # [names, 2]
        for tensor in self._sums.values():
            tensor.zero_()
        all_reduce_mean([sums])
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}

    # -- state --------------------------------------------------------------------------------------------------------

    def header(self) -> dict:
        """What an exported generator of this run says besides its config, JSON values."""
        return {}

    def state_dict(self) -> dict:
        """Everything a resumed run needs besides the sampler's position. All ranks must call it."""
        reduce = torch.distributed.all_reduce if self.dist.world_size > 1 else None
        return {
            "g": self.g.state_dict(),
            "d": self.d.state_dict(),
            "g_ema": self.g_ema.state_dict(),
            "g_optim": self.g_optim.state_dict(),
            "d_optim": self.d_optim.state_dict(),
            "config": self.config.to_dict(),
            "step": self.step,
            "salt": self.salt,
            "mean_path_length": float(self.mean_path_length),
            "ada": self.ada.state_dict(reduce),
            **({} if self.critic is None else {"critic": self.critic.state_dict(), "aid": self.settings.aid}),
        }

    def load_state_dict(self, state: dict, source="checkpoint") -> None:
        """Continue from state_dict(), or from a rosinality or TransStyleGAN checkpoint, which lacks config and step."""
        missing = [name for name in ("g", "d", "g_ema", "g_optim", "d_optim") if name not in state]
        if missing:
            raise CheckpointError(
                f"{source} cannot be continued: it lacks {', '.join(missing)}; "
                "--init_from starts a new run from its weights"
            )
        if state.get("aid", "") != self.settings.aid:
            raise CheckpointError(
                f"{source} was trained with --aid {state.get('aid') or '(none)'}, not "
                f"{self.settings.aid or '(none)'}: --init_from starts a new run from its weights"
            )
        self.load_networks(state, source)
        for optimiser, name in ((self.g_optim, "g_optim"), (self.d_optim, "d_optim")):
            settings = [(group["lr"], group["betas"], group["fused"]) for group in optimiser.param_groups]
            try:
                optimiser.load_state_dict(state[name])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{source}: {name} belongs to another network ({error})") from None
            for parameter, moments in optimiser.state.items():  # Adam does not look at shapes
                if moments["exp_avg"].shape != parameter.shape:
                    shapes = f"{list(moments['exp_avg'].shape)} for {list(parameter.shape)}"
                    raise CheckpointError(f"{source}: {name} belongs to another network (moments {shapes})")
            for group, (lr, betas, fused) in zip(optimiser.param_groups, settings, strict=True):
                group.update(lr=lr, betas=betas, fused=fused, foreach=None)  # the flags of this run, not of the file
        self.step = int(state.get("step", 0))
        self.salt = int(state.get("salt", 0))
        self.mean_path_length.fill_(state.get("mean_path_length", 0.0))
        if "ada" in state:
            keep = float(self.ada.p)
            self.ada.load_state_dict(state["ada"], is_main=self.dist.is_main)
            if self.settings.augment_p:
                self.ada.p.fill_(keep)

    def adopt(self, weights: dict, source) -> None:
        """Begin a new run with these weights (--init_from)."""
        self.load_networks(weights, source)

    def load_networks(self, state: dict, source) -> None:
        """Weights alone. An exported generator (no `d`) fills g and g_ema. CheckpointError where shapes differ."""
        average = state.get("g_ema", state)
        for network, weights in ((self.g, state.get("g", average)), (self.g_ema, average), (self.d, state.get("d"))):
            if weights is not None:
                if isinstance(network, Generator):
                    weights = {"token": network.token, **weights}
                load_strictly(network, weights, source)
        if self.critic is not None and state.get("aid") == self.settings.aid:
            self.critic.load_state_dict(state["critic"])
        if self.settings.noise == "none":
            self._silence()
