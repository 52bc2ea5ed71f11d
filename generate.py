"""Images of a trained generator: by seed, truncated, mixed, interpolated, or of saved latents.

The checkpoint is ours, rosinality's or TransStyleGAN's (.pt), or an export (.safetensors); its architecture is read
from the file. A seed gives the same image whatever --batch is, up to rounding. Under torchrun the processes share the
images. What the file recommends (truncation, noise) holds where no flag is given.

    python generate.py --ckpt runs/faces/checkpoint/100000.pt --seeds 0-35 --truncation 0.7 --grid
    python generate.py --ckpt faces.safetensors --mix 0-3 10-14 --mix_layers 0-3
    python generate.py --ckpt faces.safetensors --seeds 0-7 --interpolate --video loop.mp4
    python generate.py --ckpt faces.safetensors --latents projection/ --output_dir rendered
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, positive_int, run_script
from common.distributed import Distributed, broadcast_object, gather_list, setup, shard, shutdown
from common.grids import save_grid
from common.images import save_image
from common.latents import parse_layers, parse_seeds, save_latents
from common.precision import DTYPES
from common.video import save_video
from editing.attributes import read_condition
from interop.export import export_generator
from model import Generator, load_generator
from sampling.render import (
    CONDITION,
    NOISE_MODES,
    RECORD,
    Source,
    blend_noise,
    blocks,
    latents_source,
    loop_position,
    map_latents,
    mix,
    mixing_grid,
    seed_source,
    seeded_z,
    select_condition,
    select_noise,
    slerp,
    synthesise,
)

DEFAULT_SEEDS = "0-35"
VIDEOS = (".mp4", ".gif", ".webp")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")
    parser.add_argument(
        "--preset",
        choices=("recommended", "published"),
        default="recommended",
        help="settings where no flag is given: those of the generator's file, or of the published scripts",
    )
    add_source_flags(parser)
    add_mode_flags(parser)
    add_output_flags(parser)
    add_device_flags(parser)
    return parser


def add_source_flags(parser: ArgumentParser) -> None:
    """Add what names an image: seed or saved latents, truncation, noise, attributes."""
    group = parser.add_argument_group("what to render")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--seeds", help=f"such as 7 or 0-35,40; default {DEFAULT_SEEDS}")
    source.add_argument(
        "--latents",
        metavar="FOLDER|FILE",
        help="saved latents with their saved noise instead (also .npy, rosinality's .pt, NVIDIA's projected_w.npz)",
    )
    group.add_argument(
        "--truncation",
        "--trunc",
        type=float,
        default=1.0,
        metavar="PSI",
        help="w = mean + psi (w - mean), per token; 1: none, 0: the mean image",
    )
    group.add_argument(
        "--truncation_mean", type=positive_int, default=10_000, metavar="N", help="samples for the mean of w"
    )
    group.add_argument(
        "--noise",
        choices=NOISE_MODES,
        help="const: the maps stored in the generator; random: drawn for each image from its seed; none: zeros; "
        "default const, for --latents what they were saved with",
    )
    group.add_argument("--noise_seed", type=int, help="another value, other maps of --noise random; default 0")
    group.add_argument(
        "--set",
        metavar="NAME=NUMBER,...",
        help="attributes of a conditional generator, such as smile=1; the others as they were saved, or the means of "
        "the training images (without --set: 0.5)",
    )


def add_mode_flags(parser: ArgumentParser) -> None:
    """Add mixing and interpolation, which exclude each other."""
    group = parser.add_argument_group("mixing and interpolation")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--mix",
        nargs=2,
        metavar=("ROWS", "COLS"),
        help="one grid: every row's latent with layers of every column's; two lists of seeds, or, with --latents, of "
        "positions from 0",
    )
    mode.add_argument(
        "--interpolate",
        nargs="?",
        const="w",
        choices=("w", "z"),
        help="closed loop through the seeds or latents: straight in w, or spherical in z",
    )
    group.add_argument(
        "--mix_layers",
        default="0-3",
        metavar="RANGE",
        help="layers (tokens of w) taken from the columns: 0-3 is coarse, pose and shape",
    )
    group.add_argument("--video", help="where: .mp4, .gif or .webp; default OUTPUT_DIR/interpolation.mp4")
    group.add_argument("--frames", type=positive_int, default=60, help="frames from one seed to the next")
    group.add_argument("--fps", type=positive, default=30, help="frames per second")


def add_output_flags(parser: ArgumentParser) -> None:
    """Add folder, grid, saved latents, batch, precision, and the earlier spelling of exports."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", "--outdir", default="generated", help="folder of the images; made when absent")
    group.add_argument(
        "--grid",
        nargs="?",
        type=int,
        const=0,
        metavar="NROW",
        help="all images in one as well, grid.png, NROW per row (default: a square)",
    )
    group.add_argument(
        "--save_latents",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="save the w of the images as well, for --latents; default OUTPUT_DIR/latents",
    )
    group.add_argument("--batch", type=positive_int, default=8, help="images per forward pass")
    group.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions")
    for flag in ("--export", "--base"):  # convert.py has these now
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--half", "--with_d"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def check_flags(args) -> None:
    """Raise UsageError for flags that cannot be read or exclude each other."""
    if args.noise_seed is not None and args.noise_seed < 0:
        raise UsageError(f"--noise_seed must be 0 or more, got {args.noise_seed}")
    if args.video is not None and Path(args.video).suffix.lower() not in VIDEOS:
        raise UsageError(f"--video {args.video}: expected a name that ends with {', '.join(VIDEOS)}")
    if args.video and not args.interpolate:
        raise UsageError("--video is for --interpolate")
    if args.mix and args.seeds is not None:
        raise UsageError("--mix cannot be used with --seeds: name the seeds in ROWS and COLS")
    if args.latents and args.save_latents is not None:
        raise UsageError("--latents cannot be used with --save_latents")
    if args.latents and args.interpolate == "z":
        raise UsageError("--interpolate z cannot be used with --latents, whose z is not known")
    if (args.mix or args.interpolate) and (args.grid is not None or args.save_latents is not None):
        raise UsageError("--grid and --save_latents cannot be used with --mix or --interpolate")
    if args.export is not None and Path(args.export).suffix.lower() != ".safetensors":
        raise UsageError(f"--export {args.export}: expected a name that ends with .safetensors")
    if not args.export and (args.half or args.base or args.with_d):
        raise UsageError("--half, --base and --with_d are for --export")


def read_numbers(args) -> tuple[list[int], list[int], list[int]]:
    """Positions of rows and columns of --mix in the source, and the seeds (empty with --latents)."""
    if args.mix:
        rows, columns = (parse_numbers(text, "--mix") for text in args.mix)
        if args.latents:
            return rows, columns, []
        return list(range(len(rows))), list(range(len(rows), len(rows) + len(columns))), rows + columns
    seeds = [] if args.latents else parse_numbers(args.seeds or DEFAULT_SEEDS, "--seeds")
    if args.interpolate and len(seeds) == 1:
        raise UsageError(f"--interpolate needs at least two seeds, got --seeds {args.seeds}")
    return [], [], seeds


def parse_numbers(text: str, flag: str) -> list[int]:
    """parse_seeds, whose message names the flag at fault."""
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise UsageError(str(error).replace("--seeds", flag, 1)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of output


def write_images(generator, source: Source, dist: Distributed, *, batch, folder, grid, latents_folder) -> None:
    """One PNG per image, shared among the ranks; if wanted, a grid and the latents, by rank 0."""
    local = shard(len(source.names), dist.rank, dist.world_size)
    kept_ws, kept_images = [], []
    with progress(len(local), dist) as bar:
        for positions in blocks(local, batch):
            ws = torch.stack(list(source.codes(positions)))  # [B, L, D]
            images = synthesise(
                generator,
                ws,
                noise=select_noise(source.noise, positions),
                condition=select_condition(source.condition, positions),
                first=positions[0],
            )
            for position, image in zip(positions, images, strict=True):
                save_image(image, folder / f"{source.names[position]}.png")
            kept_ws += list(ws.cpu().numpy()) if latents_folder is not None else []
            kept_images += images if grid is not None else []
            bar.update(len(positions))
    kept_ws, kept_images = sum(gather_list(kept_ws), []), sum(gather_list(kept_images), [])  # waits for every rank
    if not dist.is_main:
        return
    print(f"{folder}: {len(source.names)} images, {source.names[0]}.png to {source.names[-1]}.png")
    if grid is not None:
        nrow = grid or math.ceil(len(kept_images) ** 0.5)
        print(f"{save_grid(kept_images, folder / 'grid.png', nrow=nrow)}: all of them in a grid")
    if latents_folder is not None:
        save_latents(
            latents_folder,
            np.stack(kept_ws),
            names=source.names,
            space=generator.config.space,
            size=generator.config.size,
            fingerprint=generator.fingerprint,
            extra=latents_metadata(source),
        )
        print(f"{latents_folder}: their w, for --latents")


def latents_metadata(source: Source) -> dict:
    """The entries of latents.json that tell how the latents were drawn, and under which attributes."""
    if source.condition is None:
        return {RECORD: source.origin}
    return {RECORD: source.origin, CONDITION: {"values": source.condition.expand(len(source.names), -1).tolist()}}


def write_mixture(generator, source: Source, dist, *, batch, rows, columns, layers, path) -> None:
    """The grid of mixtures: cell (r, c) has row r's latent with `layers` of column c's, and row r's noise."""
    beyond = [i for i in rows + columns if i >= len(source.names)]
    if beyond:
        raise UserError(f"--mix names position {beyond[0]}: the latents have the positions 0-{len(source.names) - 1}")
    sources = rows + columns
    ws = list(source.codes(sources))
    cells = list(zip(ws, sources, strict=True))  # each a latent, and the position that its noise comes from
    cells += [(mix(w, column, layers), r) for w, r in zip(ws, rows, strict=False) for column in ws[len(rows) :]]
    local = shard(len(cells), dist.rank, dist.world_size)
    images = []
    with progress(len(local), dist) as bar:
        for block in blocks(local, batch):
            positions = [cells[i][1] for i in block]
            images += synthesise(
                generator,
                torch.stack([cells[i][0] for i in block]),
                noise=select_noise(source.noise, positions),
                condition=select_condition(source.condition, positions),
                first=block[0],
            )
            bar.update(len(block))
    images = sum(gather_list(images), [])
    if dist.is_main:
        save_image(mixing_grid(images[: len(rows)], images[len(rows) : len(ws)], images[len(ws) :]), path)
        print(
            f"{path}: {len(rows)} x {len(columns)} mixtures, layers {layers} of the upper margin, the others and the "
            "noise of the left one"
        )


def write_loop(generator, source: Source, dist, *, frames, path, fps, **settings) -> None:
    """The closed loop through all latents as a video; settings: of `loop_images`."""
    n = len(source.names)
    if n < 2:
        raise UserError(f"--interpolate needs at least two latents, got {n}")
    images = loop_images(generator, source, dist, frames=frames, **settings)
    video = tqdm(images, total=n * frames, disable=not dist.is_main, unit="image", dynamic_ncols=True)
    if dist.is_main:
        save_video(video, path, fps)
        print(f"{path}: {n * frames} frames through {n} points, {n * frames / fps:.1f} s")
    else:
        for _ in video:
            pass


def loop_images(generator, source: Source, dist, *, z, truncation, mean, frames, batch) -> Iterator[np.ndarray]:
    """The frames of the loop, on every rank. z: the points in z, or None for straight lines in w.

    At every point stands that seed's or latent's own image with its own noise, which is blended in between. The ranks
    render blocks of frames in turn, so that memory does not grow with the length.
    """
    n, total = len(source.names), len(source.names) * frames
    points = list(source.codes(range(n))) if z is None else z
    one_noise = not callable(source.noise) and len(source.noise[0]) == 1
    one_condition = source.condition is None or len(source.condition) == 1
    for start in range(0, total, batch * dist.world_size):
        first = min(start + batch * dist.rank, total)
        ends = [loop_position(frame, n, frames) for frame in range(first, min(first + batch, total))]
        images = []
        if ends:
            if z is None:
                ws = [torch.lerp(points[a], points[b], t) for a, b, t in ends]
            else:
                zs = [slerp(points[a], points[b], t) for a, b, t in ends]
                ws = list(map_latents(generator, zs, truncation=truncation, mean=mean, batch=batch))
            noise, condition = source.noise, source.condition
            if not one_noise:
                maps = {i: select_noise(source.noise, [i]) for i in {i for a, b, _ in ends for i in (a, b)}}
                layers = [blend_noise(maps[a], maps[b], t) for a, b, t in ends]
                noise = [torch.cat(layer) for layer in zip(*layers, strict=True)]  # per layer [B, 1, r, r]
            if not one_condition:
                condition = torch.stack([torch.lerp(condition[a], condition[b], t) for a, b, t in ends])
            images = synthesise(generator, torch.stack(ws), noise=noise, condition=condition, first=first)
        for part in gather_list(images):
            yield from part


def progress(total: int, dist: Distributed) -> tqdm:
    return tqdm(total=total, disable=not dist.is_main, unit="image", dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------


def truncation_mean(generator: Generator, truncation: float, samples: int, dist: Distributed) -> torch.Tensor | None:
    """Mean of w [1, L, D] on the CPU where truncation needs one: computed by rank 0, the same on all."""
    if truncation == 1:
        return None
    return broadcast_object(generator.mean_latent(samples).cpu() if dist.is_main else None)


def set_attributes(source: Source, ckpt: str, text: str | None) -> Source:
    """The source with the attributes of --set. Raises ValueError for those that the generator does not know."""
    if not text:
        return source
    known = read_condition(ckpt)
    targets = known.parse(text)
    base = torch.tensor([known.means]) if source.condition is None else source.condition  # [1 or N, d]
    return replace(source, condition=torch.stack([known.vector(targets, row) for row in base]))


def say_recommended(path: Path, changed: dict) -> None:
    flags = " ".join(f"--{name} {value}" for name, value in changed.items())
    print(f"{path} recommends {flags} (--preset published: without)", file=sys.stderr)


def main(args) -> int:
    check_flags(args)
    rows, columns, seeds = read_numbers(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        if args.export:  # the earlier spelling of `convert.py CKPT FILE`
            if dist.is_main:
                options = {"half": args.half, "base": args.base, "with_d": args.with_d}
                identity, _ = export_generator(args.ckpt, args.export, **options)
                print(f"{args.export}: the generator, fingerprint {identity}")
            return 0
        generator = load_generator(args.ckpt, dist.device, DTYPES[args.precision])
        if args.preset == "recommended" and not args.latents:
            changed = args.fill(generator.recommended.get("generate", {}))
            if changed and dist.is_main:
                say_recommended(generator.path, changed)
        mean = truncation_mean(generator, args.truncation, args.truncation_mean, dist)
        drawing = {"truncation": args.truncation, "mean": mean, "noise": args.noise, "noise_seed": args.noise_seed}
        if args.latents:
            source = latents_source(generator, args.latents, **drawing)
        else:
            drawing |= {"noise": args.noise or "const", "noise_seed": args.noise_seed or 0}
            source = seed_source(generator, seeds, **drawing, batch=args.batch)
        source = set_attributes(source, args.ckpt, args.set)
        folder = Path(args.output_dir)
        if args.mix:
            layers = parse_layers(args.mix_layers, generator.config.n_tokens, "--mix_layers")
            mixture = {"rows": rows, "columns": columns, "layers": layers, "path": folder / "mix.png"}
            write_mixture(generator, source, dist, batch=args.batch, **mixture)
        elif args.interpolate:
            video = {"frames": args.frames, "fps": args.fps, "path": Path(args.video or folder / "interpolation.mp4")}
            z = list(seeded_z(generator, seeds)) if args.interpolate == "z" else None
            path = {"z": z, "truncation": args.truncation, "mean": mean}
            write_loop(generator, source, dist, batch=args.batch, **video, **path)
        else:
            latents_folder = None if args.save_latents is None else Path(args.save_latents or folder / "latents")
            files = {"folder": folder, "grid": args.grid, "latents_folder": latents_folder}
            write_images(generator, source, dist, batch=args.batch, **files)
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
