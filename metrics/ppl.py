"""Perceptual path length of a generator, in z, w or w++: how much the image changes along a short step.

Karras et al. 2019 (arXiv 1812.04948, section 4.1): mean of d(G(a), G(b)) / epsilon² over pairs epsilon apart on the
path between two random latents, spherical in z, straight in w; the lowest and the highest percent are left out, the
noise maps are the stored ones. `ppl-w` is LPIPS with VGG; another perceptual network is named: `ppl-w++-squeeze`.

    python metrics/ppl.py --ckpt runs/faces/checkpoint/230000.pt
    python metrics/ppl.py --ckpt faces.safetensors --space z --perceptual squeeze --n_sample 5000
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, run_script
from common.distributed import Distributed, gather_list, setup, shard, shutdown
from common.latents import draw_z
from metrics.evaluation import default_output
from metrics.features import HERE
from metrics.protocol import append_records, make_record
from metrics.sources import SEED_STRIDE, Sampling, checkpoint_source
from model import Generator, load_generator
from sampling.render import slerp

EPSILON = 1e-4  # step, as a share of the path
LARGEST = 256  # pixels; larger images are averaged down to it, as the published programs do
SPACES = ("z", "w", "w++")


@torch.no_grad()
def path_lengths(
    generator: Generator,
    distance: Callable,
    *,
    space: str,
    n: int,
    sampling: str = "full",
    epsilon: float = EPSILON,
    crop: bool = False,
    batch: int = 16,
    seed: int = 0,
    dist: Distributed = HERE,
    progress: bool = False,
) -> np.ndarray:
    """n path lengths, float64 [n], on every rank; pair i is drawn from its own seed, so no batch or rank changes it.

    distance(a, b): images [B, 3, S, S] in [-1, 1] -> [B], a squared distance such as LPIPS. space: z, or w or w++, as
    the generator has. sampling: `full` takes pairs anywhere on the path, `end` at its start. crop: the centre of a
    face as FFHQ frames it. Raises ValueError for another space, or when a length is not finite.
    """
    config = generator.config
    if space not in ("z", config.space):
        raise UserError(f"--space {space}: this generator has z and {config.space}")
    if sampling not in ("full", "end") or n < 1:
        raise UserError(f"expected sampling full or end and n from 1, got {sampling} and {n}")
    local, lengths = shard(n, dist.rank, dist.world_size), [torch.empty(0, dtype=torch.float64)]
    noise, device = generator.fixed_noise(), generator.token.device
    silent = None if progress and dist.is_main else True
    for start in tqdm(range(local.start, local.stop, batch), desc=f"path length in {space}", disable=silent):
        chosen = range(start, min(start + batch, local.stop))
        first, second = (_draw(generator, [(2 * seed + end) * SEED_STRIDE + i for i in chosen]) for end in (0, 1))
        t = [np.random.default_rng([seed, i]).random() if sampling == "full" else 0.0 for i in chosen]
        t = torch.tensor(t, dtype=torch.float64).view(-1, *[1] * (first.ndim - 1))
        ends = [_interpolate(generator, first, second, at, space) for at in (t, t + epsilon)]
        styles = torch.cat(ends).to(device)  # both images of a pair in one batch
        images, _ = generator(styles, input_is_latent=space != "z", noise=noise)
        a, b = crop_and_shrink(images, crop).chunk(2)
        lengths.append((distance(a, b).flatten().double() / epsilon**2).cpu())  # [B]
    values = torch.cat(gather_list(torch.cat(lengths))).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"path length {int(np.argmin(np.isfinite(values)))} is not finite: diverged weights?")
    return values


def _draw(generator: Generator, seeds: list[int]) -> torch.Tensor:
    config = generator.config
    z = draw_z(seeds, config.n_tokens, config.style_dim, w_space=config.w_space)  # [B, L, D]
    return z[:, 0] if config.w_space else z


def _interpolate(generator, first, second, t, space) -> torch.Tensor:
    """Latents at the share t of the path; float64 in between, since epsilon is close to float32's last digits."""
    if space == "z":
        return slerp(first.double(), second.double(), t).float()
    device = generator.token.device
    first, second = (generator.get_latent(z.to(device)).double().cpu() for z in (first, second))  # [B, L, D]
    return torch.lerp(first, second, t.view(-1, 1, 1)).float()


def crop_and_shrink(images: torch.Tensor, crop: bool) -> torch.Tensor:
    """[N, 3, S, S] -> the centre of the face if `crop`, at most LARGEST pixels high."""
    if crop:  # eyes to mouth of FFHQ's framing, arXiv 1812.04948
        eighth = images.shape[2] // 8
        images = images[:, :, 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]
    factor = images.shape[2] // LARGEST
    return F.avg_pool2d(images, factor) if factor > 1 else images


def trimmed_mean(lengths: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the lengths between the 1st and the 99th percentile, both among them."""
    low = np.percentile(lengths, 1, method="lower")
    high = np.percentile(lengths, 99, method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    return float(kept.mean()), float(kept.std())


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint (.pt) or exported generator (.safetensors)")
    add("--space", choices=SPACES, help="z, or the generator's own w or w++ (default)")
    sampling = "pairs anywhere on the path between two latents, or at its start"
    add("--sampling", choices=("full", "end"), default="full", help=sampling)
    perceptual = (
        "perceptual network of perceptual/lpips.py: vgg as published, squeeze, alex, discriminator:CHECKPOINT, "
        "scorer:FILE; auto: the first LPIPS at hand"
    )
    add("--perceptual", default="auto", metavar="NAME", help=perceptual)
    add("--epsilon", type=float, default=EPSILON, help="step, as a share of the path")
    add("--crop", action="store_true", help="compare the centre of the face only, as for FFHQ")
    add("--n_sample", type=int, default=50_000, help="pairs")
    add("--batch", type=int, default=16, help="pairs per forward pass and process")
    add("--seed", type=int, default=0, help="seed of the latents")
    add("--weights_dir", help="folder with the network's weights, looked into first")
    output = "file to add the result to; default: metrics.jsonl of the checkpoint's run folder, else here"
    add("--output", type=Path, help=output)
    add_device_flags(parser)
    return parser


def main(args) -> int:
    from perceptual.lpips import build_perceptual

    if args.n_sample < 2 or args.batch < 1 or not 0 < args.epsilon < 1 or not 0 <= args.seed < 2000:
        raise UsageError("--n_sample takes 2 or more, --batch 1 or more, --epsilon between 0 and 1, --seed 0 to 1999")
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        space = args.space or generator.config.space
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        lengths = path_lengths(
            generator,
            perceptual,
            space=space,
            n=args.n_sample,
            sampling=args.sampling,
            epsilon=args.epsilon,
            crop=args.crop,
            batch=args.batch,
            seed=args.seed,
            dist=dist,
            progress=True,
        )
        if dist.is_main:
            value, std = trimmed_mean(lengths)
            network = perceptual.name.removeprefix("lpips-")
            name = f"ppl-{space}" + ("" if network == "vgg" else f"-{network}")
            print(
                f"{args.ckpt}  {args.n_sample} pairs, {perceptual.name}, {args.sampling}:  {name} {value:.5g} "
                f"(std {std:.5g})",
                flush=True,
            )
            source = checkpoint_source(Path(args.ckpt), Sampling(noise="const", seed=args.seed), generator)
            protocol = {"name": args.sampling, "epsilon": args.epsilon, "crop": args.crop, "percentiles": "1 to 99"}
            record = make_record(
                name,
                value,
                real=None,
                fake={**source.info, "n": args.n_sample},
                protocol=protocol,
                extractor={"name": perceptual.name},
                std=std,
            )
            append_records(args.output or default_output(Path(args.ckpt)), [record])
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
