"""Perceptual path length (Karras et al. 2019, arXiv 1812.04948, section 4.1): the function behind ppl.py."""

from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from common.cli import UserError
from common.distributed import Distributed, gather_list, shard
from metrics.features import HERE
from metrics.flags import PathSettings
from metrics.sources import SEED_STRIDE
from model import Generator
from perceptual.image_metrics import average_down
from sampling.render import seeded_z, slerp


@torch.no_grad()
def path_lengths(
    generator: Generator,
    distance: Callable,  # images [B, 3, S, S] in [-1, 1], twice -> [B], a squared distance such as LPIPS
    space: str,  # z, or w or w++, as the generator has
    settings: PathSettings,
    dist: Distributed = HERE,
) -> np.ndarray:
    """Path lengths, float64 [n_sample], on every rank; pair i has its own seed, so no batch or rank changes it.
    Raises ValueError for another space, or when a length is not finite."""
    config, seed, epsilon = generator.config, settings.seed, settings.epsilon
    if space not in ("z", config.space):
        raise UserError(f"--space {space}: this generator has z and {config.space}")
    local = shard(settings.n_sample, dist.rank, dist.world_size)
    lengths, noise, device = [torch.empty(0, dtype=torch.float64)], generator.fixed_noise(), generator.token.device
    between, title = slerp if space == "z" else torch.lerp, f"path length in {space}"
    for start in tqdm(range(0, len(local), settings.batch), desc=title, disable=None if dist.is_main else True):
        chosen = local[start : start + settings.batch]
        ends = [_ends(generator, [(2 * seed + end) * SEED_STRIDE + i for i in chosen], space) for end in (0, 1)]
        t = [np.random.default_rng([seed, i]).random() if settings.sampling == "full" else 0.0 for i in chosen]
        t = torch.tensor(t, dtype=torch.float64).view(-1, 1, 1)
        styles = torch.cat([between(*ends, at).float() for at in (t, t + epsilon)])  # both of a pair in one batch
        styles = styles[:, 0] if space == "z" and config.w_space else styles
        images, _ = generator(styles.to(device), input_is_latent=space != "z", noise=noise)
        a, b = crop_and_shrink(images, settings.crop).chunk(2)
        lengths.append(distance(a, b).flatten().cpu().double() / epsilon**2)  # [B]
    values = torch.cat(gather_list(torch.cat(lengths))).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"path length {int(np.argmin(np.isfinite(values)))} is not finite: diverged weights?")
    return values


def _ends(generator: Generator, seeds: list[int], space: str) -> torch.Tensor:
    """z or w [B, L, D] of seeds; float64, since epsilon is close to float32's last digits."""
    z = torch.stack(list(seeded_z(generator, seeds)))
    if space == "z":
        return z.double()
    return generator.get_latent((z[:, 0] if generator.config.w_space else z).to(generator.token)).cpu().double()


def crop_and_shrink(images: torch.Tensor, crop: bool) -> torch.Tensor:
    """[N, 3, S, S] -> the centre of the face if `crop`, averaged down to 256 pixels as the published programs do."""
    if crop:  # eyes to mouth of FFHQ's framing, arXiv 1812.04948
        eighth = images.shape[2] // 8
        images = images[:, :, 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]
    return average_down(images)


def trimmed_mean(lengths: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the lengths between the 1st and the 99th percentile, both among them."""
    low = np.percentile(lengths, 1, method="lower")
    high = np.percentile(lengths, 99, method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    return float(kept.mean()), float(kept.std())
