"""Stage 5a: inverted faces moved along age, gender, smile ... by a boundary in latent space (InterFaceGAN).

    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir aged/ --num_sample 100000 \\
        --batch_size 25 --start_distance -30 --end_distance 30 --steps 61 --ratio 0.02
    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir smiling/ --boundary smile.npz

Random samples are scored, a boundary is fitted to them with the other attributes held fixed, freed of those of
--orthogonal_to, and saved (OUT/boundary-ATTRIBUTE.npz) with the range in which edits still are faces; then every latent
of --latent is moved along it. The scores are kept (--samples) and serve other attributes; a killed run resumes.
--boundary FILE edits at once: files of this script, or bare directions (.npy, .pt) such as InterFaceGAN's.
Per face as it is done: OUT/frames/NAME_ATTRIBUTE+3.png (--preset published: origin_I_edit_J_ATTRIBUTE_VALUE.png); a
strip with the scores below (OUT/strips); its rows of OUT/edits.csv: every score, identity similarity, perceptual
distance and mean change of the pixels per frame. With one frame per face (--at, --target, --steps 1), it and the
inversion are OUT/edited/NAME.png and OUT/unedited/NAME.png, for align_faces.py --paste_back --unedited.
"""

import math
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

from common.cli import (
    PRECISIONS,
    ArgumentParser,
    UsageError,
    UserError,
    add_device_flags,
    positive,
    run_script,
    seed_number,
    whole,
)
from common.flags import NOISES

PUBLISHED = {"fit": "svc", "conditional_fit": "none"}
SWEEP = {"start_distance": float, "end_distance": float, "distance": str, "unit": str}  # one choice, in one unit
# Flags that a generator's file may set (`recommended`, entry `edit`), with their types.
RECOMMENDED = {"num_sample": int, "ratio": float, "fit": str, "conditional_fit": str, "truncation": float, "noise": str}
RECOMMENDED = {f"{name}?": kind for name, kind in (RECOMMENDED | SWEEP | {"steps": int}).items()}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="generator: checkpoint or exported model")
    add("--latent", required=True, help="folder of latents, .npy [N, L, 512], rosinality's .pt, NVIDIA's .npz")
    add("--output_dir", type=Path, required=True, help="folder of the results")
    add("--size", type=int, help="image size, checked against the generator's")
    add("--attribute", help="gender, smile ...: what the scorer reads (default: that of --target, else age)")
    add("--scorer", default="face-scorer", help="face-scorer | FILE.safetensors | dex | dex_crop | FILE.json")
    add("--preset", choices=("published",), help="the paper's settings and file names, whatever the files recommend")
    add("--precision", choices=PRECISIONS, default="fp32", help="number type of the generator's convolutions")
    add = parser.add_argument_group("boundary").add_argument
    add("--boundary", nargs="+", help="use these files instead of sampling and fitting")
    add("--num_sample", type=int, default=100_000, help="random samples to score")
    add("--batch_size", type=whole(1), default=25, help="images at a time")
    add("--ratio", type=float, default=0.02, help="share of the samples at either end: the extremes")
    add("--fit", choices=("ridge", "svm", "svc"), default="ridge", help="svc: published; svm: faster")
    add("--conditional_fit", default="auto", metavar="NAMES", help="held fixed by ridge: auto (all), none, names")
    add("--orthogonal_to", default="", help="boundary files, comma-separated, to project out")
    add("--truncation", type=float, default=1.0, help="factor on the samples' distance from the mean w")
    add("--noise", choices=NOISES, default="random", help="noise maps of the samples")
    add("--samples", type=Path, help="folder of the scores (default: OUTPUT_DIR/samples)")
    add("--seed", type=seed_number, default=0, help="first seed of the samples, and of the 70/30 split")
    add = parser.add_argument_group("edit").add_argument
    add("--start_distance", type=float, default=-30, help="first distance, unless the boundary has a range")
    add("--end_distance", type=float, default=30, help="distance of the last frame")
    add("--steps", type=whole(1), default=61, help="frames per face")
    distances = "from the boundary (published; W+: added, as InterFaceGAN does), or from the inversion"
    add("--distance", choices=("absolute", "relative"), default="absolute", help=distances)
    add("--unit", choices=("latent", "std"), default="latent", help="latent units, or standard deviations")
    add("--at", type=float, nargs="+", metavar="DISTANCE", help="one frame, this far along all or each boundary")
    add("--layers", default="", help="layers that move, such as 0-7 or 4,6 (default: all)")
    add("--target", nargs="+", type=_target, help="ATTRIBUTE=VALUE per boundary: one frame with these scores")
    add("--video", choices=("none", "mp4", "gif", "webp"), default="none", help="a video per face")
    add("--fps", type=positive, default=20, help="frames per second of the video")
    add("--identity", default="auto", help="network of the frames' similarity to the inversion: auto, none or its name")
    add("--perceptual", default="auto-up64", help="their distance: auto-up64, vgg, squeeze, scorer:NAME ... or none")
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    parser.add_hidden_alias("--balance", "--conditional_fit")
    return parser


def _target(text: str) -> tuple[str, float]:
    """'age=60' -> ('age', 60.0). Raises ArgumentTypeError."""
    name, _, value = text.partition("=")
    try:
        if math.isfinite(number := float(value)):
            return name, number
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text}: expected ATTRIBUTE=NUMBER, such as age=60")


def refuse_misuse(steps: int, num_sample: int, ratio: float, truncation: float) -> None:
    """Raise UsageError for numbers, given or recommended, that cannot work."""
    if steps < 1 or num_sample < 4 or not 0 < ratio <= 0.5 or not 0 < truncation <= 1:
        raise UsageError("--steps takes 1 or more, --num_sample 4, --ratio up to 0.5, --truncation up to 1")


def main(args) -> None:
    import numpy as np

    from common.distributed import setup
    from common.files import check_shape
    from common.latents import parse_layers
    from common.precision import DTYPES
    from common.video import require_video
    from editing import fit, sweep
    from editing.boundary import boundary_of
    from editing.samples import Samples
    from model import load_generator
    from perceptual.identity import identity_or_none
    from perceptual.lpips import perceptual_or_none
    from sampling.render import latents_source
    from scorer.network import load_scorer

    if args.video != "none":
        require_video(Path(f"--video .{args.video}"), args.fps)
    if args.at and (args.target or len(args.at) not in (1, len(args.boundary or [None]))):
        raise UsageError("--at takes one distance for all boundaries or one for each, and excludes --target")
    if len(targets := dict(args.target or ())) > 1 and not args.boundary:
        raise UsageError(f"--target {' '.join(targets)}: several need a --boundary each; a single one is fitted")
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist, dist.lock(args.output_dir, "an edit"):
        generator = load_generator(args.ckpt, dist.device, DTYPES[args.precision])
        if args.size not in (None, generator.config.size):
            raise UserError(f"--size {args.size}: {args.ckpt} draws {generator.config.size} pixels")
        recommended = generator.recommended.get("edit", {})
        check_shape(recommended, RECOMMENDED, f"{args.ckpt}: recommended.edit")
        if SWEEP.keys() & args.given:
            recommended = {name: value for name, value in recommended.items() if name not in SWEEP}
        if args.preset:
            args.fill(PUBLISHED)
        else:
            args.recommend(recommended, RECOMMENDED, args.ckpt)
        refuse_misuse(args.steps, args.num_sample, args.ratio, args.truncation)
        source = latents_source(generator, args.latent)
        layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
        scorer = load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir)
        for name in targets if len(args.boundary or ()) < 2 else ():  # else pair_targets says what they move
            scorer.column(name)  # known
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        perceptual = perceptual_or_none(args.perceptual, dist.device, args.weights_dir)

        # Boundaries: given, or fitted to samples.
        free_of = [boundary_of(path.strip(), generator) for path in args.orthogonal_to.split(",") if path.strip()]
        seeds = range(args.seed, args.seed + args.num_sample)
        samples = Samples(generator, seeds, truncation=args.truncation, noise=args.noise)
        given = (boundary_of(path, generator) for path in args.boundary or ())
        boundaries = [fit.measure_boundary(boundary, free_of, samples) for boundary in given]
        if not boundaries:
            fitting = {"fit": args.fit, "ratio": args.ratio, "seed": args.seed, "conditional": args.conditional_fit}
            fitting |= {"free_of": free_of, "folder": args.output_dir, "weights_dir": args.weights_dir}
            scoring = {"folder": args.samples or args.output_dir / "samples", "batch": args.batch_size, "dist": dist}
            boundaries = [
                fit.fit_attribute(samples, scorer, args.attribute or [*targets, "age"][0], scoring=scoring, **fitting)
            ]

        # Distances: along the boundaries for all faces, or searched for the targets of each.
        targets, bounds = sweep.pair_targets(targets, boundaries), sweep.common_range(boundaries)
        ranged = bounds and not (args.preset or args.at or targets or {"start_distance", "end_distance"} & args.given)
        if ranged:
            ends = {"start_distance": bounds[0], "end_distance": bounds[1]}
            args.fill(ends | {"distance": "relative", "unit": "std"})
            if dist.is_main:
                print(f"range of the boundary: {bounds[0]:+.2g} to {bounds[1]:+.2g} standard deviations")
        line = [args.at] if args.at else np.linspace(args.start_distance, args.end_distance, args.steps)[:, None]
        unit = "std" if ranged else args.unit
        w_plus = generator.config.w_space and any((w != w[0]).any() for w in source.ws(range(len(source.names))))
        distance = "relative" if w_plus else args.distance  # added either way: no mean of the samples belongs to it
        edit = sweep.Edit(boundaries, np.array(line), unit, distance, targets, layers)
        if unit != args.unit:  # --unit latent, of a range in standard deviations
            edit = replace(edit, line=edit.distances(), unit=args.unit)
        names = {"attribute": args.attribute or boundaries[0].attribute, "published": bool(args.preset)}
        output = sweep.Output(args.output_dir, **names, video=args.video, fps=args.fps)
        sweep.edit_faces(generator, source, edit, (scorer, identity, perceptual), output, dist)


if __name__ == "__main__":
    run_script(main, build_parser())
