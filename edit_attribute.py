"""Stage 5a: inverted faces moved along age, gender, smile ... by a boundary in latent space (InterFaceGAN).

    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir aged/ --num_sample 100000 \\
        --batch_size 25 --start_distance -30 --end_distance 30 --steps 61 --ratio 0.02
    python3 edit_attribute.py --ckpt faces.pt --latent inverted/ --output_dir smiling/ --boundary smile.npz

Random samples are scored, a boundary is fitted to them with the other attributes held fixed, freed of those of
--orthogonal_to, and saved (OUT/boundary-ATTRIBUTE.npz) with the range in which edits still are faces; then every latent
of --latent is moved along it. The scores are kept (--samples, default OUT/samples) and serve other attributes; a killed
run resumes. --boundary FILE edits at once: files of this script, or bare directions (.npy, .pt) such as InterFaceGAN's.
Per face as it is done: OUT/frames/NAME_ATTRIBUTE+3.png (--preset published: origin_I_edit_J_ATTRIBUTE_VALUE.png); a
strip with what the scorer reads below (OUT/strips); its rows of OUT/edits.csv: every score, the identity similarity,
perceptual distance and mean change of the pixels per frame. With one frame per face (--at, --target, --steps 1),
OUT/edited/NAME.png has it under the face's own name and OUT/unedited/NAME.png the inversion, as align_faces.py
--paste_back --unedited takes them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, positive_int, run_script
from common.distributed import broadcast_object, gather_list, setup, shard, shutdown
from common.files import check_shape
from common.grids import make_strip
from common.images import save_image
from common.latents import parse_layers
from common.names import safe_name
from common.precision import DTYPES
from common.tables import append_table, write_table
from common.video import save_video
from editing.boundary import Boundary, load_boundary, orthogonalise
from editing.edit import InvertedFace, edit_codes, edit_face, face_at, score_along, search_distance
from editing.evaluate import Evaluation, evaluate
from editing.fit import FITS, fit_boundary
from editing.realism import edit_range
from editing.samples import Samples, labelled_seeds, score_samples, separable_ratio
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import perceptual_or_none
from sampling.render import NOISE_MODES, latents_source
from scorer.network import load_scorer

ROUNDS = 3  # of the search for several targets at once
LIMIT = 6.0  # standard deviations within which a target is looked for
N_MEASURED = 10_000  # samples, at most, over which the statistics of a given direction are taken
PUBLISHED = {"fit": "svc", "conditional_fit": "none"}
RECOMMENDED = {  # flags that a generator's file may set (`recommended`, entry `edit`), with their types
    "num_sample?": int,
    "ratio?": float,
    "fit?": str,
    "conditional_fit?": str,
    "truncation?": float,
    "noise?": str,
    "start_distance?": float,
    "end_distance?": float,
    "steps?": int,
    "distance?": str,
    "unit?": str,
}
SWEEP = {"start_distance", "end_distance", "distance", "unit"}  # one choice: distances given by hand keep their unit


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="generator: checkpoint or exported model")
    add(
        "--latent",
        required=True,
        help="folder of latents, .npy [N, L, 512] or [L, 512], rosinality's .pt, NVIDIA's .npz",
    )
    add("--output_dir", type=Path, required=True, help="folder of the results")
    add("--size", type=int, help="image size, checked against the generator's")
    add(
        "--attribute",
        help="age (default), gender, smile ... of the scorer; or csv:FILE[:COLUMN], your labels of images that "
        "generate.py drew; with --boundary: what it moves",
    )
    add("--scorer", default="face-scorer", help="face-scorer | FILE.safetensors | dex | FILE.json")
    add("--dex_crop", action="store_true", help="DEX sees the centre 224 of 256 pixels (published)")
    add(
        "--preset",
        choices=("published",),
        help="the paper's settings and file names, whatever generator and boundary say",
    )
    add("--precision", choices=list(DTYPES), default="fp32", help="of the generator's convolutions")
    _add_fit_flags(parser.add_argument_group("boundary").add_argument)
    _add_edit_flags(parser.add_argument_group("edit").add_argument)
    add_device_flags(parser)
    parser.add_hidden_alias("--balance", "--conditional_fit")
    return parser


def _add_fit_flags(add) -> None:
    add("--boundary", nargs="+", help="use these files instead of sampling and fitting")
    add("--num_sample", type=int, default=100_000, help="random samples to score")
    add("--batch_size", type=positive_int, default=25, help="images at a time")
    add("--ratio", type=float, default=0.02, help="share of the samples at either end: the extremes")
    add(
        "--fit",
        choices=FITS,
        default="ridge",
        help="regression on all samples; svc: the published SVM; svm: it, faster",
    )
    add(
        "--conditional_fit",
        default="auto",
        metavar="NAMES",
        help="attributes to hold fixed, comma-separated: ridge regresses on them too, svm and svc balance the "
        "extremes; auto: with ridge all others of the scorer; none",
    )
    add("--orthogonal_to", default="", help="boundary files, comma-separated, to project out")
    add("--truncation", type=float, default=1.0, help="of the samples, towards the mean latent")
    add("--noise", choices=NOISE_MODES, default="random", help="of the samples; none where it hides the attribute")
    add("--samples", type=Path, help="folder of the scores (default: OUTPUT_DIR/samples)")
    add("--seed", type=int, default=0, help="first seed of the samples, and of the 70/30 split")


def _add_edit_flags(add) -> None:
    add(
        "--start_distance",
        type=float,
        default=-30,
        help="distance of the first frame; without this and --end_distance the range in the boundary's file, if it has "
        "one, in standard deviations from the inversion",
    )
    add("--end_distance", type=float, default=30, help="distance of the last frame")
    add("--steps", type=positive_int, default=61, help="frames per face")
    add(
        "--distance",
        choices=("absolute", "relative"),
        default="absolute",
        help="from the boundary (published; to W+ latents it is added, as InterFaceGAN does), or from the inversion",
    )
    add(
        "--unit",
        choices=("latent", "std"),
        default="latent",
        help="latent units, or standard deviations of the samples",
    )
    add(
        "--at",
        type=float,
        nargs="+",
        metavar="DISTANCE",
        help="one frame, this far along all boundaries, or along each",
    )
    add("--layers", default="", help="layers that move, such as 0-7 or 4,6 (default: all)")
    add(
        "--target",
        nargs="+",
        type=_target,
        help="ATTRIBUTE=VALUE ...: one frame where the scorer sees that; several with as many boundaries",
    )
    add("--no_frames", action="store_true", help="strips and tables only")
    add("--video", choices=("none", "mp4", "gif", "webp"), default="none", help="a video per face")
    add("--fps", type=positive, default=20, help="frames per second of the video")
    add("--identity", choices=("auto", "none", *WEIGHTS), default="auto", help="similarity of frames to the inversion")
    add("--perceptual", default="auto-up64", help="their distance: auto-up64, vgg, squeeze, scorer:NAME ... or none")
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")


def _target(text: str) -> tuple[str, float]:
    """'age=60' -> ('age', 60.0). Raises ArgumentTypeError."""
    name, equals, value = text.partition("=")
    try:
        number = float(value)
        if not equals or not np.isfinite(number):
            raise ValueError
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected ATTRIBUTE=NUMBER, such as age=60") from None
    return name, number


def _check(args) -> None:
    """Raises UsageError for flags that do not go together."""
    if args.steps < 1 or args.num_sample < 4 or not 0 < args.ratio <= 0.5 or not 0 < args.truncation <= 1:
        raise UsageError(
            "--steps takes 1 or more, --num_sample 4 or more, --ratio above 0, up to 0.5, --truncation above 0, up to 1"
        )
    if args.at and (args.target or len(args.at) not in (1, len(args.boundary or [None]))):
        raise UsageError("--at takes one distance for all boundaries or one for each, and excludes --target")


def main(args) -> None:
    _check(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    say = print if dist.is_main else lambda *_, **__: None
    try:
        generator = load_generator(args.ckpt, dist.device, DTYPES[args.precision])
        if args.size and args.size != generator.config.size:
            raise UserError(f"--size {args.size}: {args.ckpt} draws {generator.config.size} pixels")
        recommended = generator.recommended.get("edit", {})
        check_shape(recommended, RECOMMENDED, f"{args.ckpt}: recommended.edit")
        fixed = SWEEP if SWEEP & args.given else set()
        recommended = {n: value for n, value in recommended.items() if f"{n}?" in RECOMMENDED and n not in fixed}
        filled = args.fill(PUBLISHED if args.preset else recommended)
        _check(args)
        if filled and not args.preset:
            flags = " ".join(f"--{flag} {value}" for flag, value in filled.items())
            say(f"{args.ckpt} recommends {flags} (--preset published: the paper's settings)", file=sys.stderr)
        source = latents_source(generator, args.latent, truncation=1, mean=None, noise=None, noise_seed=None)
        layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
        networks = (
            load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir, dex_crop=args.dex_crop),
            identity_or_none(args.identity, dist.device, args.weights_dir),
            perceptual_or_none(args.perceptual, dist.device, args.weights_dir),
        )
        scorer, folder = networks[0], args.output_dir

        # Boundaries: given, or fitted to samples.
        free_of = [read_boundary(path, generator) for path in args.orthogonal_to.split(",") if path]
        seeds = range(args.seed, args.seed + args.num_sample)
        samples = Samples(generator, seeds, truncation=args.truncation, noise=args.noise)
        if args.boundary:
            boundaries = [measured(read_boundary(path, generator), free_of, samples) for path in args.boundary]
            shown = args.attribute or boundaries[0].attribute
        else:
            names = {"attribute": args.attribute or "age", "conditional": args.conditional_fit, "fit": args.fit}
            table = {"folder": args.samples or folder / "samples", "batch": args.batch_size, "dist": dist}
            samples, scores, others, names = score_attribute(samples, scorer, **names, **table)
            boundary, shown = None, names["attribute"]
            if dist.is_main:
                ratio = separable_ratio(scores) if (args.attribute or "").startswith("csv:") else args.ratio
                names |= {"fit": args.fit, "ratio": ratio, "seed": args.seed}
                boundary = make_boundary(samples, scores, others, scorer, free_of, **names)
                path = boundary.save(folder / f"boundary-{safe_name(shown)}.npz")
                print(f"{path}: one standard deviation is {boundary.std:.3g}")
            boundaries = [broadcast_object(boundary)]

        # Distances: along the boundaries for all faces, or searched for the targets of each.
        targets, bounds = pair_targets(dict(args.target or ()), boundaries), common_range(boundaries)
        if bounds and not (args.preset or args.at or targets or {"start_distance", "end_distance"} & args.given):
            args.fill({"start_distance": bounds[0], "end_distance": bounds[1], "distance": "relative"})
            args.unit = "std"
            say(f"range of the boundary: {bounds[0]:+.2g} to {bounds[1]:+.2g} standard deviations")
        sweep = np.linspace(args.start_distance, args.end_distance, args.steps)[:, None]
        line = np.array([args.at]) if args.at else sweep  # [K, 1 or number of boundaries]
        distances = in_latent_units(line, boundaries, args.unit, args.distance)
        suffixes, rows = name_frames(line, boundaries, shown, targets), []

        # Frames, strip, video and rows of each face.
        for i in tqdm(shard(len(source.names), dist.rank, dist.world_size), desc="editing", unit="face", disable=None):
            face, how = face_at(source, i), "relative" if targets else args.distance
            if targets:
                distances = search_targets(generator, face, boundaries, targets, scorer, layers)
            frames = edit_face(generator, face, boundaries, distances, distance=how, layers=layers)
            found = evaluate(frames, *networks)
            captions = caption_frames(scorer, shown, found.scores, distances)
            names, strip = [f"{face.name}_{suffix}" for suffix in suffixes], f"{face.name}_{safe_name(shown)}"
            if args.preset:
                names = [f"origin_{i}_edit_{j}_{safe_name(shown)}_{text}" for j, text in enumerate(captions[1:])]
                strip = f"origin_{i}_{safe_name(shown)}"
            save_frames(folder, face.name, frames, [] if args.no_frames else names)
            save_image(draw_strip(frames, captions), folder / "strips" / f"{strip}.png")
            if args.video != "none":
                save_video(frames[1:], folder / "videos" / f"{strip}.{args.video}", args.fps)
            new = table_rows(i, face.name, names, distances, found, scorer.names)
            if dist.is_main:
                append_table(folder / "edits.csv", new, start=not rows)
            rows += new
        rows = [row for share in gather_list(rows) for row in share]
        if dist.is_main:
            write_table(folder / "edits.csv", rows)
        say(f"{len(source.names)} faces along {', '.join(b.attribute for b in boundaries)}: {folder}")
        for name, value in targets.values():
            say(describe_target(scorer, name, value, [row[name] for row in rows]))
    finally:
        shutdown()


# -- boundaries ----------------------------------------------------------------------------------------------------


def read_boundary(path, generator) -> Boundary:
    config = generator.config
    width = config.style_dim * (1 if config.w_space else config.n_tokens)
    return load_boundary(path, space=config.space, width=width, fingerprint=generator.fingerprint)


def measured(boundary: Boundary, free_of, samples: Samples) -> Boundary:
    """A given boundary with the directions `free_of` projected out, and its standard deviation over the samples."""
    samples = Samples(samples.generator, samples.seeds[:N_MEASURED], truncation=samples.truncation)
    boundary = boundary if boundary.std else boundary.measured_on(samples)
    return orthogonalise(boundary, free_of, samples) if free_of else boundary


def score_attribute(samples: Samples, scorer, *, attribute: str, conditional: str, fit: str, **table):
    """(samples, scores [n], others [n, K] or None, {attribute, given}) of an attribute of the scorer, or of labels.

    conditional: the attributes to hold fixed, see --conditional_fit. table: see `score_samples`. Raises ValueError for
    an attribute that the scorer does not know.
    """
    if attribute.startswith("csv:"):
        seeds, scores, name = labelled_seeds(attribute.removeprefix("csv:"))
        samples = Samples(samples.generator, seeds, truncation=samples.truncation, noise=samples.noise)
        return samples, scores, None, {"attribute": name, "given": []}
    names = {"auto": scorer.names if fit == "ridge" else (), "none": ()}.get(conditional, conditional.split(","))
    given = [name.strip() for name in names if name.strip() != attribute]
    columns = [scorer.column(name) for name in (attribute, *given)]  # known, before the hours of scoring
    scores = score_samples(samples, scorer, **table)[:, columns]
    return samples, scores[:, 0], scores[:, 1:] if given else None, {"attribute": attribute, "given": given}


def make_boundary(samples: Samples, scores, others, scorer, free_of, **settings) -> Boundary:
    """Fit (settings: see `fit_boundary`), project out the boundaries `free_of`, measure the range."""
    config = samples.generator.config
    info = {"space": config.space, "size": config.size, "fingerprint": samples.generator.fingerprint}
    info["truncation"] = samples.truncation
    boundary = fit_boundary(samples, scores, others=others, **info, **settings)
    shown = ", ".join(f"{part} {value:.1%}" for part, value in boundary.accuracies.items() if value is not None)
    given = f" given {', '.join(boundary.given)}" if boundary.given else ""
    if free_of:
        boundary, shown = orthogonalise(boundary, free_of, samples), f"{shown} before the projection"
    print(f"{boundary.attribute}: {boundary.fit} on {len(samples)} samples{given}, accuracy {shown}")
    bounds = edit_range(samples, boundary, scorer)
    if bounds:
        print(f"{boundary.attribute}: edits stay faces from {bounds[0]:+g} to {bounds[1]:+g} standard deviations")
    return replace(boundary, range=bounds)


def common_range(boundaries) -> tuple[float, float] | None:
    """The range that all boundaries allow; None where one of them does not say."""
    if any(boundary.range is None for boundary in boundaries):
        return None
    return max(b.range[0] for b in boundaries), min(b.range[1] for b in boundaries)


# -- distances -----------------------------------------------------------------------------------------------------


def in_latent_units(line: np.ndarray, boundaries, unit: str, distance: str) -> np.ndarray:
    """Distances [K, 1 or number of boundaries] in `unit` -> [K, number of boundaries] in latent units."""
    if unit == "latent":
        return np.broadcast_to(line, (len(line), len(boundaries)))
    means = [boundary.mean if distance == "absolute" else 0.0 for boundary in boundaries]
    return line * [boundary.std for boundary in boundaries] + means


def name_frames(line: np.ndarray, boundaries, shown: str, targets) -> list[str]:
    """Suffixes of the frames' file names: 'age+3', 'age+2_smile-1.5', or of targets 'age60'."""
    if targets:
        return ["_".join(f"{safe_name(name)}{value:g}" for name, value in targets.values())]
    labels = [shown] if line.shape[1] == 1 else [boundary.attribute for boundary in boundaries]
    parts = [[f"{safe_name(n)}{round(d, 2) + 0.0:+g}" for n, d in zip(labels, row, strict=True)] for row in line]
    names = ["_".join(part) for part in parts]
    return names if len(set(names)) == len(names) else [f"{name}_{j}" for j, name in enumerate(names)]


def search_targets(generator, face: InvertedFace, boundaries, targets, scorer, layers) -> np.ndarray:
    """Relative distances [1, number of boundaries] at which the scorer sees the target values (or comes nearest)."""
    found = np.zeros(len(boundaries))
    for _ in range(ROUNDS if len(targets) > 1 else 1):  # one edit moves the other attributes a little
        for k, (name, value) in targets.items():
            rest = np.where(np.arange(len(found)) == k, 0.0, found)
            (start,) = edit_codes(face.w, boundaries, rest[None], layers=layers)
            score = score_along(generator, replace(face, w=start), boundaries[k], scorer, scorer.column(name), layers)
            near, limit = tolerance(scorer, name), LIMIT * boundaries[k].std
            found[k], _ = search_distance(score, value, limit=limit, near=near)
    return found[None]


def pair_targets(targets: dict[str, float], boundaries) -> dict[int, tuple[str, float]]:
    """{number of the boundary: (attribute, value)}, by attribute; a single boundary may serve any target."""
    if len(targets) == len(boundaries) == 1:
        return {0: next(iter(targets.items()))}
    moved = [boundary.attribute for boundary in boundaries]
    absent = [name for name in targets if name not in moved]
    if absent:
        raise UsageError(f"--target {absent[0]}: no --boundary moves it; they move {', '.join(moved)}")
    return {moved.index(name): (name, value) for name, value in targets.items()}


def tolerance(scorer, name) -> float:
    """Distance from the target within which a score counts as there: 2 years, or 0.05."""
    return 2 if scorer.attributes[scorer.column(name)].kind == "years" else 0.05


def describe_target(scorer, name, value, seen) -> str:
    """Number of faces that came to the target, and the scores of the others, in words."""
    near = tolerance(scorer, name)
    missed = [score for score in seen if abs(score - value) > near]
    rest = f"; the others come to {min(missed):.3g} to {max(missed):.3g} at best, within {LIMIT:g} sd" if missed else ""
    return f"{name}={value:g}: {len(seen) - len(missed)} of {len(seen)} faces within {near}{rest}"


# -- results of a face ---------------------------------------------------------------------------------------------


def save_frames(folder: Path, name: str, frames, names) -> None:
    """Frames (the inversion first) by `names`; one frame per face also under its own name, for align_faces.py."""
    for frame_name, frame in zip(names, frames[1:], strict=False):
        save_image(frame, folder / "frames" / f"{frame_name}.png")
    if len(frames) == 2:
        for kind, frame in zip(("unedited", "edited"), frames, strict=True):
            save_image(frame, folder / kind / f"{name}.png")


def table_rows(i: int, image: str, names, distances, found: Evaluation, attributes) -> list[dict]:
    """Rows of edits.csv, one per frame; found has the inversion first."""
    measures = {"identity": found.identity, "perceptual": found.perceptual, "change": found.change}
    return [
        {"image": image, "origin": i, "edit": j, "distance": round(float(distances[j, 0]), 4), "frame": f"{name}.png"}
        | {n: round(float(s), 4) for n, s in zip(attributes, found.scores[j + 1], strict=True)}
        | {what: "" if v is None else round(float(v[j + 1]), 4) for what, v in measures.items()}
        for j, name in enumerate(names)
    ]


def caption_frames(scorer, attribute, scores, distances) -> list[str]:
    """Scores of the attribute in the frames [K + 1]; of one that the scorer does not know, the distance."""
    if attribute not in scorer.names:
        return ["0", *(f"{distance:+.3g}" for distance in distances[:, 0])]
    column = scorer.column(attribute)
    digits = 0 if scorer.attributes[column].kind == "years" else 2
    return [f"{value:.{digits}f}" for value in scores[:, column]]


def draw_strip(frames, captions):
    """At most 13 of the frames side by side, the inversion first."""
    chosen = np.unique(np.linspace(1, len(frames) - 1, min(12, len(frames) - 1)).round().astype(int))
    scale = max(1, 96 // frames[0].shape[0])  # small images would have no room for their captions
    cells = [frames[j].repeat(scale, 0).repeat(scale, 1) for j in [0, *chosen]]
    return make_strip(cells, [f"inv. {captions[0]}", *(captions[j] for j in chosen)])


if __name__ == "__main__":
    run_script(main, build_parser())
