"""From two sets of images to stamped numbers: what fid.py, prdc.py and train.py --eval_every share."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from common.cli import ArgumentParser, UsageError, UserError
from common.distributed import setup, shutdown
from metrics.distance import compute_fid, compute_kid
from metrics.extractors import AUTO, build_extractor, metric_name
from metrics.features import Features, add_extractor_flags, add_sampling_flags, cache_folder, extract, open_images
from metrics.manifold import PRDC, compute_prdc
from metrics.protocol import PROTOCOLS, append_records, make_record
from metrics.sources import Sampling, is_checkpoint, is_lmdb

METRICS = ("fid", "kid", "prdc")


def evaluate(
    real: Features,
    fake: Features,
    metrics: Iterable[str],
    *,
    nearest_k: int | None = None,
    device="cpu",
    progress: bool = False,
) -> list[dict]:
    """Records (see metrics.protocol) of `fid`, `kid` and `prdc`, of features of one extractor and protocol.

    nearest_k: of prdc; default 3 under the protocol `paper`, else 5. Warnings about a number are in its `notes`.
    Raises ValueError for unlike features, or too few, or ones that are not finite.
    """
    protocol, extractor = real.protocol, real.extractor
    if (fake.protocol, fake.extractor) != (protocol, extractor):
        raise ValueError("real and fake features were computed with different extractors or protocols")
    results: list[tuple[str, float, dict]] = []
    for metric in metrics:
        if metric == "fid":
            value, notes = compute_fid(real.values, fake.values)
            results.append(("fid", value, {"notes": notes}))
        elif metric == "kid":
            results.append(("kid", *compute_kid(real.values, fake.values)))
        elif metric == "prdc":
            k = nearest_k or (3 if protocol["name"] == "paper" else 5)
            values = compute_prdc(real.values, fake.values, nearest_k=k, device=device, progress=progress)
            results += [(name, values[name], {"nearest_k": k, "notes": []}) for name in PRDC]
        else:
            raise UserError(f"--metric {metric}: expected {', '.join(METRICS)}")
    general = find_warnings(real, fake)
    sides = {"protocol": protocol, "extractor": extractor, "real": real.info, "fake": fake.info}
    return [
        make_record(
            metric_name(name, extractor["name"]), value, **{**details, "notes": details["notes"] + general}, **sides
        )
        for name, value, details in results
    ]


def find_warnings(real: Features, fake: Features) -> list[str]:
    """Warnings about any number of these features: repeated images, and sides of different sizes."""
    notes = []
    for name, side in (("real", real), ("generated", fake)):
        rows = side.values.numpy()
        n_copies = len(rows) - len({hashlib.blake2b(row, digest_size=16).digest() for row in rows})
        if n_copies:
            notes.append(
                f"{n_copies:,} of {len(rows):,} {name} images have exactly the features of another: repeated images, "
                "which shrink the balls around them"
            )
    sizes = [f"{s}x{s}" if isinstance(s := side.info.get("size"), int) else s for side in (real, fake)]
    if None not in sizes and sizes[0] != sizes[1]:
        notes.append(f"real images have {sizes[0]} pixels, generated ones {sizes[1]}: their resize tells them apart")
    return notes


# -- command line --------------------------------------------------------------------------------------------------


def evaluation_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    real = "folder of images, LMDB, checkpoint, folder of latents, or features (.npz)"
    add("--real", "--dataset", "--inception", required=True, help=real)
    add("--fake", help="like --real, or a folder of checkpoints: each of them (default: ./checkpoint)")
    add("--ckpt", help="the same as --fake; with a --fake of latents: their generator")
    add("--start_num", type=int, default=0, help="first step of a folder of checkpoints")
    output = "file to add a JSON line per result to; default: metrics.jsonl of the checkpoint's run folder, else here"
    add("--output", type=Path, help=output)
    add_extractor_flags(parser)
    add_sampling_flags(parser)
    return parser


def evaluation_main(args, metrics: tuple[str, ...], nearest_k: int | None = None) -> int:
    """`main` of fid.py and prdc.py: every checkpoint at every truncation against the real images."""
    fakes, truncations = find_fakes(args.fake or args.ckpt, args.start_num), parse_truncations(args.truncation)
    if args.n_sample < 1 or args.batch < 1:
        raise UsageError(f"--n_sample and --batch must be at least 1, got {args.n_sample} and {args.batch}")
    # the paper's precision and recall: VGG-16 on reals drawn from all, its FID: Inception on the first of them
    as_published = args.protocol == "paper" and metrics == ("prdc",)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        extractor = build_extractor(
            args.extractor,
            PROTOCOLS[args.protocol],
            weights_dir=args.weights_dir,
            device=dist.device,
            preferred=("vgg16", *AUTO[1:]) if as_published else AUTO,
        )
        opening = {"ckpt": args.ckpt, "device": dist.device, "workers": args.workers}
        options = {
            "batch": args.batch,
            "dist": dist,
            "cache_dir": cache_folder(args.cache_dir),
            "order": "drawn" if as_published else None,
        }
        reals: dict[int | None, Features] = {}
        for path, truncation in itertools.product(fakes, truncations):
            path = exported_meanwhile(path)
            sampling = Sampling(truncation, args.truncation_mean, args.noise, args.seed)
            source = open_images(path, extractor, sampling=sampling, size=args.size, **opening)
            size = args.size or size_for(Path(args.real), source.info.get("size"))
            if size not in reals:  # drawn from another seed than the fakes, if it is a generator as well
                seed = args.seed + 1
                real = open_images(Path(args.real), extractor, sampling=Sampling(seed=seed), size=size, **opening)
                reals[size] = extract(real, extractor, args.n_sample, seed=seed, **options)
            fake = extract(source, extractor, args.n_sample, seed=args.seed, **options)
            if dist.is_main:
                records = evaluate(reals[size], fake, metrics, nearest_k=nearest_k, device=dist.device, progress=True)
                report(path, records)
                append_records(args.output or default_output(path), records)
    finally:
        shutdown()
    return 0


def exported_meanwhile(path: Path) -> Path:
    """`path`, or what a running training (train.py --keep) has reduced it to since it was listed."""
    exported = path.with_suffix(".safetensors")
    if path.exists() or not exported.exists():
        return path
    warnings.warn(f"{path} does not exist any more: {exported}, exported from it, is read", stacklevel=2)
    return exported


def size_for(real: Path, size: int | str | None) -> int | None:
    """Pixels that the real images are taken at, given those of the generated ones.

    '32x32' are images of a folder as they are: an LMDB gives its images of that size, a folder its own as they are.
    """
    if isinstance(size, str):
        width, _, height = size.partition("x")
        return int(width) if width == height and width.isdecimal() and is_lmdb(real) else None
    return size


def find_fakes(fake: str | None, start_num: int = 0) -> list[Path]:
    """`fake` itself, or the checkpoints of a folder from step `start_num` on, in order of their steps."""
    path = Path(fake or "checkpoint")
    if fake is None and not path.is_dir():
        raise UsageError("which images are to be evaluated? pass a checkpoint, folder, LMDB or features as --fake")
    if not path.is_dir() or (path / "latents.npy").exists():
        return [path]
    files = [file for file in path.iterdir() if is_checkpoint(file)]
    steps = {file: int(match[0]) for file in files if (match := re.search(r"\d+$", file.stem))}
    if not steps:
        if files:
            raise UserError(f"{path}: its checkpoints are not named by step; pass one of them as --fake")
        return [path]
    chosen = sorted((file for file, step in steps.items() if step >= start_num), key=steps.get)
    if not chosen:
        raise UserError(f"{path} has no checkpoint from step {start_num} on (the last is {max(steps.values())})")
    return chosen


def parse_truncations(text: str) -> list[float]:
    """Numbers of the flag --truncation."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UsageError(f"--truncation {text}: expected a number such as 0.7, or several with commas between")
    return values


def default_output(fake: Path) -> Path:
    """metrics.jsonl of the run folder that a checkpoint lies in, else of the current folder."""
    run = fake.resolve().parent.parent
    inside = is_checkpoint(fake) and fake.resolve().parent.name == "checkpoint" and (run / "options.json").exists()
    return (run if inside else Path()) / "metrics.jsonl"


def report(path: Path, records: list[dict]) -> None:
    """Print one line of results on stdout, warnings on stderr."""
    values = "  ".join(f"{r['metric']} {'nan' if r['value'] is None else format(r['value'], '.5g')}" for r in records)
    first = records[0]
    drawn = f"  truncation {first['fake']['truncation']:g}" if "truncation" in first["fake"] else ""
    k = f", k = {first['nearest_k']}" if "nearest_k" in first else ""
    print(
        f"{path}{drawn}  {first['n_real']} real {first['n_fake']} fake  {first['protocol']['name']}, "
        f"{first['extractor']['name']} features{k}:  {values}",
        flush=True,
    )
    for note in dict.fromkeys(note for record in records for note in record["notes"]):
        print(f"warning: {note}", file=sys.stderr)
