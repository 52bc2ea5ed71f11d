"""The projector: find w, and the noise maps, with which a generator reproduces given images.

Adam on w and on one set of noise maps per image (Karras et al. 2020, arXiv 1912.04958, appendix D), with the constants
of the official projector. In W one vector serves all layers; in W+ (Abdal et al. 2019, arXiv 1904.03189) every layer
has its own; in W++ (Li et al. 2024, arXiv 2105.14230) that is what the mapping network itself gives. All losses are per
image, so that the images of a batch are independent up to rounding; published: noise terms are means over the batch.

    perceptual = build_perceptual("squeeze", "cpu")
    result = project(generator, images, perceptual=perceptual, steps=300)         # images [N, 3, S, S] in [-1, 1]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from inversion.settings import ProjectorSettings
from model import Generator
from perceptual.image_metrics import average_down

SPACES = {"w": ("w", "w+"), "w++": ("w++",)}  # space of a generator -> spaces to invert into, the default first
CURVE_EVERY = 10  # steps between two points of a loss curve: the published interval
CURVES = ("perceptual", "noise", "mse")


@dataclass
class Projection:
    """Result for N images, on the CPU. Values are not finite where the optimisation diverged."""

    latents: torch.Tensor  # float32 [N, L, D]
    noise: list[torch.Tensor]  # per layer, float32 [N, 1, r, r]
    curves: dict[str, torch.Tensor]  # CURVES, each [N, T]: values at steps 0, 10, 20 ...; NaN after an early stop
    steps: torch.Tensor  # int64 [N], taken

    def image(self, i: int) -> dict:
        """The result of one image as arrays: latents [L, D], noise: per layer [1, r, r], curves: each [T], steps."""
        arrays = {"latents": self.latents[i].numpy(), "noise": [layer[i].numpy() for layer in self.noise]}
        curves = {name: curve[i].numpy() for name, curve in self.curves.items()}
        return arrays | {"curves": curves, "steps": int(self.steps[i])}


def choose_space(generator: Generator, space: str | None) -> str:
    """`space`, or the generator's default. ValueError for a space that the generator does not have."""
    native, spaces = generator.config.space, SPACES[generator.config.space]
    if space not in (None, *spaces):
        names = f"a {native.upper()} generator, whose spaces are {' or '.join(spaces)}"
        raise ValueError(f"space {space} does not exist in {names}: W and W+ need a W generator, W++ a W++ generator")
    return space or spaces[0]


def noise_regularisation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared autocorrelation at a shift of one pixel, over all maps [N, 1, r, r] and scales down to 8 -> [N]. Keeps
    the maps from carrying the image (arXiv 1912.04958, eq. 11)."""
    total = 0
    for noise in maps:
        while True:
            for axis in (2, 3):
                total = total + (noise * noise.roll(1, axis)).mean((1, 2, 3)).square()
            if noise.shape[-1] <= 8:
                break
            noise = F.avg_pool2d(noise, 2)
    return total


def learning_rate(step: int, end: int, *, lr: float, rise: float, fall: float) -> float:
    """Linear over the first `rise` steps (from 0, as published), then constant, a cosine over the last `fall`."""
    up = min(1.0, step / rise) if rise else 1.0
    down = min(1.0, (end - step) / fall) if fall else 1.0
    return lr * up * (0.5 - 0.5 * math.cos(down * math.pi))


def project(
    generator: Generator,
    images: torch.Tensor,  # [N, 3, S, S] in [-1, 1]
    *,
    perceptual,  # distance of perceptual/lpips.py, on the generator's device
    space: str | None = None,  # w, w+ or w++; default: w for a W generator
    w_start: torch.Tensor | None = None,  # [N or 1, L, D]; default: the mean of w
    noise_start: Sequence[torch.Tensor] | None = None,  # per layer [N or 1, 1, r, r]; default: drawn
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,  # mean [1, L, D] and deviation [L] of w
    seeds: Sequence[int] | None = None,  # of each image's draws; default 0, 1, ...
    condition: torch.Tensor | None = None,  # [N, condition_dim] of a conditional generator; stays fixed
    dtype: torch.dtype | None = None,  # of the generator's convolutions
    callback: Callable | None = None,  # callback(step, active, images [A, 3, S, S], losses [A]) at every step
    **settings: float,  # steps, lr, mse ...: fields of ProjectorSettings
) -> Projection:
    """Find w and noise maps for images. Raises ValueError for settings, a space or images that do not fit. An image is
    on a plateau when its loss, averaged over a twentieth of the steps, is less than `early_stop` below the average
    before: it continues as if its run had been planned to end soon. Images that have ended leave the batch; `active`
    holds the positions of the others."""
    s, n = ProjectorSettings(**settings), len(images)
    space, config, steps = choose_space(generator, space), generator.config, s.steps
    if n == 0 or images.shape[1:] != (3, config.size, config.size):
        raise ValueError(f"this generator makes images [N, 3, {config.size}, {config.size}], got {list(images.shape)}")
    images = images.to(generator.token)
    if w_start is None or s.noise:
        mean, std = (value.to(images) for value in statistics or generator.latent_statistics())

    # Leaf tensors per image, as each has its own step size: w [C, D], C = 1 in W, else L, and the noise maps [1, r, r]
    # of a generator that uses them.
    draws = [torch.Generator().manual_seed(int(seed)) for seed in (range(n) if seeds is None else seeds)]
    shapes = [(1, config.noise_size(i), config.noise_size(i)) for i in range(config.n_noise)]
    drawn = [[torch.randn(shape, generator=draw) for shape in shapes] for draw in draws]
    maps = [torch.stack(layer) for layer in zip(*drawn, strict=True)] if noise_start is None else noise_start
    maps = [layer.expand(n, *shape) for layer, shape in zip(maps, shapes, strict=True)]
    w_start = (mean if w_start is None else w_start.to(images)).expand(n, config.n_tokens, config.style_dim)
    w_start = w_start.mean(1, keepdim=True) if space == "w" else w_start
    leaves = zip(w_start, *(maps if generator.uses_noise else ()), strict=True)
    leaves = [[leaf.to(images, copy=True) for leaf in image] for image in leaves]
    optimiser = torch.optim.Adam([{"params": [leaf.requires_grad_() for leaf in image]} for image in leaves])

    active, window = list(range(n)), max(CURVE_EVERY, steps // 20)
    ramp, rise, end, fall = s.noise_ramp * steps, s.lr_rampup * steps, [steps] * n, [s.lr_rampdown * steps] * n
    window_loss, last_loss = images.new_zeros(n), [math.inf] * n
    curves = {name: torch.full((n, len(range(0, steps, CURVE_EVERY))), math.nan) for name in CURVES}
    with torch.no_grad():
        target = perceptual.features(average_down(images))

    for step in range(steps):
        # Images that have ended leave the batch.
        if any(end[i] <= step for i in active):
            keep = [position for position, i in enumerate(active) if end[i] > step]
            active, images, target = [active[k] for k in keep], images[keep], [layer[keep] for layer in target]
            if not active:
                break

        # Synthesis from perturbed w.
        ws, *noise = (torch.stack(layer) for layer in zip(*(leaves[i] for i in active), strict=True))  # [A, C, D]
        strength = s.noise * max(0.0, 1 - step / ramp) ** 2 if ramp else 0.0
        if strength:
            drawn = [torch.randn(ws.shape[1:], generator=draws[i]) * (end[i] == steps) for i in active]
            ws = ws + torch.stack(drawn).to(ws) * strength * std[: ws.shape[1], None]
        inputs = {"noise": noise or None, "condition": None if condition is None else condition[active].to(images)}
        synth, _ = generator(ws.expand(-1, config.n_tokens, -1), input_is_latent=True, dtype=dtype, **inputs)

        # Losses [A], and the gradient of their sum: every image by itself, the weights not at all.
        losses = {
            "perceptual": perceptual.distance(perceptual.features(average_down(synth)), target),
            "noise": noise_regularisation(noise) if noise else images.new_zeros(len(active)),
            "mse": (synth - images).square().mean((1, 2, 3)),
        }
        visible = losses["perceptual"] + s.mse * losses["mse"]
        optimiser.zero_grad()
        total = (visible + s.noise_regularize * losses["noise"]).sum()
        total.backward(inputs=[leaf for i in active for leaf in leaves[i]])
        synth, visible = synth.detach(), visible.detach()
        window_loss[active] += visible
        if callback is not None:
            callback(step, active, synth, visible)
        if step % CURVE_EVERY == 0:
            for name in CURVES:
                curves[name][active, step // CURVE_EVERY] = losses[name].detach().float().cpu()

        # Step; then every noise map back to mean 0 and deviation 1.
        for i in active:
            optimiser.param_groups[i]["lr"] = learning_rate(step, end[i], lr=s.lr, rise=rise, fall=fall[i])
        optimiser.step()
        with torch.no_grad():
            for layer in (layer for i in active for layer in leaves[i][1:]):
                layer.sub_(layer.mean()).div_(layer.std())

        # Plateaus, at the end of a window: the fall takes the same fraction of the image's own total.
        if s.early_stop and (step + 1) % window == 0:
            rest = math.ceil((step + 1) * s.lr_rampdown / max(1 - s.lr_rampdown, 1e-9))
            for i in active:
                average = float(window_loss[i]) / window
                if end[i] == steps and last_loss[i] - average < s.early_stop * last_loss[i] < math.inf:
                    end[i], fall[i] = min((step + 1 + rest, rest), (steps, fall[i]))
                last_loss[i] = average
            window_loss.zero_()

    ws, *noise = (torch.stack(layer).detach().float().cpu() for layer in zip(*leaves, strict=True))
    noise = noise or [layer.float().cpu() for layer in maps]
    return Projection(ws.expand(-1, config.n_tokens, -1).contiguous(), noise, curves, torch.tensor(end))
