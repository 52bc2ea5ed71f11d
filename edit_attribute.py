"""Stage 5a: inverted faces moved along age, gender, smile ... by a boundary in latent space (InterFaceGAN).

    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir aged/ --num_sample 100000 \\
        --batch_size 25 --start_distance -30 --end_distance 30 --steps 61 --ratio 0.02
    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir smiling/ --attribute smile \\
        --boundary smile.npz --distance relative --unit std --start_distance -4 --end_distance 4 --steps 9

Random samples are scored, the extreme --ratio picked, a boundary fitted, freed of those of --orthogonal_to, and saved
(OUT/boundary-ATTRIBUTE.npz); then every code of --latent is moved along it. The scores are kept (--samples, default
OUT/samples) and serve other attributes; a killed run goes on. --boundary FILE edits at once. Frames:
OUT/frames/origin_I_edit_J_ATTRIBUTE_N.png, N the predicted value; a strip per face with the values below
(OUT/strips); OUT/edits.csv with every score, the identity similarity, perceptual distance and mean change of the
pixels per frame. Where one frame per face is asked for (--at, --target, --steps 1), OUT/edited/NAME.png has it under
the face's own name and OUT/unedited/NAME.png the inversion, as align_faces.py --paste_back --unedited takes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, positive, run_script
from common.distributed import add_device_flags, broadcast_object, gather_list, setup, shard, shutdown
from common.grids import make_strip
from common.images import save_image
from common.latents import parse_layers
from common.precision import DTYPES
from common.tables import write_table
from common.video import save_video
from editing.boundary import FITS, Boundary, fit_boundary, load_boundary, orthogonalise
from editing.edit import edit_codes, reach, render_codes
from editing.evaluate import Judges, judge
from editing.samples import SampledCodes, labelled_seeds, score_samples, separable_ratio
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import perceptual_or_none
from sampling.render import NOISE_MODES, latents_source, select_condition, select_noise
from scorer.network import load_scorer

ROUNDS = 3  # of the search for several targets at once
N_MEASURED = 10_000  # samples, at most, that a standard deviation along the projection of a --boundary is taken over


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="generator: checkpoint or exported model")
    parser.add_argument(
        "--latent",
        required=True,
        help="folder of latents, .npy [N, L, 512], or a projection by "
        "rosinality's (.pt) or NVIDIA's projector.py (.npz)",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", type=int, help="image size, checked against the generator's")
    parser.add_argument(
        "--attribute",
        help="age (default), gender, smile ... of the scorer; or csv:FILE[:COLUMN], "
        "your labels of pictures that generate.py drew; with --boundary: what it moves",
    )
    parser.add_argument("--scorer", default="face-scorer", help="face-scorer | FILE.safetensors | dex | FILE.json")
    parser.add_argument("--dex_crop", action="store_true", help="DEX sees the centre 224 of 256 pixels (published)")
    fit = parser.add_argument_group("boundary")
    fit.add_argument("--boundary", nargs="+", help="use these files instead of sampling and fitting")
    fit.add_argument("--num_sample", type=int, default=100_000, help="random samples to score")
    fit.add_argument("--batch_size", type=int, default=25, help="pictures at a time; changes no result on a CPU")
    fit.add_argument("--ratio", type=float, default=0.02, help="share of the samples at either end that are fitted on")
    fit.add_argument(
        "--fit",
        choices=FITS,
        default="ridge",
        help="svc: the published machine; svm: the same, faster; ridge: regression on all samples",
    )
    fit.add_argument("--balance", default="", help="attributes, comma-separated, that shall not differ at the two ends")
    fit.add_argument("--orthogonal_to", default="", help="boundary files, comma-separated, to project out")
    fit.add_argument(
        "--noise",
        choices=NOISE_MODES,
        default="random",
        help="of the samples: random (published); none where noise hides from the scorer what the code says",
    )
    fit.add_argument("--samples", type=Path, help="folder of the scores (default: OUTPUT_DIR/samples)")
    fit.add_argument("--seed", type=int, default=0, help="first seed of the samples, and of the 70/30 split")
    edit = parser.add_argument_group("edit")
    edit.add_argument("--start_distance", type=float, default=-30, help="distance of the first frame")
    edit.add_argument("--end_distance", type=float, default=30, help="distance of the last frame")
    edit.add_argument("--steps", type=int, default=61, help="frames per face")
    edit.add_argument(
        "--distance",
        choices=("absolute", "relative"),
        default="absolute",
        help="absolute: from the boundary (published); relative: from the inversion itself",
    )
    edit.add_argument(
        "--unit",
        choices=("latent", "std"),
        default="latent",
        help="of the distances: latent units, or standard deviations of the samples",
    )
    edit.add_argument(
        "--at",
        type=float,
        nargs="+",
        metavar="DISTANCE",
        help="instead of a sweep one frame, this far along each boundary (one distance for all, or one each)",
    )
    edit.add_argument("--layers", default="", help="layers that move, such as 0-7 or 4,6 (default: all)")
    edit.add_argument(
        "--target",
        nargs="+",
        help="ATTRIBUTE=VALUE ...: one frame per face where the scorer sees that; "
        "several values with as many boundaries",
    )
    edit.add_argument("--no_frames", action="store_true", help="strips and tables only")
    edit.add_argument("--video", choices=("none", "mp4", "gif", "webp"), default="none", help="a video per face")
    edit.add_argument("--fps", type=positive, default=20, help="frames per second of the video")
    edit.add_argument(
        "--identity",
        choices=("auto", "none", *WEIGHTS),
        default="auto",
        help="network that says how alike each frame is to the inversion",
    )
    edit.add_argument(
        "--perceptual",
        default="auto-up64",
        help="distance of each frame to the inversion: auto-up64, vgg, squeeze, scorer:NAME ... or none",
    )
    edit.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    parser.add_argument(
        "--precision",
        choices=list(DTYPES),
        default="fp32",
        help="of the generator's convolutions, in samples and frames",
    )
    add_device_flags(parser)
    return parser


def main(args) -> None:
    check_flags(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        generator.compute_dtype = DTYPES[args.precision]
        if args.size and args.size != generator.config.size:
            raise UserError(f"--size {args.size}: {args.ckpt} draws {generator.config.size} pixels")
        layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
        source = latents_source(generator, args.latent, truncation=1, mean=None, noise=None, noise_seed=None)
        scorer = load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir, dex_crop=args.dex_crop)
        others = [read_boundary(path, generator) for path in args.orthogonal_to.split(",") if path]
        if args.boundary:
            boundaries = [read_boundary(path, generator) for path in args.boundary]
            if others:
                codes = SampledCodes(generator, range(args.seed, args.seed + min(args.num_sample, N_MEASURED)))
                boundaries = [orthogonalise(boundary, others, codes) for boundary in boundaries]
        else:
            args.attribute = args.attribute or "age"
            boundaries = [make_boundary(args, generator, scorer, others, dist)]
        shown = args.attribute if args.boundary and args.attribute else boundaries[0].attribute
        judges = Judges(
            scorer,
            identity_or_none(args.identity, dist.device, args.weights_dir),
            perceptual_or_none(args.perceptual, dist.device, args.weights_dir),
        )
        rows = []
        mine = shard(len(source.names), dist.rank, dist.world_size)
        for i in tqdm(mine, desc="editing", unit="face", disable=None):
            rows += edit_face(args, generator, source, i, boundaries, judges, shown, layers)
        rows = [row for share in gather_list(rows) for row in share]
        if dist.is_main:
            write_table(args.output_dir / "edits.csv", rows)
            print(f"{len(source.names)} faces along {', '.join(b.attribute for b in boundaries)}: {args.output_dir}")
            for name, value in pair_targets(parse_targets(args.target or ()), boundaries).values():
                print(describe_target(scorer, name, value, [row[name] for row in rows]))
    finally:
        shutdown()


def check_flags(args):
    """Raises UsageError."""
    if args.steps < 1 or args.num_sample < 4 or args.batch_size < 1 or not 0 < args.ratio <= 0.5:
        raise UsageError("--steps and --batch_size take 1 or more, --num_sample 4 or more, --ratio above 0, up to 0.5")
    parse_targets(args.target or [])
    if args.at and (args.target or len(args.at) not in (1, len(args.boundary or [None]))):
        raise UsageError("--at takes one distance for all boundaries or one for each, and excludes --target")


# -- boundaries ----------------------------------------------------------------------------------------------------


def read_boundary(path, generator) -> Boundary:
    config = generator.config
    width = config.style_dim * (1 if config.w_space else config.n_tokens)
    space = "w" if config.w_space else "w++"
    return load_boundary(path, space=space, width=width, fingerprint=generator.fingerprint)


def make_boundary(args, generator, scorer, others, dist) -> Boundary:
    """Sample, score, fit, project out the boundaries `others`, save. Every rank gets the same boundary."""
    if args.attribute.startswith("csv:"):
        seeds, scores, name = labelled_seeds(args.attribute.removeprefix("csv:"))
        ratio, balance = separable_ratio(scores), None
    else:
        seeds, name, ratio = range(args.seed, args.seed + args.num_sample), args.attribute, args.ratio
        table = score_samples(
            generator,
            scorer,
            args.num_sample,
            folder=args.samples or args.output_dir / "samples",
            batch=args.batch_size,
            first=args.seed,
            noise=args.noise,
            dist=dist,
        )
        balance = [scorer.column(other) for other in args.balance.split(",") if other]
        scores, balance = table[:, scorer.column(name)], table[:, balance] if balance else None
    boundary = None
    if dist.is_main:
        codes = SampledCodes(generator, seeds)
        boundary = fit_boundary(
            codes,
            scores,
            ratio=ratio,
            fit=args.fit,
            seed=args.seed,
            others=balance,
            space="w" if generator.config.w_space else "w++",
            attribute=name,
            fingerprint=generator.fingerprint,
            size=generator.config.size,
        )
        shown = ", ".join(f"{part} {value:.1%}" for part, value in boundary.accuracies.items() if value is not None)
        if others:
            boundary, shown = orthogonalise(boundary, others, codes), f"{shown} before the projection"
        path = boundary.save(args.output_dir / f"boundary-{name}.npz")
        print(
            f"{path}: {args.fit} on {len(seeds)} samples, accuracy {shown}; "
            f"one standard deviation is {boundary.std:.3g}"
        )
    return broadcast_object(boundary)


# -- a face --------------------------------------------------------------------------------------------------------


def edit_face(args, generator, source, i, boundaries, judges, attribute, layers) -> list[dict]:
    """Frames, strip and video of one face; returns its rows of edits.csv. attribute: what names and captions show."""
    (code,) = source.codes([i])
    code, noise, condition = code.numpy(), select_noise(source.noise, [i]), select_condition(source.condition, [i])
    distances = frame_distances(args, generator, code, noise, condition, boundaries, judges.scorer, layers)
    how = "relative" if args.target else args.distance
    codes = edit_codes(code, boundaries, distances, distance=how, layers=layers)
    codes = np.concatenate((code[None], codes))  # the inversion comes first
    frames = list(render_codes(generator, codes, noise, condition=condition))
    found, names = judge(judges, frames), judges.scorer.names
    captions = caption_frames(judges.scorer, attribute, found.scores, distances)
    rows = []
    for j, (frame, score) in enumerate(zip(frames[1:], found.scores[1:], strict=True)):
        name = f"origin_{i}_edit_{j}_{attribute}_{captions[j + 1]}.png"
        if not args.no_frames:
            save_image(frame, args.output_dir / "frames" / name)
        rows.append(
            {
                "image": source.names[i],
                "origin": i,
                "edit": j,
                "distance": round(float(distances[j, 0]), 4),
                "frame": name,
                **{n: round(float(s), 4) for n, s in zip(names, score, strict=True)},
                **{
                    what: "" if values is None else round(float(values[j + 1]), 4)
                    for what, values in (
                        ("identity", found.identity),
                        ("perceptual", found.perceptual),
                        ("change", found.change),
                    )
                },
            }
        )
    if len(frames) == 2:  # one picture per face keeps the face's name: align_faces.py --paste_back finds it by that
        for folder, frame in zip(("unedited", "edited"), frames, strict=True):
            save_image(frame, args.output_dir / folder / f"{source.names[i]}.png")
    show_sweep(args, f"origin_{i}_{attribute}", frames, captions)
    return rows


def reach_targets(args, generator, code, noise, condition, boundaries, scorer, layers) -> list[float]:
    """Relative distances, one per boundary, at which the scorer sees the values of --target (or comes nearest)."""
    targets = pair_targets(parse_targets(args.target), boundaries)
    found = [0.0] * len(boundaries)
    for _ in range(ROUNDS if len(targets) > 1 else 1):  # one edit moves the other attributes a little
        for k, (name, value) in targets.items():
            rest = [0.0 if i == k else distance for i, distance in enumerate(found)]
            (start,) = edit_codes(code, boundaries, [rest], layers=layers)
            found[k], _ = reach(
                generator,
                start,
                noise,
                boundaries[k],
                scorer,
                scorer.column(name),
                value,
                limit=6 * boundaries[k].std,
                near=tolerance(scorer, name),
                layers=layers,
                condition=condition,
            )
    return found


def tolerance(scorer, name) -> float:
    """How near to its target a score counts as there: 2 years, or 0.05."""
    return 2 if scorer.attributes[scorer.column(name)].kind == "years" else 0.05


def describe_target(scorer, name, value, seen) -> str:
    """How many faces came to the target, and what the scorer reads of the others."""
    near = tolerance(scorer, name)
    missed = [score for score in seen if abs(score - value) > near]
    rest = f"; the others come to {min(missed):.3g} to {max(missed):.3g} at best, within 6 sd" if missed else ""
    return f"{name}={value:g}: {len(seen) - len(missed)} of {len(seen)} faces within {near}{rest}"


def parse_targets(texts) -> dict[str, float]:
    """['age=60', 'gender=0'] -> {'age': 60.0, 'gender': 0.0}. Raises UsageError."""
    targets = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--target {text}: expected ATTRIBUTE=VALUE, such as age=60")
        try:
            targets[name] = float(value)
        except ValueError:
            raise UsageError(f"--target {text}: {value!r} is no number") from None
    return targets


def pair_targets(targets, boundaries) -> dict[int, tuple[str, float]]:
    """{number of the boundary: (attribute, value)}, by attribute; a single boundary may serve any target."""
    if len(targets) == len(boundaries) == 1:
        return {0: next(iter(targets.items()))}
    moved = [boundary.attribute for boundary in boundaries]
    absent = [name for name in targets if name not in moved]
    if absent:
        raise UsageError(f"--target {absent[0]}: no --boundary moves it; they move {', '.join(moved)}")
    return {moved.index(name): (name, value) for name, value in targets.items()}


def caption_frames(scorer, attribute, scores, distances) -> list[str]:
    """What the scorer sees in each of the frames [K + 1]; of an attribute that it does not know, the distance."""
    if attribute not in scorer.names:
        return ["0", *(f"{distance:+.3g}" for distance in distances[:, 0])]
    column = scorer.column(attribute)
    digits = 0 if scorer.attributes[column].kind == "years" else 2
    return [f"{value:.{digits}f}" for value in scores[:, column]]


def frame_distances(args, generator, code, noise, condition, boundaries, scorer, layers) -> np.ndarray:
    """[K, number of boundaries], in latent units."""
    if args.target:
        return np.array([reach_targets(args, generator, code, noise, condition, boundaries, scorer, layers)])
    if args.at:
        line = np.array([args.at])  # [1, 1 or number of boundaries]
    else:
        line = np.linspace(args.start_distance, args.end_distance, args.steps)[:, None]
    units = [boundary.std if args.unit == "std" else 1.0 for boundary in boundaries]
    means = [boundary.mean if args.unit == "std" and args.distance == "absolute" else 0.0 for boundary in boundaries]
    return line * units + means


def show_sweep(args, name, frames, captions):
    """Strip (at most 13 of the frames, the inversion first) and video."""
    chosen = np.unique(np.linspace(1, len(frames) - 1, min(12, len(frames) - 1)).round().astype(int))
    scale = max(1, 96 // frames[0].shape[0])  # small pictures would have no room for their captions
    cells = [frames[j].repeat(scale, 0).repeat(scale, 1) for j in [0, *chosen]]
    below = [f"inv. {captions[0]}", *(captions[j] for j in chosen)]
    save_image(make_strip(cells, below), args.output_dir / "strips" / f"{name}.png")
    if args.video != "none":
        save_video(frames[1:], args.output_dir / "videos" / f"{name}.{args.video}", args.fps)


if __name__ == "__main__":
    run_script(main, build_parser())
