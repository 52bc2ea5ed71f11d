"""Rendering, the one way from seeds and latents to images.

Everything that belongs to an image (z, noise maps) is drawn on the CPU from the image's own seed, whatever the batch or
device. What is computed from it is equal up to rounding: batches of another size sum in another order.

    ws = map_latents(generator, seeded_z(generator, [0, 1, 2]), truncation=0.7, mean=generator.mean_latent())
    for image in render(generator, ws, noise=noise_maps(generator, "const")): ...
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import safe_path
from common.flags import NOISES
from common.images import IMAGE_SUFFIXES, to_uint8
from common.latents import Latents, draw_z, load_latents
from common.workers import blocks
from model import Generator

RECORD = "rendering"  # the entry of a latents.json's `extra` that tells how the w were drawn
CONDITION = "condition"  # the entry that tells the attributes of each image of a conditional generator

# Noise of N images: one map per layer, each [N, 1, r, r] or, shared by all, [1, 1, r, r]; or a function that gives
# such a list for some positions, which keeps the memory bounded.
Noise = list[torch.Tensor] | Callable[[Sequence[int]], list[torch.Tensor]]


def seeded_z(generator: Generator, seeds: Iterable[int]) -> Iterator[torch.Tensor]:
    """z [L, style_dim] of each seed, one at a time; in W one vector repeated over the tokens."""
    config = generator.config
    for seed in seeds:
        yield draw_z([seed], config.n_tokens, config.style_dim, w_space=config.w_space)[0]


@torch.no_grad()
def map_latents(
    generator: Generator, z: Iterable[torch.Tensor], *, truncation: float = 1.0, mean=None, batch: int = 8
) -> Iterator[torch.Tensor]:
    """w, CPU float32 [L, style_dim] each, of z as `seeded_z` gives it.
    truncation: psi in w = mean + psi * (w - mean), per token; mean [1, L, style_dim] (`generator.mean_latent`) is
    needed unless psi is 1 (ValueError)."""
    if truncation != 1 and mean is None:
        raise ValueError("truncation needs mean = generator.mean_latent(n)")
    for block in blocks(z, batch):
        tokens = torch.stack(block).to(generator.token.device)  # [B, L, D]
        latents = generator.get_latent(tokens[:, 0] if generator.config.w_space else tokens)  # [B, L, D]
        yield from truncate(latents, truncation, mean).cpu()


def truncate(latents: torch.Tensor, psi: float, mean: torch.Tensor | None) -> torch.Tensor:
    """mean + psi * (w - mean) per token (arXiv 1812.04948, appendix B), the model's formula; psi 1 changes nothing."""
    return latents if psi == 1 else torch.lerp(mean.to(latents), latents, psi)


def mix(row: torch.Tensor, column: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The latent `row` [L, D] with the tokens `layers` of `column` (style mixing, arXiv 1812.04948, section 3.1)."""
    w = row.clone()
    w[list(layers)] = column[list(layers)]
    return w


def slerp(a: torch.Tensor, b: torch.Tensor, t) -> torch.Tensor:
    """Spherical interpolation along the last axis, from a (t = 0) to b (t = 1), both exact: for normal vectors, whose
    length a straight line would shorten. Parallel vectors are interpolated linearly."""
    angle = torch.acos(torch.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1))[..., None]
    sine = torch.sin(angle)
    flat = sine < 1e-6
    first = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(flat, t, torch.sin(t * angle) / sine)
    return (first * a + second * b).to(a.dtype)


def loop_position(frame: int, n_points: int, frames: int) -> tuple[int, int, float]:
    """The points before and after a frame of the closed loop through all points, and t in [0, 1) between them."""
    point, step = divmod(frame, frames)
    return point, (point + 1) % n_points, step / frames


def noise_maps(generator: Generator, mode: str, *, seeds: Sequence[int] = (), noise_seed: int = 0) -> Noise:
    """Noise for `render`: the stored maps (const), zeros (none), or maps drawn on the CPU from noise_seed and each
    image's own seed (random), in streams apart from those of z. ValueError for another mode."""
    if mode == "const":
        return generator.fixed_noise()
    if mode == "none":
        return [torch.zeros_like(noise) for noise in generator.fixed_noise()]
    if mode == "random":
        return lambda positions: generator.seeded_noise([noise_stream(noise_seed, seeds[i]) for i in positions])
    raise ValueError(f"noise mode {mode!r}: expected one of {', '.join(NOISES)}")


def noise_stream(noise_seed: int, seed: int) -> int:
    """Seed of an image's noise. Hashed: z is drawn from the bare seed, and the same numbers must not come twice."""
    return int(np.random.SeedSequence([noise_seed, seed]).generate_state(1)[0])


def select_noise(noise: Noise, positions: Sequence[int]) -> list[torch.Tensor]:
    """Maps per layer, [n, 1, r, r] or [1, 1, r, r], of the images at these positions."""
    if callable(noise):
        return noise(positions)
    return [layer if len(layer) == 1 else layer[list(positions)] for layer in noise]


def select_condition(condition: torch.Tensor | None, positions: Sequence[int]) -> torch.Tensor | None:
    """Attributes [n, d] or [1, d] of the images at these positions, from those of all, [N, d] or [1, d]."""
    return condition if condition is None or len(condition) == 1 else condition[list(positions)]


def blend_noise(first: list[torch.Tensor], second: list[torch.Tensor], t: float) -> list[torch.Tensor]:
    """Noise between that of two images: each map [1, 1, r, r] keeps its strength (slerp over the whole map). CPU."""
    return [slerp(a.cpu().flatten(), b.cpu().flatten(), t).view_as(a) for a, b in zip(first, second, strict=True)]


@dataclass(frozen=True)
class Source:
    """Images that can be rendered, by position: file names without suffix, w [L, D], noise, and attributes."""

    names: list[str]
    ws: Callable[[Sequence[int]], Iterator[torch.Tensor]]  # positions -> their w [L, D]
    noise: Noise
    origin: dict  # how they were drawn, for latents.json
    condition: torch.Tensor | None = None  # attributes [N, d] or [1, d] of a conditional generator
    folder: Path | None = None  # in which the latents are saved

    def render(self, generator: Generator, positions: Sequence[int], ws: Iterable | None = None) -> list[np.ndarray]:
        """Images at these positions by `synthesise`; ws: latents in the place of their own."""
        ws = torch.stack(list(self.ws(positions) if ws is None else ws))
        noise, condition = select_noise(self.noise, positions), select_condition(self.condition, positions)
        return synthesise(generator, ws, noise=noise, condition=condition, first=positions[0])


def seed_source(generator, seeds, *, truncation, mean, noise, noise_seed, batch) -> Source:
    """The images of seeds; their latents are drawn and mapped when they are needed."""

    def ws(positions):
        z = seeded_z(generator, (seeds[i] for i in positions))
        return map_latents(generator, z, truncation=truncation, mean=mean, batch=batch)

    names = [f"seed{seed:04d}" for seed in seeds]
    origin = {"seeds": list(seeds), "truncation": truncation, "noise": noise, "noise_seed": noise_seed}
    return Source(names, ws, noise_maps(generator, noise, seeds=seeds, noise_seed=noise_seed), origin)


def latents_source(
    generator, path, *, truncation=1.0, mean=None, noise=None, noise_seed=None, accept: Sequence[str] = ()
) -> Source:
    """Saved latents. Noise, unless a mode is given: the maps saved with them; else as `--save_latents` recorded it;
    else the stored maps. accept: fingerprints of generators whose latents are those of this one as well. Raises
    ValueError for latents of another generator, space, shape or size."""
    saved = read_latents(generator, path, accept=accept)
    if not len(saved):
        raise ValueError(f"{path} holds no latents")
    maps = saved_noise(saved, generator, noise, noise_seed)

    def ws(positions):
        return (truncate(saved.latents[i], truncation, None if mean is None else mean[0]) for i in positions)

    origin = {"space": saved.space, "fingerprint": saved.fingerprint}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return Source(file_names(saved.names), ws, maps, origin, saved_condition(saved, generator), folder)


def read_latents(generator: Generator, path, *, accept: Sequence[str] = ()) -> Latents:
    """Saved latents of this generator (or of one in `accept`). Raises ValueError for those of another one."""
    config, spaces = generator.config, ("w", "w+") if generator.config.w_space else ("w++",)
    shape, fingerprints = (config.n_tokens, config.style_dim), (generator.fingerprint, *accept)
    return load_latents(path, expect_space=spaces, expect_shape=shape, expect_fingerprint=fingerprints)


def saved_noise(saved: Latents, generator: Generator, noise: str | None = None, noise_seed: int | None = None) -> Noise:
    """The noise of `latents_source`. Raises ValueError when the saved maps, or the recorded seeds, do not fit."""
    if noise is None and (maps := saved.noise) is not None:
        sides = [generator.config.noise_size(i) for i in range(generator.config.n_noise)]
        if [list(layer.shape) for layer in maps] != [[len(saved), 1, side, side] for side in sides]:
            found, expected = [list(layer.shape) for layer in maps], f"[{len(saved)}, 1, r, r] with sides {sides}"
            raise ValueError(f"{saved.path}: noise maps {found}; the generator takes {expected}")
        return maps
    record = saved.extra.get(RECORD, {})
    if len(seeds := record.get("seeds", range(len(saved)))) != len(saved):
        raise ValueError(f"{saved.path}: {len(saved)} latents, but {len(seeds)} seeds in its record of the rendering")
    noise_seed = record.get("noise_seed", 0) if noise_seed is None else noise_seed
    return noise_maps(generator, noise or record.get("noise", "const"), seeds=seeds, noise_seed=noise_seed)


def saved_condition(saved: Latents, generator: Generator) -> torch.Tensor | None:
    """The attributes [N, d] under which saved latents belong to their images; None where none are recorded.
    Raises ValueError when they do not fit the generator."""
    if CONDITION not in saved.extra:
        return None
    values, shape = torch.tensor(saved.extra[CONDITION]["values"]), [len(saved), generator.config.condition_dim]
    if list(values.shape) != shape:
        raise ValueError(f"{saved.path}: attributes {list(values.shape)} of the images; the generator takes {shape}")
    return values


def file_names(names: Sequence[str]) -> list[str]:
    """Paths without suffix, all different and inside the output folder, of names such as 'people/ü 1.jpg'.
    The suffix of an image goes; where that makes two names equal ('a.jpg', 'a.png') it stays, then a number is added.
    Letters of either case count as equal, as they do on Windows and macOS."""
    whole = [safe_path(name, "image") for name in names]
    short = [str(Path(name).with_suffix("")) if Path(name).suffix.lower() in IMAGE_SUFFIXES else name for name in whole]
    counts = Counter(name.casefold() for name in short)
    taken, result = set(), []
    for index, (name, full) in enumerate(zip(short, whole, strict=True)):
        name = name if counts[name.casefold()] == 1 else full
        while name.casefold() in taken:
            name = full = f"{full}-{index}"
        taken.add(name.casefold())
        result.append(name)
    return result


@torch.no_grad()
def synthesise(generator: Generator, ws, *, noise=None, condition=None, first: int = 0) -> list[np.ndarray]:
    """Images, uint8 [S, S, 3] in 0..255, of latents w [N, L, D], in one forward pass.
    noise: per layer [N or 1, 1, r, r] (default: the stored maps); condition: attributes [N or 1, d] or, per token,
    [N or 1, L, d] of a conditional generator (default: the neutral 0.5). first: position of the first image, for
    messages. Raises ValueError on latents that do not fit the generator, or when an image is not finite."""
    device = generator.token.device
    maps = [layer.to(device) for layer in (noise or generator.fixed_noise())]
    if condition is not None:
        condition = condition.to(device).expand(len(ws), *condition.shape[1:])
    images, _ = generator(ws.to(device), input_is_latent=True, noise=maps, condition=condition)  # [N, 3, S, S]
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if not all(finite):
        half = generator.compute_dtype == torch.float16
        advice = "; --precision fp32 has the largest range" if half else ": diverged weights?"
        raise ValueError(f"the generator's output is not finite at image {first + finite.index(False) + 1}{advice}")
    return list(to_uint8(images))


def render(
    generator: Generator, latents: Iterable[torch.Tensor], *, noise: Noise | None = None, batch: int = 8, condition=None
) -> Iterator[np.ndarray]:
    """The images of any number of latents w [L, D], by `synthesise`, `batch` at a time and when they are needed.
    noise: see `Noise`; condition: attributes [N, d], or [1, d] for all."""
    start = 0
    for block in blocks(latents, batch):
        positions = range(start, start + len(block))
        maps = None if noise is None else select_noise(noise, positions)
        chosen = select_condition(condition, positions)
        yield from synthesise(generator, torch.stack(block), noise=maps, condition=chosen, first=start)
        start += len(block)
