"""Pictures of a trained generator: by seed, truncated, mixed, interpolated, or of saved latents; and its export.

The checkpoint is ours, rosinality's or TransStyleGAN's (.pt), or an export (.safetensors); its architecture is read
from the file. A seed gives the same picture whatever --batch is (on a GPU up to rounding, see sampling/render.py).
Under torchrun the processes share the pictures.

    python generate.py --ckpt runs/faces/checkpoint/100000.pt --seeds 0-35 --truncation 0.7 --grid
    python generate.py --ckpt faces.safetensors --mix 0-3 10-14 --mix_layers 0-3
    python generate.py --ckpt faces.safetensors --seeds 0-7 --interpolate --video loop.mp4
    python generate.py --ckpt faces.safetensors --latents projection/ --output_dir rendered
    python generate.py --ckpt runs/faces/checkpoint/100000.pt --export faces.safetensors
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import ArgumentParser, UsageError, UserError, positive, run_script
from common.distributed import Distributed, add_device_flags, broadcast_object, gather_list, setup, shard, shutdown
from common.export import export_discriminator, export_ema
from common.grids import save_grid
from common.images import save_image
from common.latents import parse_layers, parse_seeds, save_latents
from common.precision import DTYPES
from common.video import save_video
from editing.attributes import read_condition
from model import Generator, load_generator
from sampling.render import (
    CONDITION,
    NOISE_MODES,
    RECORD,
    Source,
    blend_noise,
    latents_source,
    loop_position,
    map_latents,
    mix,
    mixing_sheet,
    noise_at,
    render,
    seed_source,
    seeded_z,
    select_condition,
    select_noise,
    slerp,
)

DEFAULT_SEEDS = "0-35"
VIDEOS = (".mp4", ".gif", ".webp")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")

    what = parser.add_argument_group("what to render")
    what.add_argument("--seeds", help=f"such as 7 or 0-35,40; {DEFAULT_SEEDS} unless something else is asked for")
    what.add_argument(
        "--latents",
        metavar="FOLDER|FILE",
        help="render saved latents (also .npy, rosinality's .pt, "
        "NVIDIA's projected_w.npz), with their saved noise, instead",
    )
    what.add_argument(
        "--truncation",
        "--trunc",
        type=float,
        default=1.0,
        metavar="PSI",
        help="w = mean + psi (w - mean), per token; 1: none, 0: the mean picture",
    )
    what.add_argument("--truncation_mean", type=int, default=10_000, metavar="N", help="samples for the mean of w")
    what.add_argument(
        "--noise",
        choices=NOISE_MODES,
        help="const: the maps stored in the generator; random: drawn for each picture from its seed; "
        "none: zeros; default const, for --latents what they were saved with",
    )
    what.add_argument(
        "--set",
        metavar="NAME=NUMBER,...",
        help="attributes of a conditional generator, such as smile=1; the others as they were saved, or "
        "the means of the training images (without --set: 0.5)",
    )
    what.add_argument("--noise_seed", type=int, help="another value, other maps of --noise random; default 0")

    modes = parser.add_argument_group("mixing and interpolation")
    modes.add_argument(
        "--mix",
        nargs=2,
        metavar=("ROWS", "COLS"),
        help="one sheet: every row's code with layers of every column's; two lists of seeds, or, with "
        "--latents, of positions from 0",
    )
    modes.add_argument(
        "--mix_layers",
        default="0-3",
        metavar="RANGE",
        help="layers (tokens of w) taken from the columns: 0-3 is coarse, pose and shape",
    )
    modes.add_argument(
        "--interpolate",
        nargs="?",
        const="w",
        choices=("w", "z"),
        help="closed loop through the seeds or latents: straight in w, or spherical in z",
    )
    modes.add_argument("--video", help="where: .mp4, .gif or .webp; default OUTPUT_DIR/interpolation.mp4")
    modes.add_argument("--frames", type=int, default=60, help="frames from one seed to the next")
    modes.add_argument("--fps", type=positive, default=30, help="frames per second")

    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", "--outdir", default="generated", help="folder of the pictures; made when absent")
    out.add_argument(
        "--grid",
        nargs="?",
        type=int,
        const=0,
        metavar="NROW",
        help="also one sheet of all pictures, grid.png, NROW per row (default: a square)",
    )
    out.add_argument(
        "--save_latents",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="also save the w codes drawn, for --latents; default OUTPUT_DIR/latents",
    )
    out.add_argument(
        "--export",
        metavar="FILE",
        help="write the EMA generator with its config as .safetensors; renders nothing unless --seeds or the like asks",
    )
    out.add_argument("--half", action="store_true", help="export in 16 bits: half the file, a fingerprint of its own")
    out.add_argument(
        "--base",
        metavar="FILE",
        help="an export in the same folder, whose equal tensors are left out: for a --light conditional "
        "generator that was made from it",
    )
    out.add_argument(
        "--with_d",
        action="store_true",
        help="export the discriminator too (FILE-d.safetensors), with which train.py --init_from goes on",
    )
    out.add_argument(
        "--batch",
        type=int,
        default=8,
        help="pictures per forward pass on a GPU; a CPU computes each alone, so that the batch cannot change it",
    )
    out.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions")
    add_device_flags(parser)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain values


@dataclass(frozen=True)
class Task:
    """What the flags ask for: `kind` is pictures, mix, loop or export (nothing to render)."""

    kind: str
    seeds: list[int]  # of the pictures; for mix rows, then columns; empty with --latents
    rows: list[int]  # positions of the sources, for mix
    columns: list[int]


def read_options(args) -> Task:
    """Raises UsageError for flags that cannot be read or exclude each other."""
    for name in ("batch", "frames", "truncation_mean"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not math.isfinite(args.truncation) or not 0 < args.fps < math.inf:
        raise UsageError(f"--truncation and --fps take finite numbers, got {args.truncation} and {args.fps}")
    if args.noise_seed is not None and args.noise_seed < 0:
        raise UsageError(f"--noise_seed must be 0 or more, got {args.noise_seed}")
    if args.video is not None and Path(args.video).suffix.lower() not in VIDEOS:
        raise UsageError(f"--video {args.video}: expected a name that ends with {', '.join(VIDEOS)}")
    if args.export is not None and Path(args.export).suffix.lower() != ".safetensors":
        raise UsageError(f"--export {args.export}: expected a name that ends with .safetensors")
    for flag, other, wrong in (
        ("--mix", "--interpolate", args.mix and args.interpolate),
        ("--mix", "--seeds (name the seeds in ROWS and COLS)", args.mix and args.seeds is not None),
        ("--latents", "--seeds", args.latents and args.seeds is not None),
        ("--latents", "--save_latents", args.latents and args.save_latents is not None),
        ("--latents", "--interpolate z (their z is not known)", args.latents and args.interpolate == "z"),
        (
            "--grid and --save_latents",
            "--mix and --interpolate",
            (args.mix or args.interpolate) and (args.grid is not None or args.save_latents is not None),
        ),
    ):
        if wrong:
            raise UsageError(f"{flag} cannot be used with {other}")
    for flag, needed, wrong in (
        ("--video", "--interpolate", args.video and not args.interpolate),
        ("--half", "--export", args.half and not args.export),
        ("--base", "--export", args.base and not args.export),
        ("--with_d", "--export", args.with_d and not args.export),
    ):
        if wrong:
            raise UsageError(f"{flag} is for {needed}")
    return _read_task(args)


def _read_task(args) -> Task:
    if args.mix:
        rows, columns = (parse_numbers(text, "--mix") for text in args.mix)
        if args.latents:
            return Task("mix", [], rows, columns)
        positions = range(len(rows) + len(columns))
        return Task("mix", rows + columns, list(positions[: len(rows)]), list(positions[len(rows) :]))
    nothing_else = args.seeds is None and not args.latents and not args.interpolate
    if args.export and nothing_else and args.grid is None and args.save_latents is None:
        return Task("export", [], [], [])
    seeds = [] if args.latents else parse_numbers(args.seeds or DEFAULT_SEEDS, "--seeds")
    if args.interpolate and len(seeds) == 1:
        raise UsageError(f"--interpolate needs at least two seeds, got --seeds {args.seeds}")
    return Task("loop" if args.interpolate else "pictures", seeds, [], [])


def parse_numbers(text: str, flag: str) -> list[int]:
    """parse_seeds, whose message names the flag at fault."""
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise UsageError(str(error).replace("--seeds", flag, 1)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of output


def write_pictures(generator, source: Source, dist: Distributed, *, folder, grid, latents_folder, **settings) -> None:
    """One PNG per picture, shared among the ranks; optional sheet and latents, by rank 0. Prints what was written."""
    mine = shard(len(source.names), dist.rank, dist.world_size)
    kept_codes, kept_pictures = [], []

    def codes():
        for code in source.codes(mine):
            if latents_folder is not None:
                kept_codes.append(code.numpy())
            yield code

    condition = select_condition(source.condition, mine)
    pictures = render(generator, codes(), noise=noise_at(source.noise, mine), condition=condition, **settings)
    for position, picture in zip(mine, progress(pictures, len(mine), dist), strict=True):
        save_image(picture, folder / f"{source.names[position]}.png")
        if grid is not None:
            kept_pictures.append(picture)
    kept_codes = gather_list(kept_codes)  # also: nobody says "done" before every rank is
    kept_pictures = gather_list(kept_pictures)
    if not dist.is_main:
        return
    print(f"{folder}: {len(source.names)} pictures, {source.names[0]}.png to {source.names[-1]}.png")
    if grid is not None:
        pictures = sum(kept_pictures, [])
        print(f"{save_grid(pictures, folder / 'grid.png', nrow=grid or math.ceil(len(pictures) ** 0.5))}: the sheet")
    if latents_folder is not None:
        latents, config = np.stack(sum(kept_codes, [])), generator.config
        save_latents(
            latents_folder,
            latents,
            names=source.names,
            space=config.space,
            size=config.size,
            fingerprint=generator.fingerprint,
            extra=record(source),
        )
        print(f"{latents_folder}: their w codes, for --latents")


def record(source: Source) -> dict:
    """What latents.json keeps of how the codes were drawn and are to be rendered."""
    if source.condition is None:
        return {RECORD: source.about}
    return {RECORD: source.about, CONDITION: {"values": source.condition.expand(len(source.names), -1).tolist()}}


def write_mixture(generator, source: Source, dist, *, rows, columns, layers, path, **settings) -> None:
    """The mixing sheet: cell (r, c) is row r's code with `layers` of column c's, and row r's noise."""
    beyond = [i for i in rows + columns if i >= len(source.names)]
    if beyond:
        raise UserError(f"--mix names position {beyond[0]}: the latents have the positions 0-{len(source.names) - 1}")
    sources = rows + columns
    points = list(source.codes(sources))
    pairs = [(r, len(rows) + c) for r in range(len(rows)) for c in range(len(columns))]
    positions = sources + [sources[r] for r, _ in pairs]  # whose noise

    def code(index):
        if index < len(points):
            return points[index]
        r, c = pairs[index - len(points)]
        return mix(points[r], points[c], layers)

    mine = shard(len(positions), dist.rank, dist.world_size)
    own = [positions[i] for i in mine]
    settings |= {"noise": noise_at(source.noise, own), "condition": select_condition(source.condition, own)}
    pictures = list(progress(render(generator, map(code, mine), **settings), len(mine), dist))
    pictures = sum(gather_list(pictures), [])
    if dist.is_main:
        margin, cells = pictures[: len(points)], pictures[len(points) :]
        save_image(mixing_sheet(margin[: len(rows)], margin[len(rows) :], cells), path)
        print(
            f"{path}: {len(rows)} x {len(columns)} mixtures, layers {layers} of the upper margin, the others and the "
            "noise of the left one"
        )


def write_loop(generator, source: Source, dist, *, z, truncation, mean, frames, path, fps, **settings) -> None:
    """The closed loop through all codes as a video. z: the points in z, or None for the straight way in w.

    At every point stands that seed's or latent's own picture, with its own noise, which is blended on the way. The
    ranks render blocks of frames in turn, so that memory does not grow with the length.
    """
    n = len(source.names)
    if n < 2:
        raise UserError(f"--interpolate needs at least two latents, got {n}")
    points = list(source.codes(range(n))) if z is None else z
    maps = functools.lru_cache(maxsize=4)(lambda point: select_noise(source.noise, [point]))
    changing = callable(source.noise) or len(source.noise[0]) > 1

    def codes(block):
        ways = [loop_position(frame, n, frames) for frame in block]
        if z is None:
            return (torch.lerp(points[a], points[b], t) for a, b, t in ways)
        path_z = (slerp(points[a], points[b], t) for a, b, t in ways)
        return map_latents(generator, path_z, truncation=truncation, mean=mean, batch=settings["batch"])

    def noise(block, chosen):
        ways = [loop_position(block[i], n, frames) for i in chosen]
        layers = [blend_noise(maps(a), maps(b), t) for a, b, t in ways]
        return [torch.cat(layer) for layer in zip(*layers, strict=True)]

    def condition(block):
        if source.condition is None or not block:
            return None
        ways = [loop_position(frame, n, frames) for frame in block]
        own = functools.partial(select_condition, source.condition)
        return torch.cat([torch.lerp(own([a]), own([b]), t) for a, b, t in ways])

    def pictures():
        total, step = n * frames, settings["batch"]
        for start in range(0, total, step * dist.world_size):
            first = start + step * dist.rank
            block = range(min(first, total), min(first + step, total))
            maps_of = functools.partial(noise, block) if changing else source.noise
            frames_of = render(generator, codes(block), noise=maps_of, condition=condition(block), **settings)
            for part in gather_list(list(frames_of)):
                yield from part

    video = progress(pictures(), n * frames, dist)
    if dist.is_main:
        save_video(video, path, fps)
        print(f"{path}: {n * frames} frames through {n} points, {n * frames / fps:.1f} s")
    else:
        for _ in video:
            pass


def export(generator, args) -> None:
    """--export, with what the file knows of step and condition (editing/attributes.py); --with_d: and what judged it.

    Raises UserError, before anything is written, for a file without the discriminator that is asked for.
    """
    path, config = Path(args.ckpt), generator.config
    stored = load_safetensors(path)[1] if path.suffix == ".safetensors" else load_checkpoint(path)
    if args.with_d and not {"d", "config"} <= stored.keys():
        raise UserError(f"--with_d: {path} holds no discriminator with its config: expected a checkpoint of train.py")
    known = {name: stored.get(name) for name in ("step", "condition")}
    state = {"g_ema": generator.state_dict(), "config": config.to_dict(), **known}
    identity = export_ema(state, args.export, half=args.half, base=args.base)
    print(f"{args.export}: {config.space} generator, {config.size} px, fingerprint {identity}")
    if args.with_d:
        print(f"{export_discriminator(stored, args.export, half=args.half)}: its discriminator")


def progress(items, total: int, dist: Distributed):
    return tqdm(items, total=total, disable=not dist.is_main, unit="picture", dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------


def truncation_mean(generator: Generator, args, dist: Distributed) -> torch.Tensor | None:
    """Mean code [1, L, D] on the CPU where truncation needs one: computed by rank 0, the same on all."""
    if args.truncation == 1:
        return None
    if dist.is_main:
        print(f"mean of {args.truncation_mean} codes ...", file=sys.stderr)
    return broadcast_object(generator.mean_latent(args.truncation_mean).cpu() if dist.is_main else None)


def ask_for(source: Source, args) -> Source:
    """The source with the attributes of --set. Raises ValueError for those that the generator does not know."""
    if not args.set:
        return source
    known = read_condition(args.ckpt)
    requests = known.parse(args.set)
    base = torch.tensor([known.means]) if source.condition is None else source.condition  # [1 or N, d]
    return replace(source, condition=torch.stack([known.vector(requests, row) for row in base]))


def main(args) -> int:
    task = read_options(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        config = generator.config
        layers = parse_layers(args.mix_layers, config.n_tokens, "--mix_layers") if task.kind == "mix" else []
        if args.export and dist.is_main:
            export(generator, args)
        if task.kind == "export":
            return 0

        folder = Path(args.output_dir)
        settings = {"batch": args.batch, "dtype": DTYPES[args.precision]}
        trunc = {"truncation": args.truncation, "mean": truncation_mean(generator, args, dist)}
        if args.latents:
            source = latents_source(generator, args.latents, **trunc, noise=args.noise, noise_seed=args.noise_seed)
        else:
            source = seed_source(
                generator,
                task.seeds,
                **trunc,
                noise=args.noise or "const",
                noise_seed=args.noise_seed or 0,
                batch=args.batch,
            )
        source = ask_for(source, args)
        if task.kind == "mix":
            write_mixture(
                generator,
                source,
                dist,
                rows=task.rows,
                columns=task.columns,
                layers=layers,
                path=folder / "mix.png",
                **settings,
            )
        elif task.kind == "loop":
            z = list(seeded_z(generator, task.seeds)) if args.interpolate == "z" else None
            write_loop(
                generator,
                source,
                dist,
                z=z,
                **trunc,
                frames=args.frames,
                fps=args.fps,
                path=Path(args.video or folder / "interpolation.mp4"),
                **settings,
            )
        else:
            latents_folder = None if args.save_latents is None else Path(args.save_latents or folder / "latents")
            write_pictures(
                generator, source, dist, folder=folder, grid=args.grid, latents_folder=latents_folder, **settings
            )
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
