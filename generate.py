"""Images of a trained generator: by seed, truncated, mixed, interpolated, or of saved latents.

The checkpoint is ours, rosinality's or TransStyleGAN's (.pt), or an export (.safetensors); its architecture is read
from the file. A seed gives the same image whatever --batch is, up to rounding. Under torchrun the processes share the
images. What the file recommends (truncation, noise) holds where no flag is given.

    python generate.py --ckpt runs/faces/checkpoint/100000.pt --seeds 0-35 --truncation 0.7 --grid
    python generate.py --ckpt faces.safetensors --mix 0-3 10-14 --mix_layers 0-3
    python generate.py --ckpt faces.safetensors --seeds 0-7 --interpolate --video loop.mp4
    python generate.py --ckpt faces.safetensors --latents projection/ --output_dir rendered
"""

from dataclasses import replace
from pathlib import Path

from common.cli import PRECISIONS, ArgumentParser, UsageError, add_device_flags, count, positive, run_script, whole
from common.flags import NOISES, VIDEOS

RECOMMENDED = ("truncation", "truncation_mean", "noise", "noise_seed")  # flags that a generator's file may set


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")
    presets = ("recommended", "published")
    add("--preset", choices=presets, default=presets[0], help="settings where no flag is given")
    add_source_flags(parser.add_argument_group("what to render"))
    add_mode_flags(parser.add_argument_group("mixing and interpolation"))

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--outdir", default="generated", help="folder of the images; made when absent")
    add("--grid", nargs="?", type=count, const=0, metavar="NROW", help="grid.png as well, NROW per row")
    add("--save_latents", nargs="?", const="", metavar="FOLDER", help="save w; default OUTPUT_DIR/latents")
    add("--batch", type=whole(1), default=8, help="images per forward pass")
    add("--precision", choices=PRECISIONS, default="fp32", help="number type of the convolutions")
    add_device_flags(parser)
    return parser


def add_source_flags(group) -> None:
    """Add what names an image: seed or saved latents, truncation, noise, attributes."""
    source, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    source("--seeds", help="such as 7 or 0-35,40; default 0-35")
    source("--latents", metavar="FOLDER|FILE", help="saved latents instead; other programs' .npy, .pt, .npz too")
    add("--truncation", "--trunc", type=float, default=1.0, metavar="PSI", help="w = mean + psi (w - mean), per token")
    add("--truncation_mean", type=whole(1), default=10_000, metavar="N", help="samples for the mean of w")
    noise = "stored maps, maps drawn from each seed, or zeros; default const, for --latents as they were saved"
    add("--noise", choices=NOISES, help=noise)
    add("--noise_seed", type=whole(0), help="another value, other maps of --noise random; default 0")
    attributes = "attributes of a conditional generator, as smile=1; the others as saved, of seeds the training's means"
    add("--set", metavar="NAME=NUMBER,...", help=attributes)


def add_mode_flags(group) -> None:
    """Add mixing and interpolation, which exclude each other."""
    mode, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    mixing = "a grid of every row's latent with layers of every column's: seeds, or, with --latents, positions from 0"
    mode("--mix", nargs=2, metavar=("ROWS", "COLS"), help=mixing)
    mode("--interpolate", nargs="?", const="w", choices=("w", "z"), help="closed loop, straight in w or spherical in z")
    add("--mix_layers", default="0-3", metavar="RANGE", help="layers taken from the columns: 0-3 is pose and shape")
    add("--video", help=".mp4, .gif or .webp file; default OUTPUT_DIR/interpolation.mp4")
    add("--frames", type=whole(1), default=60, help="frames from one seed to the next")
    add("--fps", type=positive, default=30, help="frames per second")


def refuse_misuse(given, mix, interpolate, latents, seeds, grid, save_latents, video) -> None:
    """Raise UsageError for flags that exclude each other, or that have no effect. given: names of those on the command
    line."""
    kept = grid is not None or save_latents is not None
    for wrong, message in (
        (not interpolate and given & {"video", "frames", "fps"}, "--video, --frames and --fps are for --interpolate"),
        (not mix and "mix_layers" in given, "--mix_layers is for --mix"),
        (video and not video.lower().endswith(VIDEOS), f"--video {video}: expected {', '.join(VIDEOS)} at the end"),
        (mix and seeds, "--mix cannot be used with --seeds: name the seeds in ROWS and COLS"),
        (latents and save_latents is not None, "--latents cannot be used with --save_latents"),
        (latents and interpolate == "z", "--interpolate z cannot be used with --latents, whose z is not known"),
        (kept and (mix or interpolate), "--grid and --save_latents cannot be used with --mix or --interpolate"),
    ):
        if wrong:
            raise UsageError(message)


def main(args) -> None:
    import torch

    from common.distributed import setup
    from common.latents import parse_layers, parse_seeds
    from common.precision import DTYPES
    from editing.attributes import read_condition
    from model import load_generator
    from sampling.output import mean_w, write_images, write_loop, write_mixture
    from sampling.render import latents_source, seed_source, seeded_z

    excluding = ("mix", "interpolate", "latents", "seeds", "grid", "save_latents", "video")
    refuse_misuse(args.given, **{name: getattr(args, name) for name in excluding})
    rows, columns = ([], []) if args.mix is None else (parse_seeds(text, "--mix") for text in args.mix)
    seeds = rows + columns or parse_seeds("0-35" if args.seeds is None else args.seeds)
    if not args.interpolate and not args.mix:
        seeds = list(dict.fromkeys(seeds))  # an image each
    if args.interpolate and not args.latents and len(seeds) < 2:
        raise UsageError(f"--interpolate needs at least two seeds, got --seeds {args.seeds}")
    folder = Path(args.output_dir)
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        generator = load_generator(args.ckpt, dist.device, DTYPES[args.precision])
        recommended = {} if args.latents else generator.recommended.get("generate", {})
        args.recommend(recommended, RECOMMENDED, args.ckpt)
        mean = mean_w(generator, args.truncation, args.truncation_mean, dist)
        drawing = {"truncation": args.truncation, "mean": mean}
        if args.latents:
            source = latents_source(generator, args.latents, **drawing, noise=args.noise, noise_seed=args.noise_seed)
        else:
            if "noise_seed" in args.given and args.noise != "random":
                raise UsageError("--noise_seed is for --noise random")
            noise = {"noise": args.noise or "const", "noise_seed": args.noise_seed or 0}
            source = seed_source(generator, seeds, **drawing, **noise, batch=args.batch)
            if args.mix:  # positions of these seeds
                rows, columns = list(range(len(rows))), list(range(len(rows), len(seeds)))
        if args.set:
            condition, bases = read_condition(args.ckpt), source.condition
            if bases is None:  # latents were found under the neutral condition
                bases = torch.full((1, len(condition.attributes)), 0.5) if args.latents else [None]
            targets = condition.parse(args.set)
            source = replace(source, condition=torch.stack([condition.vector(targets, base) for base in bases]))
        if args.mix:
            layers = parse_layers(args.mix_layers, generator.config.n_tokens, "--mix_layers")
            mixture = {"rows": rows, "columns": columns, "layers": layers, "path": folder / "mix.png"}
            write_mixture(generator, source, dist, batch=args.batch, **mixture)
        elif args.interpolate:
            z = list(seeded_z(generator, seeds)) if args.interpolate == "z" else None
            video = {"frames": args.frames, "fps": args.fps, "path": Path(args.video or folder / "interpolation.mp4")}
            write_loop(generator, source, dist, z=z, batch=args.batch, **drawing, **video)
        else:
            saved = None if args.save_latents is None else Path(args.save_latents or folder / "latents")
            write_images(generator, source, dist, batch=args.batch, folder=folder, grid=args.grid, latents_folder=saved)


if __name__ == "__main__":
    run_script(main, build_parser())
