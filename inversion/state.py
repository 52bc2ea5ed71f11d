"""The images in work: what belongs to each of them alone while it is projected (see projection.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model import Generator
from perceptual.image_metrics import average_down

CURVE_EVERY = 10  # steps between two points of a loss curve: the published interval
CURVES = ("perceptual", "noise", "mse")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


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
class Task:
    """One image to project, with what belongs to it alone."""

    image: torch.Tensor  # [3, S, S] in [-1, 1]
    seed: int = 0  # of its noise maps and perturbations
    start: torch.Tensor | None = None  # code [L, D] to begin with; default the mean code
    noise: Sequence[torch.Tensor] | None = None  # maps [1, r, r] to begin with; default drawn from the seed
    condition: torch.Tensor | None = None  # [condition_dim] of a conditional generator; stays fixed


@dataclass
class Projection:
    """What came out: of one image from `project_each`, of N, with a leading dimension, from `project`. On the CPU."""

    latents: torch.Tensor  # float32 [L, D]; not finite where the optimisation diverged
    noise: list[torch.Tensor]  # per layer, float32 [1, r, r]
    curves: dict[str, torch.Tensor]  # CURVES, each [T]: values at steps 0, 10, 20 ...; NaN after an early stop
    steps: torch.Tensor  # int64 [], taken
    space: str


class Clock:
    """Step size, perturbation and end of one image: the published ramps, until it stops improving.

    Plateau rule: the loss of the image, averaged over a window (a twentieth of the steps), is less than `early_stop`
    (relatively) below that of the window before. From there on the image goes as if its run had been planned to end
    soon: no perturbation, and a ramp-down that takes the same fraction of its own total.
    """

    def __init__(self, settings: ProjectionSettings):
        self.settings = settings
        self.step = 0
        self.end = settings.steps
        self.tail = settings.lr_rampdown * settings.steps  # length of the ramp-down
        self.on_plateau = False
        self.last: float | None = None  # mean loss of the window before

    @property
    def done(self) -> bool:
        return self.step >= self.end

    @property
    def lr(self) -> float:
        """0 at the first step, as published, when there is a ramp-up; 0 when done."""
        if self.done:
            return 0.0
        rampup = self.settings.lr_rampup * self.settings.steps
        rise = min(1.0, self.step / rampup) if rampup else 1.0
        left = min(1.0, (self.end - self.step) / self.tail) if self.tail else 1.0
        return self.settings.lr * rise * (0.5 - 0.5 * math.cos(left * math.pi))

    @property
    def perturbation(self) -> float:
        """In standard deviations of w."""
        ramp = self.settings.noise_ramp * self.settings.steps
        if self.on_plateau or self.done or not ramp:
            return 0.0
        return self.settings.noise * max(0.0, 1 - self.step / ramp) ** 2

    @property
    def at_window(self) -> bool:
        return bool(self.settings.early_stop) and self.step % self.settings.window == 0

    def observe(self, mean: float) -> None:
        """The mean loss of the window that ends here; begins the ramp-down on a plateau."""
        if self.last is not None and not self.on_plateau and self.last - mean < self.settings.early_stop * self.last:
            down = self.settings.lr_rampdown
            tail = math.ceil(self.step * down / max(1 - down, 1e-9))
            if self.step + tail < self.end:
                self.end, self.tail, self.on_plateau = self.step + tail, tail, True
        self.last = mean


class Rows:
    """K images in work. Codes and noise maps are one leaf [K, P], an image a row: (codes [C, D], C = 1 in W, else L;
    then the maps). Adam is elementwise, so one formula serves all, with a step size per row (arXiv 1412.6980)."""

    def __init__(self, n_rows: int, generator: Generator, perceptual, settings: ProjectionSettings, space: str, mean):
        config, like = generator.config, mean
        self.generator, self.perceptual, self.settings = generator, perceptual, settings
        self.space, self.mean = space, mean
        self.n_codes = 1 if space == "w" else config.n_tokens
        sides = [config.noise_size(i) for i in range(config.n_noise)]
        self.shapes = [(self.n_codes, config.style_dim), *((1, side, side) for side in sides)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        n_points = len(range(0, settings.steps, CURVE_EVERY))
        self.tensors = {
            "values": like.new_zeros(n_rows, sum(self.sizes)),
            "first": like.new_zeros(n_rows, sum(self.sizes)),
            "second": like.new_zeros(n_rows, sum(self.sizes)),
            "image": like.new_zeros(n_rows, 3, config.size, config.size),
            "condition": like.new_full((n_rows, config.condition_dim), 0.5),
            "curves": like.new_full((n_rows, len(CURVES), n_points), math.nan),
            "window": like.new_zeros(n_rows),  # sum of the losses since the last window
        }
        self.features: list[torch.Tensor] | None = None  # of the images, per layer [K, ...]
        self.index: list[int | None] = [None] * n_rows  # which task a row works on
        self.clocks = [Clock(settings) for _ in range(n_rows)]
        self.draws: list[torch.Generator | None] = [None] * n_rows

    def __len__(self) -> int:
        return len(self.index)

    @property
    def live(self) -> list[int]:
        return [row for row, index in enumerate(self.index) if index is not None]

    def put(self, row: int, index: int, task: Task) -> None:
        """Begin with a task in this row. ValueError when its shapes do not fit the generator."""
        t, size = self.tensors, self.generator.config.size
        if task.image.shape != (3, size, size):
            raise ValueError(f"this generator makes images [3, {size}, {size}], got {list(task.image.shape)}")
        self.index[row], self.clocks[row] = index, Clock(self.settings)
        self.draws[row] = torch.Generator().manual_seed(int(task.seed))
        maps = [torch.randn(shape, generator=self.draws[row]) for shape in self.shapes[1:]]
        maps = maps if task.noise is None else [given.cpu() for given in task.noise]
        if [tuple(noise.shape) for noise in maps] != self.shapes[1:]:
            raise ValueError(f"noise maps to begin with must be {self.shapes[1:]}, got {[list(m.shape) for m in maps]}")
        codes = self.first_codes(task.start)
        t["values"][row] = torch.cat([codes.flatten(), *(noise.flatten() for noise in maps)])
        for name, value in (("first", 0), ("second", 0), ("window", 0), ("curves", math.nan)):
            t[name][row] = value
        t["image"][row] = task.image
        if task.condition is not None:
            t["condition"][row] = task.condition
        features = self.perceptual.features(average_down(t["image"][row : row + 1]))  # alone: no company to depend on
        if self.features is None:
            self.features = [layer.repeat(len(self), *[1] * (layer.ndim - 1)) for layer in features]
        for layer, own in zip(self.features, features, strict=True):
            layer[row] = own[0]

    def first_codes(self, start) -> torch.Tensor:
        """[C, D] on the CPU from a code [L, D]; in W the mean over layers (equal ones stay as they are)."""
        start = (self.mean[0] if start is None else start).cpu().to(self.mean.dtype)
        shape = (self.generator.config.n_tokens, self.generator.config.style_dim)
        if start.shape != shape:
            raise ValueError(f"a code to begin with must be {list(shape)}, got {list(start.shape)}")
        if self.space != "w":
            return start
        return start[:1] if (start == start[:1]).all() else start.mean(0, keepdim=True)

    def fill_idle(self) -> None:
        """Rows without a task compute along, as copies, so that the shape stays: give them something harmless."""
        live = self.live[0]
        for row, index in enumerate(self.index):
            if index is None:
                for tensor in (*self.tensors.values(), *self.features):
                    tensor[row] = tensor[live]
                self.clocks[row].end = 0

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """[K, P] -> codes [K, C, D], then the noise maps [K, 1, r, r]: views."""
        return [part.unflatten(1, shape) for part, shape in zip(values.split(self.sizes, 1), self.shapes, strict=True)]

    def perturbation(self, std) -> torch.Tensor:
        """Noise for the codes [K, C, D] from each image's own stream, which rests when there is no perturbation."""
        shape = self.shapes[0]
        noise = torch.zeros(len(self), *shape, dtype=std.dtype)
        for row, clock in enumerate(self.clocks):
            if clock.perturbation:
                noise[row] = torch.randn(shape, generator=self.draws[row]) * clock.perturbation
        return noise.to(std.device, non_blocking=True) * std

    @torch.no_grad()
    def update(self, gradient: torch.Tensor) -> None:
        """One step of Adam; then every noise map is brought back to mean 0 and standard deviation 1."""
        values, first, second = (self.tensors[name] for name in ("values", "first", "second"))
        counts = [clock.step + 1 for clock in self.clocks]
        lr = [clock.lr / (1 - BETAS[0] ** n) for clock, n in zip(self.clocks, counts, strict=True)]
        correction = [(1 - BETAS[1] ** n) ** -0.5 for n in counts]
        factors = torch.tensor([lr, correction], dtype=values.dtype).to(values.device, non_blocking=True)
        lr, correction = factors[:, :, None]  # [K, 1] each
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = second.sqrt().mul_(correction).add_(EPSILON)
        values.sub_(torch.div(first, scale, out=scale).mul_(lr))
        for noise in values.split(self.sizes, 1)[1:]:  # [K, r*r]
            std, mean = torch.std_mean(noise, 1, keepdim=True)
            noise.sub_(mean).div_(std)

    def record(self, losses: dict[str, torch.Tensor], visible: torch.Tensor) -> None:
        """Curves at every tenth step, and the plateau rule; each row by its own clock, which moves on."""
        points = [row for row in self.live if self.clocks[row].step % CURVE_EVERY == 0]
        if points:
            at = [self.clocks[row].step // CURVE_EVERY for row in points]
            values = torch.stack([losses[name] for name in CURVES], 1)  # [K, 3]
            self.tensors["curves"][points, :, at] = values[points]
        self.tensors["window"] += visible
        for row in self.live:
            clock = self.clocks[row]
            clock.step += 1
            if clock.at_window:
                clock.observe(float(self.tensors["window"][row]) / self.settings.window)
                self.tensors["window"][row] = 0

    def take(self, row: int) -> Projection:
        """The result of a row that is done; the row is idle afterwards."""
        self.index[row] = None
        codes, *maps = self.split(self.tensors["values"][row : row + 1].cpu().float())
        curves = dict(zip(CURVES, self.tensors["curves"][row].cpu().clone(), strict=True))
        latents = codes[0].expand(self.generator.config.n_tokens, -1).clone()  # [L, D]
        return Projection(
            latents, [noise[0].clone() for noise in maps], curves, torch.tensor(self.clocks[row].step), self.space
        )

    def drop_idle(self) -> None:
        """Go on with fewer rows."""
        keep = self.live
        self.tensors = {name: tensor[keep] for name, tensor in self.tensors.items()}
        self.features = [layer[keep] for layer in self.features]
        self.index, self.clocks, self.draws = (
            [part[row] for row in keep] for part in (self.index, self.clocks, self.draws)
        )
