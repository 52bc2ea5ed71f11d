"""The projector: find the latent code, and the noise maps, with which a generator reproduces given images.

Adam on the code and on one set of noise maps per image (Karras et al. 2020, arXiv 1912.04958, appendix D), with the
constants of the official projector. In W one vector serves all layers; in W+ (Abdal et al. 2019, arXiv 1904.03189) every
layer has its own; in W++ (Li et al. 2024, arXiv 2105.14230) that is what the mapping network itself gives.

Nothing passes between the images of a batch: losses, noise regularisation, noise normalisation, draws and the decision
to stop belong to each image alone. (The published program averages the noise terms over the batch; for one image both
are the same.) The rest is rounding, which differs with the batch on every device and grows over the steps.

    perceptual = build_perceptual("squeeze", "cpu")
    result = project(generator, images, perceptual=perceptual, steps=300)         # images [N, 3, S, S] in [-1, 1]
    picture, _ = generator(result.latents, input_is_latent=True, noise=result.noise)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model import Generator

SPACES = {"w": ("w", "w+"), "w++": ("w++",)}  # of a generator -> of its codes, the default first
CURVE_EVERY = 10  # steps between two points of a loss curve: the published interval
PERCEPTUAL_SIZE = 256  # larger images are averaged down to it for the perceptual distance, as the published program does
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
CURVES = ("perceptual", "noise", "mse")


@dataclass(frozen=True)
class ProjectionSettings:
    """The numbers of the optimisation; the defaults are the published ones. Raises ValueError for impossible ones."""

    steps: int = 1000
    lr: float = 0.1
    lr_rampup: float = 0.05  # fraction of the steps in which the step size rises from 0
    lr_rampdown: float = 0.25  # fraction in which it falls back, as a cosine
    noise: float = 0.05  # perturbation of the code at the first step, in standard deviations of w (norm, per token)
    noise_ramp: float = 0.75  # fraction of the steps in which it falls to 0
    noise_regularize: float = 1e5  # weight of the autocorrelation of the noise maps
    mse: float = 0.0  # weight of the mean squared error on [-1, 1]; reported in any case
    early_stop: float = 0.0  # relative improvement per window below which an image begins its ramp-down; 0: never

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("lr", "noise", "noise_regularize", "mse"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("lr_rampup", "lr_rampdown", "noise_ramp", "early_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction from 0 to 1, got {getattr(self, name)}")

    @property
    def window(self) -> int:
        """Steps over which the loss is averaged before it is compared with the window before."""
        return max(CURVE_EVERY, self.steps // 20)


@dataclass
class Projection:
    """What `project` returns, all on the CPU."""

    latents: torch.Tensor  # float32 [N, L, D]
    noise: list[torch.Tensor]  # per layer, float32 [N, 1, r, r]
    space: str
    curves: dict[str, torch.Tensor]  # CURVES, each [N, T]: values at steps 0, 10, 20 ...; NaN after an image stopped
    steps: torch.Tensor  # int64 [N], taken per image
    finite: torch.Tensor = field(default=None)  # bool [N]: False where the optimisation diverged

    def __post_init__(self):
        if self.finite is None:
            self.finite = torch.isfinite(self.latents).flatten(1).all(1)


def choose_space(generator: Generator, space: str | None) -> str:
    """`space`, or the generator's default. ValueError when its codes do not live there."""
    own = generator.config.space
    if space is None:
        return SPACES[own][0]
    if space not in SPACES[own]:
        raise ValueError(
            f"space {space} does not exist in a {own.upper()} generator, whose codes are in "
            f"{' or '.join(SPACES[own])}: W and W+ need a W generator, W++ a W++ generator"
        )
    return space


# ---------------------------------------------------------------------------------------------------------------------
# Losses, each [N]: one value per image


def noise_regularisation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared autocorrelation at a shift of one pixel, over all maps [N, 1, r, r] and scales down to 8 -> [N].

    Keeps the maps from carrying the picture (arXiv 1912.04958, eq. 11).
    """
    total = 0
    for noise in maps:
        while True:
            for axis in (2, 3):
                total = total + (noise * noise.roll(1, axis)).mean((1, 2, 3)).square()
            if noise.shape[-1] <= 8:
                break
            noise = F.avg_pool2d(noise, 2)
    return total


def mean_squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] -> [N]."""
    return (a - b).square().mean((1, 2, 3))


class Target:
    """The images to reproduce, with their perceptual features, which are computed once."""

    def __init__(self, images: torch.Tensor, perceptual):
        self.images, self.perceptual = images, perceptual
        with torch.no_grad():
            self.features = perceptual.features(shrink(images))

    def distance(self, images) -> torch.Tensor:
        return self.perceptual.distance(self.perceptual.features(shrink(images)), self.features)  # [N]

    def keep(self, chosen: torch.Tensor) -> None:
        self.images = self.images[chosen]
        self.features = [layer[chosen] for layer in self.features]


def shrink(images):
    """Averaged down to 256 pixels when larger: what the perceptual networks were made for."""
    size = images.shape[-1]
    return F.avg_pool2d(images, size // PERCEPTUAL_SIZE) if size > PERCEPTUAL_SIZE else images


# ---------------------------------------------------------------------------------------------------------------------
# Variables


class Variables:
    """Codes and noise maps of A images as one leaf [A, P], with Adam's moments: an image is a row.

    The row is (codes [C, D] with C = 1 in W, else L; then the noise maps). Adam is elementwise, so one formula serves
    all, with a step size per row (Kingma & Ba 2015, arXiv 1412.6980).
    """

    def __init__(self, codes: torch.Tensor, maps: Sequence[torch.Tensor]):
        parts = [codes, *maps]
        self.shapes = [part.shape[1:] for part in parts]
        self.sizes = [part[0].numel() for part in parts]
        self.rows = torch.cat([part.flatten(1) for part in parts], 1)  # [A, P]
        self.first, self.second = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.updates = 0

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows [A, P] -> codes [A, C, D] and maps [A, 1, r, r], views."""
        parts = [part.unflatten(1, shape) for part, shape in
                 zip(rows.split(self.sizes, 1), self.shapes, strict=True)]  # fmt: skip
        return parts[0], parts[1:]

    @torch.no_grad()
    def update(self, gradient: torch.Tensor, lr: torch.Tensor) -> None:
        """One step of Adam, lr [A]; then every noise map is brought back to mean 0 and standard deviation 1."""
        self.updates += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = self.second.div(1 - BETAS[1] ** self.updates).sqrt_().add_(EPSILON)
        self.rows.sub_(scale.reciprocal_().mul_(self.first).mul_((lr / (1 - BETAS[0] ** self.updates))[:, None]))
        for noise in self.rows.split(self.sizes, 1)[1:]:  # [A, r*r]
            std, mean = torch.std_mean(noise, 1, keepdim=True)
            noise.sub_(mean).div_(std)

    def keep(self, chosen: torch.Tensor) -> None:
        self.rows, self.first, self.second = self.rows[chosen], self.first[chosen], self.second[chosen]


class Schedule:
    """Step size, perturbation and end of every image: the published ramps, until an image stops improving.

    Plateau rule: the loss of an image, averaged over a window (a twentieth of the steps), is less than `early_stop`
    (relatively) below that of the window before. From there on the image goes as if its run had been planned to end
    soon: no perturbation, and a ramp-down that takes the same fraction of its own total.
    """

    def __init__(self, settings: ProjectionSettings, n: int):
        self.settings = settings
        self.end = torch.full((n,), float(settings.steps))  # step at which each image is done
        self.tail = torch.full((n,), settings.lr_rampdown * settings.steps)  # length of its ramp-down
        self.hurried = torch.zeros(n, dtype=torch.bool)
        self.last: torch.Tensor | None = None  # mean loss of the window before
        self.sum: torch.Tensor | None = None

    def lr(self, step: int) -> torch.Tensor:
        """[A]; the first step has size 0, as published, when there is a ramp-up."""
        rampup = self.settings.lr_rampup * self.settings.steps
        rise = min(1.0, step / rampup) if rampup else 1.0
        left = ((self.end - step) / self.tail.clamp(min=1e-9)).clamp(max=1)
        return self.settings.lr * rise * (0.5 - 0.5 * torch.cos(left * math.pi))

    def perturbation(self, step: int) -> torch.Tensor:
        """[A], in standard deviations of w."""
        ramp = self.settings.noise_ramp * self.settings.steps
        strength = self.settings.noise * max(0.0, 1 - step / ramp) ** 2 if ramp else 0.0
        return torch.where(self.hurried, 0.0, strength)

    def observe(self, step: int, loss: torch.Tensor) -> None:
        """Take note of the losses [A] of a step; begin the ramp-down of those on a plateau."""
        settings = self.settings
        if not settings.early_stop:
            return
        self.sum = loss if self.sum is None else self.sum + loss
        if (step + 1) % settings.window:
            return
        mean, self.sum = (self.sum / settings.window).cpu(), None
        if self.last is not None:
            flat = (self.last - mean < settings.early_stop * self.last) & ~self.hurried
            done = step + 1
            tail = math.ceil(done * settings.lr_rampdown / max(1 - settings.lr_rampdown, 1e-9))
            flat &= self.end > done + tail
            self.end[flat], self.tail[flat] = done + tail, tail
            self.hurried |= flat
        self.last = mean

    def keep(self, chosen: torch.Tensor) -> None:
        self.end, self.tail, self.hurried = self.end[chosen], self.tail[chosen], self.hurried[chosen]
        self.last = None if self.last is None else self.last[chosen]
        self.sum = None if self.sum is None else self.sum[chosen.to(self.sum.device)]


# ---------------------------------------------------------------------------------------------------------------------
# The optimisation


def project(
    generator: Generator,
    images: torch.Tensor,
    *,
    perceptual,
    space: str | None = None,
    start: torch.Tensor | None = None,
    start_noise: Sequence[torch.Tensor] | None = None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    condition: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    watch: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    **settings,
) -> Projection:
    """Codes and noise maps for images [N, 3, S, S] in [-1, 1], on the generator's device.

    perceptual: a network of common/perceptual.py. space: w, w+ or w++ (default: w for a W generator). start: codes
    [N or 1, L, D] to begin with (default: the mean code); start_noise: maps [N, 1, r, r] (default: drawn). statistics:
    mean [1, L, D] and standard deviation [L] of w (default: generator.latent_statistics()). seeds: of each image's
    draws (default 0, 1, ...). condition: attributes [N, condition_dim] that stay fixed. dtype: of the convolutions.
    watch(step, indices [A], images [A, 3, S, S], losses [A]) sees every step of the images still in work.
    settings: ProjectionSettings. Raises ValueError for a space or shapes that do not fit the generator.
    """
    settings = ProjectionSettings(**settings)
    space = choose_space(generator, space)
    config, device, n = generator.config, generator.token.device, len(images)
    if images.shape[1:] != (3, config.size, config.size) or n == 0:
        raise ValueError(f"images must be [N, 3, {config.size}, {config.size}], got {list(images.shape)}")
    mean, std = (value.to(generator.token) for value in statistics or generator.latent_statistics())
    n_codes = 1 if space == "w" else config.n_tokens
    draws = [torch.Generator().manual_seed(int(seed)) for seed in (range(n) if seeds is None else seeds)]
    maps = _first_noise(config, draws)
    if start_noise is not None:
        maps = [given.to(drawn) for given, drawn in zip(start_noise, maps, strict=True)]
    start = _first_codes(mean if start is None else start, n, space, config)
    variables = Variables(start.to(std), [noise.to(std) for noise in maps])
    std = std[:n_codes, None]  # [C, 1]

    schedule, target = Schedule(settings, n), Target(images.to(std), perceptual)
    result = variables.rows.clone()  # [N, P], filled row by row as images finish
    curves = {name: torch.full((n, len(range(0, settings.steps, CURVE_EVERY))), math.nan, device=device, dtype=std.dtype)
              for name in CURVES}  # fmt: skip
    taken = torch.zeros(n, dtype=torch.int64)
    active = torch.arange(n)
    with _frozen(generator), _frozen(perceptual):
        for step in range(settings.steps):
            rows = variables.rows.requires_grad_()
            codes, maps = variables.split(rows)
            codes = codes + _perturb(schedule.perturbation(step), draws, n_codes, config.style_dim, std) * std
            picture, _ = generator(
                codes.expand(-1, config.n_tokens, -1), input_is_latent=True, noise=maps, dtype=dtype,
                condition=None if condition is None else condition[active].to(device),
            )  # fmt: skip
            losses = {
                "perceptual": target.distance(picture), "noise": noise_regularisation(maps),
                "mse": mean_squared_error(picture, target.images),
            }  # fmt: skip
            visible = losses["perceptual"] + settings.mse * losses["mse"]  # [A]
            loss = visible + settings.noise_regularize * losses["noise"]
            (gradient,) = torch.autograd.grad(loss.sum(), rows)
            variables.rows = rows.detach()
            variables.update(gradient, schedule.lr(step).to(device))

            if step % CURVE_EVERY == 0:
                for name, curve in curves.items():
                    curve[active.to(device), step // CURVE_EVERY] = losses[name].detach()
            schedule.observe(step, visible.detach())
            if watch is not None:
                watch(step, active, picture.detach(), visible.detach())
            done = schedule.end <= step + 1
            if done.any():
                result[active[done].to(device)] = variables.rows[done.to(device)]
                taken[active[done]] = step + 1
                chosen = ~done
                if not chosen.any():
                    break
                draws = [draw for draw, keep in zip(draws, chosen.tolist(), strict=True) if keep]
                active = active[chosen]
                for part in (variables, target):
                    part.keep(chosen.to(device))
                schedule.keep(chosen)

    codes, maps = variables.split(result.cpu())
    latents = codes.expand(-1, config.n_tokens, -1).contiguous()  # [N, L, D]
    return Projection(latents, [noise.contiguous() for noise in maps], space,
                      {name: curve.cpu() for name, curve in curves.items()}, taken)  # fmt: skip


def _first_codes(start, n, space, config) -> torch.Tensor:
    """[N, C, D] from codes [N or 1, L, D]; in W the mean over layers (equal ones stay as they are)."""
    if start.ndim != 3 or start.shape[1:] != (config.n_tokens, config.style_dim) or len(start) not in (1, n):
        raise ValueError(f"start must be [{n} or 1, {config.n_tokens}, {config.style_dim}], got {list(start.shape)}")
    if space == "w":
        same = (start == start[:, :1]).all()
        start = start[:, :1] if same else start.mean(1, keepdim=True)
    return start.expand(n, -1, -1)


def _first_noise(config, draws) -> list[torch.Tensor]:
    sides = [config.noise_size(i) for i in range(config.n_noise)]
    return [torch.stack([torch.randn(1, side, side, generator=draw) for draw in draws]) for side in sides]


def _perturb(strength, draws, n_codes, dim, like) -> torch.Tensor:
    """Normal noise [A, C, D] times each image's strength, from each image's own stream, which rests at strength 0."""
    noise = torch.zeros(len(draws), n_codes, dim)
    for row, (draw, value) in enumerate(zip(draws, strength.tolist(), strict=True)):
        if value:
            torch.randn(n_codes, dim, generator=draw, out=noise[row])
    return noise.mul_(strength[:, None, None]).to(like, non_blocking=True)


@contextmanager
def _frozen(network) -> Iterator[None]:
    """No gradients for the weights, which nobody asks for and which would cost as much as all the rest."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
