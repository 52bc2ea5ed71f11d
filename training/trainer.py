"""Adversarial training of the generator: the networks, their optimisers, one step, the state.

A step has up to four phases: D, R1 (every 16 steps), G, and path length (every 4 steps); with --one_stage D and G are
one. The regularisers are computed in float32 and weighted by the number of steps that they stand for (Karras et al.
2020, arXiv 1912.04958, section 3.1, appendix B).
Every random number of a step is drawn from (seed, step, phase, micro-batch), so that no random state is saved, and R
processes draw what one process draws over R micro-batches."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.checkpoint import CheckpointError, load_optimiser, load_strictly
from common.distributed import Distributed, Stats, all_reduce_mean, mix_seeds
from common.generator_file import provenance
from common.images import normalise
from common.precision import DTYPES
from dataset import mirror
from model import Discriminator, Generator, GeneratorConfig
from training import losses
from training.augment import AdaptiveAugment
from training.parts import PartDiscriminator
from training.settings import TrainSettings
from training.texture import TextureDiscriminator
from training.vision_aided import build_aux_discriminator

EMA_DECAY = 0.5 ** (32 / 10_000)  # per step, whatever the batch: rosinality's constant
EMA_RAMP = 0.05  # of the images seen so far: the longest half-life under --ema_images (stylegan2-ada-pytorch)
STATES = ("g", "d", "g_ema", "g_optim", "d_optim")  # entries that a checkpoint must have to be continued
PHASES = ("d", "r1", "g", "path", "d+g")  # the position is part of every seed
WEIGHT_STREAM = 0x77656967


@dataclass(frozen=True)
class Phase:
    """One update within a step: at every `every`-th step the optimisers follow the gradient of gain * loss."""

    name: str
    loss: Callable[[torch.Tensor], torch.Tensor]  # real images [N, 3, S, S] in [-1, 1] -> scalar
    optimisers: tuple[torch.optim.Optimizer, ...]
    every: int = 1
    gain: float = 1.0


class Trainer:
    """Generator `g`, its moving average `g_ema`, discriminator `d` and the optimisers, on one device."""

    header: dict = {}  # JSON values that exported weights carry besides their config

    def __init__(self, config: GeneratorConfig, settings: TrainSettings, dist: Distributed):
        self.config, self.settings, self.dist, device = config, settings, dist, dist.device
        # The same weights on all ranks, drawn in another stream than the z of this seed: a z that equals a row of the
        # first mapping layer has a w far from all others.
        torch.manual_seed(mix_seeds(WEIGHT_STREAM, settings.seed))
        self.g, self.d = Generator(config).to(device), Discriminator(config).to(device)
        self.g_ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.dtype = DTYPES[settings.precision]
        self.others: dict[str, nn.Module] = {}  # discriminators beside d
        if settings.vision_aided:
            self.others["aux"] = build_aux_discriminator(settings.vision_aided, self.dtype, device)
        if settings.texture_weight:
            self.others["texture"] = TextureDiscriminator(config.size).to(device)
        if settings.part_weight:
            on_parts = build_aux_discriminator(settings.vision_aided, self.dtype, device)
            self.others["part"] = PartDiscriminator(on_parts)
        target = settings.ada_target if settings.augment and not settings.augment_p else None
        ranks = {"device": device, "world_size": dist.world_size}
        self.ada = AdaptiveAugment(settings.augment_p, target, settings.ada_length, **ranks)  # without --augment: p = 0

        d_every, g_every = settings.d_reg_every, settings.g_reg_every
        self.g_optim = build_adam([self.g], settings.lr, g_every)
        self.d_optim = build_adam([self.d, *self.others.values()], settings.d_lr or settings.lr, d_every)
        of_d, of_g = (self.d_optim,), (self.g_optim,)
        phases = (
            Phase("d", self.d_loss, of_d, gain=not settings.one_stage),
            Phase("r1", self.r1_loss, of_d, d_every, settings.r1 / 2 * d_every),
            Phase("g", self.g_loss, of_g, gain=not settings.one_stage),
            Phase("d+g", self.joint_loss, of_d + of_g, gain=settings.one_stage),
            Phase("path", self.path_loss, of_g, g_every, settings.path_regularize * g_every),
        )
        self.phases = [phase for phase in phases if phase.gain]
        self.g.uses_noise = self.g_ema.uses_noise = settings.noise != "none"
        self.frozen = set() if self.g.uses_noise else set(self.g.noise_strengths)  # parameters never trained

        self.n_steps = 0
        self.warm = False  # started from trained weights (--init_from)
        self.images_before = 0  # that those weights had seen
        self.rng_offset = 0  # raised by a rollback, so that the same numbers are not drawn again
        self.mean_path_length = torch.zeros((), device=device)
        self.path_means: list[torch.Tensor] = []  # mean_path_length as each micro-batch of this step moves it
        self.stats = Stats(device)

    def step(self, images: torch.Tensor) -> None:
        """One step on this process's uint8 images [B, 3, S, S]."""
        for phase in self.phases:
            if self.n_steps % phase.every == 0:
                self.run_phase(phase, images)
        if self.path_means:
            self.mean_path_length = torch.stack(self.path_means).mean()
            all_reduce_mean([self.mean_path_length])
            self.path_means.clear()
        self.ada.update()
        update_average(self.g_ema, self.g, self.ema_decay)
        self.n_steps += 1

    @property
    def ema_decay(self) -> float:
        """Decay of the generator's average at this step. The half-life of --ema_images rises with the images seen, but
        not in a run from trained weights, whose average is good from the start (both as in stylegan2-ada-pytorch)."""
        half_life, batch = self.settings.ema_images, self.settings.batch * self.dist.world_size
        if not half_life:
            return EMA_DECAY
        if not self.warm:
            half_life = min(half_life, EMA_RAMP * self.n_steps * batch)
        return 0.5 ** (batch / half_life) if half_life else 0.0

    def run_phase(self, phase: Phase, images: torch.Tensor, *, update: bool = True) -> None:
        """Accumulate the gradients of one phase over the micro-batches; average them over ranks, update the weights."""
        for optimiser in (self.g_optim, self.d_optim):
            for parameter in optimiser.param_groups[0]["params"]:
                parameter.requires_grad_(optimiser in phase.optimisers and parameter not in self.frozen)
        trained = [p for optimiser in phase.optimisers for p in optimiser.param_groups[0]["params"] if p.requires_grad]

        n_micro = self.settings.batch // self.settings.forward
        for k, micro in enumerate(images.chunk(n_micro)):
            source = (self.settings.seed, self.rng_offset, self.n_steps, PHASES.index(phase.name))
            torch.manual_seed(mix_seeds(*source, self.dist.rank * n_micro + k))
            loss = phase.loss(mirror(normalise(micro, self.dist.device)))
            (loss * (phase.gain / n_micro)).backward(inputs=trained)  # no further than these: not into generated images

        for optimiser in phase.optimisers:
            if update:
                gradients = [p.grad for p in optimiser.param_groups[0]["params"] if p.grad is not None]
                all_reduce_mean(gradients)
                if self.dtype == torch.float16:  # overflow in one image must not end the run (stylegan2-ada-pytorch)
                    for gradient in gradients:
                        gradient.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def generate(self, n: int, dtype: torch.dtype, condition=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [n, 3, S, S] and ws [n, L, C] of fresh z, under `condition` [n, d] or a fresh one."""
        ws = draw_ws(self.g, n, self.settings.mixing)
        condition = self.draw_condition(n) if condition is None else condition
        return self.g(ws, input_is_latent=True, dtype=dtype, condition=condition)

    def discriminate(self, *batches: torch.Tensor) -> list[dict[str, list[torch.Tensor]]]:
        """Logits of each batch of images: "d" [N, 1], and of the others that are trained, "aux" [N, P] of each head of
        the vision-aided discriminator, "texture" [N, P] of each octave and "part" [N, P] of each head on the parts."""
        logits = [{"d": [self.d(self.ada(images), dtype=self.dtype)]} for images in batches]
        for of_batch, images in zip(logits, batches, strict=True):
            of_batch |= {name: network(images, self.dtype) for name, network in self.others.items()}
        return logits

    def adversarial_loss(self, name: str, criterion, *logits: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """`criterion` of the logits of d, plus the weighted means over the heads of the other discriminators."""
        weights = {"d": 1.0, "aux": self.settings.vision_aided_weight, "texture": self.settings.texture_weight}
        weights["part"], total = self.settings.part_weight, 0.0
        for network in logits[0]:
            heads = zip(*(of_batch[network] for of_batch in logits), strict=True)  # of each: the logits of every batch
            of_heads = [criterion(*of_head) for of_head in heads]
            loss = sum(of_heads) / len(of_heads)
            self.stats.report(**{name if network == "d" else f"{network}_{name}": loss})
            total = total + weights[network] * loss
        return total

    def d_loss(self, real: torch.Tensor, logits: list[dict] | None = None) -> torch.Tensor:
        """Logistic loss of D, whose logits of real images ADA counts. logits: of `discriminate` for real and generated
        images, if they are known."""
        if logits is None:
            with torch.no_grad():
                fake, _ = self.generate(len(real), self.dtype)
            logits = self.discriminate(real, fake)
        of_real, of_fake = (of_batch["d"][0] for of_batch in logits)
        self.stats.report(real=of_real.mean(), fake=of_fake.mean())
        self.ada.accumulate(of_real)
        return self.adversarial_loss("d", losses.d_logistic_loss, *logits)

    def r1_loss(self, real: torch.Tensor) -> torch.Tensor:
        real = real.requires_grad_()
        penalty = losses.r1_penalty(self.d(self.ada(real), dtype=torch.float32), real)
        self.stats.report(r1=penalty)
        return penalty

    def g_loss(self, real: torch.Tensor) -> torch.Tensor:
        condition = self.draw_condition(len(real))
        fake, ws = self.generate(len(real), self.dtype, condition)
        loss = self.adversarial_loss("g", losses.g_nonsaturating_loss, *self.discriminate(fake))
        return loss + self.condition_loss(fake, ws, condition)

    def joint_loss(self, real: torch.Tensor) -> torch.Tensor:
        """Losses of both networks on the same generated images, before either has moved: one pass of G and one of D on
        them instead of two. Shen et al. 2021, arXiv 2103.00430, scale D's gradient to be G's; here both are computed.
        """
        condition = self.draw_condition(len(real))
        fake, ws = self.generate(len(real), self.dtype, condition)
        seen = fake.detach().requires_grad_()
        logits = self.discriminate(real, seen)
        g_loss = self.adversarial_loss("g", losses.g_nonsaturating_loss, logits[1])
        (grad,) = torch.autograd.grad(g_loss, seen, retain_graph=True)
        return self.d_loss(real, logits) + (fake * grad).sum() + self.condition_loss(fake, ws, condition)

    def path_loss(self, real: torch.Tensor) -> torch.Tensor:
        """Path length penalty on a share of the batch (path_batch_shrink; rosinality's train.py)."""
        fake, ws = self.generate(max(1, len(real) // self.settings.path_batch_shrink), torch.float32)
        lengths = losses.path_lengths(fake, ws)  # [n]
        penalty, mean = losses.path_penalty(lengths, self.mean_path_length)
        self.path_means.append(mean)
        self.stats.report(path=penalty, path_length=lengths.mean())
        return penalty

    # Of a conditional generator (training/conditional.py)

    def draw_condition(self, n: int) -> torch.Tensor | None:
        """Conditions [n, d] of n images."""
        return None

    def condition_loss(self, fake: torch.Tensor, ws: torch.Tensor, condition) -> torch.Tensor | float:
        """Weighted loss of images generated from ws [n, L, C] under `condition` [n, d] or None."""
        return 0.0

    def sample_inputs(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Inputs of a sample grid, from z [n, ...]: z, conditions or None, images per row."""
        return z, None, math.ceil(len(z) ** 0.5)

    def state_dict(self) -> dict:
        """Everything a resumed run needs besides the sampler's position. All ranks must call it."""
        state = {name: getattr(self, name).state_dict() for name in STATES}
        state |= {f"{name}_d": network.state_dict() for name, network in self.others.items()}
        if self.settings.vision_aided:
            state["vision_aided"] = self.settings.vision_aided
        return state | {
            "config": self.config.to_dict(),
            "step": self.n_steps,
            "warm": self.warm,
            "images_before": self.images_before,
            "rng_offset": self.rng_offset,
            "mean_path_length": float(self.mean_path_length),
            "ada": self.ada.state_dict(),
        }

    def load_state_dict(self, state: dict, source="checkpoint") -> None:
        """Continue from state_dict(), or from a rosinality or TransStyleGAN checkpoint, which lacks config and step.
        Raises CheckpointError naming `source`."""
        if missing := [name for name in STATES if name not in state]:
            hint = "--init_from starts a new run from its weights"
            raise CheckpointError(f"{source} cannot be continued: it lacks {', '.join(missing)}; {hint}")
        for name in ("texture", "part"):
            if (f"{name}_d" in state) != (name in self.others):
                was = "with" if f"{name}_d" in state else "without"
                raise CheckpointError(f"{source} was trained {was} --{name}_weight: --init_from starts a new run of it")
        self.load_weights(state, source)
        load_optimiser(self.g_optim, state["g_optim"], f"{source}: g_optim")
        load_optimiser(self.d_optim, state["d_optim"], f"{source}: d_optim")
        self.n_steps, self.rng_offset = int(state.get("step", 0)), int(state.get("rng_offset", 0))
        self.warm, self.images_before = bool(state.get("warm")), int(state.get("images_before", 0))
        self.mean_path_length.fill_(state.get("mean_path_length", 0.0))
        if "ada" in state and self.ada.target is not None:
            self.ada.load_state_dict(state["ada"])

    def load_weights(self, state: dict, source) -> None:
        """Weights alone. An exported generator (no `d`) fills g and g_ema. CheckpointError where shapes differ."""
        average = state["g_ema"]
        for network, weights in ((self.g, state.get("g", average)), (self.g_ema, average)):
            load_strictly(network, {"token": network.token, **weights}, source)  # rosinality's files have no token
            if not network.uses_noise:
                torch._foreach_zero_([strength.data for strength in network.noise_strengths])
        if "d" in state:
            load_strictly(self.d, state["d"], source)
        for name, network in self.others.items():
            same = name == "texture" or state.get("vision_aided") == self.settings.vision_aided  # features
            if f"{name}_d" in state and same:
                load_strictly(network, state[f"{name}_d"], source)

    def warm_start(self, weights: dict, source) -> None:
        """Begin a new run with these weights (--init_from), and with what ADA's p and the mean path length had reached:
        from p = 0 the discriminator overfits for 20,000 images, until p is back (docs/log.md)."""
        self.load_weights(weights, source)
        self.warm, self.images_before = True, provenance(weights).get("images", 0)
        self.mean_path_length.fill_(weights.get("mean_path_length", 0.0))
        if self.ada.target is not None:
            self.ada.p = weights.get("ada", {}).get("p", self.ada.p)


def build_adam(networks: list[nn.Module], lr: float, reg_every: int) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (arXiv 1912.04958, appendix B)."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    ratio = reg_every / (reg_every + 1)
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=(0.0**ratio, 0.99**ratio), fused=fused)


@torch.no_grad()
def update_average(average: Generator, generator: Generator, decay: float) -> None:
    """Exponential moving average of the parameters; buffers (noise maps, token) are copied."""
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(generator.parameters()), None)
    torch._foreach_copy_(list(average.buffers()), list(generator.buffers()))


def draw_ws(g: Generator, n: int, mixing: float) -> torch.Tensor:
    """ws [n, L, C] of fresh z; in W with style mixing (Karras et al. 2019, arXiv 1812.04948, section 3.1). Both z of a
    mixture are mapped whether or not they are mixed: no host sync, the same shapes in every step."""
    device, n_tokens = g.token.device, g.config.n_tokens
    z = torch.randn(n, *g.draw_z(0).shape[1:], device=device)
    ws = g.get_latent(z)  # [n, L, C]
    if not g.config.w_space or not mixing:
        return ws
    second = g.get_latent(torch.randn_like(z))
    mixed = torch.rand((), device=device) < mixing
    crossover = torch.randint(1, n_tokens, (), device=device)
    first_layers = torch.where(mixed, crossover, n_tokens)  # those of the first z
    return torch.where(torch.arange(n_tokens, device=device)[:, None] < first_layers, ws, second)
