"""The projector: find the latent code, and the noise maps, with which a generator reproduces given images.

Adam on the code and on one set of noise maps per image (Karras et al. 2020, arXiv 1912.04958, appendix D), with the
constants of the official projector. In W one vector serves all layers; in W+ (Abdal et al. 2019, arXiv 1904.03189)
every layer has its own; in W++ (Li et al. 2024, arXiv 2105.14230) that is what the mapping network itself gives.

Nothing passes between the images of a batch: losses, noise regularisation, noise normalisation, draws and the decision
to stop belong to each image alone. (The published program averages the noise terms over the batch; for one image both
are the same.) What remains is rounding, which grows over the steps; it is the same whatever the company of an image as
long as the tensors keep their shape. So on a CPU a fixed number of images is in work, the next one taking the place
of one that is done, and the result does not depend on the batch, bit for bit. On a GPU it depends on it by rounding.

    perceptual = build_perceptual("squeeze", "cpu")
    result = project(generator, images, perceptual=perceptual, steps=300)         # images [N, 3, S, S] in [-1, 1]
    picture, _ = generator(result.latents, input_is_latent=True, noise=result.noise)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from inversion.state import CURVES, Projection, ProjectionSettings, Rows, Task
from model import Generator
from perceptual.image_metrics import average_down

SPACES = {"w": ("w", "w+"), "w++": ("w++",)}  # of a generator -> of its codes, the default first

# watch(positions of the images in work, their steps, their pictures [A, 3, S, S], their losses [A])
Watch = Callable[[list[int], list[int], torch.Tensor, torch.Tensor], None]


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


# ---------------------------------------------------------------------------------------------------------------------
# The optimisation


def rows_on_cpu(size: int) -> int:
    """Images in work at once on a CPU: enough to share the cost of small layers, and a constant of the generator."""
    return max(1, min(8, 512 // size))


def project_each(
    generator: Generator,
    tasks: Iterable[Task],
    *,
    perceptual,
    space: str | None = None,
    batch: int = 8,
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    **settings,
) -> Iterator[tuple[int, Projection]]:
    """(position, result) of each task, as they are done; tasks are asked for when there is room for them.

    Arguments as for `project`. batch: images in work at once on a GPU; on a CPU their number is `rows_on_cpu`.
    """
    settings = ProjectionSettings(**settings)
    space = choose_space(generator, space)
    mean, std = (value.to(generator.token) for value in statistics or generator.latent_statistics())
    on_cpu = generator.token.device.type == "cpu"
    n_rows = rows_on_cpu(generator.config.size) if on_cpu else batch
    rows = Rows(n_rows, generator, perceptual, settings, space, mean)
    std = std[: rows.n_codes, None]  # [C, 1]
    waiting = enumerate(tasks)

    with _frozen(generator), _frozen(perceptual):
        _refill(rows, waiting)
        objective = make_objective(rows, dtype)
        while rows.live:
            if not on_cpu and len(rows.live) < len(rows):
                rows.drop_idle()
                objective = make_objective(rows, dtype)  # its tensors are others now
            _step(rows, std, objective, watch)
            for row in rows.live:
                if rows.clocks[row].done:
                    yield rows.index[row], rows.take(row)
            _refill(rows, waiting)


def _refill(rows: Rows, waiting: Iterator[tuple[int, Task]]) -> None:
    """The next tasks into the idle rows."""
    idle = [row for row, index in enumerate(rows.index) if index is None]
    for row, (index, task) in zip(idle, waiting, strict=False):
        rows.put(row, index, task)
    if rows.live and rows.features is not None:
        rows.fill_idle()


def make_objective(rows: Rows, dtype) -> Callable:
    """A function of values [K, P] and perturbations of the codes [K, C, D] -> gradient of the values, pictures
    [K, 3, S, S], what decides about an early stop [K], and the losses CURVES, each [K]. Images, their features and
    conditions are read where they lie in `rows`."""
    generator, settings = rows.generator, rows.settings

    def objective(values, perturbation):
        tensors, values = rows.tensors, values.detach().requires_grad_()
        codes, *maps = rows.split(values)
        picture, _ = generator(
            (codes + perturbation).expand(-1, generator.config.n_tokens, -1),
            input_is_latent=True,
            noise=maps,
            dtype=dtype,
            condition=tensors["condition"] if generator.config.condition_dim else None,
        )
        losses = {
            "perceptual": rows.perceptual.distance(rows.perceptual.features(average_down(picture)), rows.features),
            "noise": noise_regularisation(maps),
            "mse": mean_squared_error(picture, tensors["image"]),
        }
        visible = losses["perceptual"] + settings.mse * losses["mse"]  # [K]
        loss = visible + settings.noise_regularize * losses["noise"]
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        return gradient, picture.detach(), visible.detach(), {name: loss.detach() for name, loss in losses.items()}

    return objective


def _step(rows: Rows, std: torch.Tensor, objective, watch) -> None:
    """One step of all rows."""
    gradient, picture, visible, losses = objective(rows.tensors["values"], rows.perturbation(std))
    rows.update(gradient)
    live = rows.live
    if watch is not None:
        steps = [rows.clocks[row].step for row in live]
        watch([rows.index[row] for row in live], steps, picture[live], visible[live])
    rows.record(losses, visible)


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
    watch: Watch | None = None,
    **settings,
) -> Projection:
    """Codes and noise maps for images [N, 3, S, S] in [-1, 1].

    perceptual: a network of perceptual/lpips.py, on the generator's device. space: w, w+ or w++ (default: w for a W
    generator). start: codes [N or 1, L, D] to begin with (default: the mean code); start_noise: maps [N, 1, r, r]
    (default: drawn). statistics: mean [1, L, D] and standard deviation [L] of w (default: latent_statistics()). seeds:
    of each image's draws (default 0, 1, ...). condition: attributes [N, condition_dim] that stay fixed. dtype: of the
    convolutions. watch(positions, steps, images [A, 3, S, S], losses [A]) sees every step of the A images in work.
    settings: ProjectionSettings. Returns a Projection whose tensors have the leading dimension N.
    Raises ValueError for a space or shapes that do not fit the generator, and for settings that are impossible.
    """
    n = len(images)
    if images.ndim != 4 or n == 0:
        raise ValueError(f"images must be [N, 3, S, S], got {list(images.shape)}")
    if start is not None and len(start) not in (1, n):
        raise ValueError(f"{len(start)} codes to begin with for {n} images")
    tasks = (
        Task(
            images[i],
            i if seeds is None else seeds[i],
            None if start is None else start[i % len(start)],
            None if start_noise is None else [noise[i] for noise in start_noise],
            None if condition is None else condition[i],
        )
        for i in range(n)
    )
    results: list[Projection] = [None] * n
    for position, result in project_each(
        generator,
        tasks,
        perceptual=perceptual,
        space=space,
        batch=n,
        statistics=statistics,
        dtype=dtype,
        watch=watch,
        **settings,
    ):
        results[position] = result
    return Projection(
        torch.stack([r.latents for r in results]),
        [torch.stack(layer) for layer in zip(*(r.noise for r in results), strict=True)],
        {name: torch.stack([r.curves[name] for r in results]) for name in CURVES},
        torch.stack([r.steps for r in results]),
        results[0].space,
    )


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
