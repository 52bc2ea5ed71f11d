"""From two sets of images to stamped numbers: what fid.py, prdc.py and train.py --eval_every share."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common.cli import ArgumentParser, UsageError, UserError
from common.distributed import setup, shutdown
from metrics.distance import compute_fid, compute_kid
from metrics.extractors import AUTO, build_extractor, metric_name
from metrics.features import (
    Features,
    add_extractor_flags,
    add_sampling_flags,
    cache_folder,
    extract,
    load_features,
    require_same,
)
from metrics.manifold import PRDC, compute_prdc
from metrics.protocol import PROTOCOLS, append_records, make_record
from metrics.sources import CHECKPOINTS, Sampling, is_checkpoint, is_lmdb, open_source

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

    nearest_k: of prdc; default 3 under the protocol `paper`, else 5. What there is to be said against a number is in
    its `notes`. Raises ValueError for unlike features, or too few, or ones that are not finite.
    """
    protocol, extractor = real.protocol, real.extractor
    if (fake.protocol, fake.extractor) != (real.protocol, real.extractor):
        raise ValueError("real and fake features were computed with different extractors or protocols")
    found: list[tuple[str, float, dict]] = []
    for metric in metrics:
        if metric == "fid":
            value, notes = compute_fid(real.values, fake.values)
            found.append(("fid", value, {"notes": notes}))
        elif metric == "kid":
            values = compute_kid(real.values, fake.values)
            found.append(("kid", values.pop("value"), values))
        elif metric == "prdc":
            k = nearest_k or (3 if protocol["name"] == "paper" else 5)
            values = compute_prdc(real.values, fake.values, nearest_k=k, device=device, progress=progress)
            found += [(name, values[name], {"nearest_k": k, "notes": []}) for name in PRDC]
        else:
            raise UserError(f"--metric {metric}: expected {', '.join(METRICS)}")
    general = remarks(real, fake)
    for _, _, facts in found:
        facts["notes"] += general
    about = {"protocol": protocol, "extractor": extractor, "real": real.about, "fake": fake.about}
    return [make_record(metric_name(name, extractor["name"]), value, **facts, **about) for name, value, facts in found]


def remarks(real: Features, fake: Features) -> list[str]:
    """What speaks against any number of these features: repeated images, and sides of different sizes."""
    found = []
    for name, side in (("real", real), ("generated", fake)):
        rows = side.values.numpy()
        n_copies = len(rows) - len({hashlib.blake2b(row, digest_size=16).digest() for row in rows})
        if n_copies:
            found.append(
                f"{n_copies:,} of {len(rows):,} {name} images have the very features of another: repeated "
                "images, which shrink the balls around them"
            )
    sizes = [pixels(side.about.get("size")) for side in (real, fake)]
    if None not in sizes and sizes[0] != sizes[1]:
        found.append(f"real images have {sizes[0]} pixels, generated ones {sizes[1]}: their resize tells them apart")
    return found


def pixels(size: int | str | None) -> str | None:
    """32 and '32x32' -> '32x32'."""
    return f"{size}x{size}" if isinstance(size, int) else size


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def evaluation_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--real",
        "--inception",
        required=True,
        help="folder of images, LMDB, checkpoint, folder of latents, or features (.npz)",
    )
    parser.add_argument("--fake", help="the same kinds, or a folder of checkpoints: each of them")
    parser.add_argument("--ckpt", help="the same as --fake; with a --fake of latents: their generator")
    parser.add_argument("--start_num", type=int, default=0, help="first step of a folder of checkpoints")
    parser.add_argument(
        "--output",
        type=Path,
        help="file that results are added to, a JSON line each; default: metrics.jsonl of the "
        "checkpoint's run folder, else here",
    )
    add_extractor_flags(parser)
    add_sampling_flags(parser)
    return parser


def run_command(args, metrics: tuple[str, ...]) -> int:
    """Evaluate every checkpoint at every truncation against the real images; print and append the results."""
    fakes, truncations = find_fakes(args), parse_truncations(args.truncation)
    if args.n_sample < 1 or args.batch < 1:
        raise UsageError(f"--n_sample and --batch must be at least 1, got {args.n_sample} and {args.batch}")
    nearest_k = getattr(args, "nearest_k", None)
    if nearest_k is not None and nearest_k < 1:
        raise UsageError(f"--nearest_k must be at least 1, got {nearest_k}")
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        # the paper's precision and recall: VGG-16 on reals drawn from all, its FID: Inception on the first of them
        as_published = args.protocol == "paper" and metrics == ("prdc",)
        extractor = build_extractor(
            args.extractor,
            PROTOCOLS[args.protocol],
            weights_dir=args.weights_dir,
            device=dist.device,
            preferred=("vgg16", *AUTO[1:]) if as_published else AUTO,
        )

        def opened(path, sampling, size):
            if path.suffix == ".npz":
                return require_same(load_features(path), extractor, path)
            if not path.exists() and path.with_suffix(".safetensors").exists():
                path = path.with_suffix(".safetensors")  # a training that goes on has shrunk it meanwhile
            return open_source(
                path, size=size, ckpt=args.ckpt, sampling=sampling, device=dist.device, workers=args.workers
            )

        def features(source, seed):
            return (
                source
                if isinstance(source, Features)
                else extract(
                    source,
                    extractor,
                    args.n_sample,
                    seed=seed,
                    batch=args.batch,
                    dist=dist,
                    cache_dir=cache_folder(args),
                    order="drawn" if as_published else None,
                )
            )

        reals: dict[object, Features] = {}
        for path in fakes:
            for truncation in truncations:
                fake = opened(path, Sampling(truncation, args.truncation_mean, args.noise, args.seed), args.size)
                if truncation != 1 and "truncation" not in fake.about:
                    raise UserError(f"{path} holds images: --truncation {truncation:g} is for images yet to be made")
                size = args.size or size_for(Path(args.real), fake.about["size"])
                if size not in reals:  # drawn from another seed than the fakes, if it is a generator as well
                    seed = args.seed + 1
                    reals[size] = features(opened(Path(args.real), Sampling(seed=seed), size), seed)
                fake = features(fake, args.seed)
                if dist.is_main:
                    records = evaluate(
                        reals[size], fake, metrics, nearest_k=nearest_k, device=dist.device, progress=True
                    )
                    append_records(args.output or default_output(path), records)
                    report(path, records)
    finally:
        shutdown()
    return 0


def size_for(real: Path, size: int | str) -> int | None:
    """Pixels that the real images are taken at, given those of the generated ones ('32x32': of a folder as it is, for
    which an LMDB gives its pictures of that size, but a folder its own as they are)."""
    if isinstance(size, str):
        width, _, height = size.partition("x")
        return int(width) if width == height and is_lmdb(real) else None
    return size


def find_fakes(args) -> list[Path]:
    """What --fake names: one path, or the checkpoints of a folder in order of their steps."""
    if not (args.fake or args.ckpt):
        raise UsageError("which images are to be judged? pass a checkpoint, folder, LMDB or features as --fake")
    path = Path(args.fake or args.ckpt)
    if not path.is_dir() or (path / "latents.npy").exists():
        return [path]
    files = [file for file in path.iterdir() if is_checkpoint(file) and re.search(r"\d+$", file.stem)]
    if not files:
        if any(file.suffix in CHECKPOINTS for file in path.iterdir()):
            raise UserError(f"{path}: its checkpoints are not named by step; pass one of them as --fake")
        return [path]
    steps = {file: int(re.search(r"(\d+)$", file.stem)[1]) for file in files}
    chosen = sorted((file for file in files if steps[file] >= args.start_num), key=steps.get)
    if not chosen:
        raise UserError(f"{path} has no checkpoint from step {args.start_num} on (the last is {max(steps.values())})")
    return chosen


def parse_truncations(text: str) -> list[float]:
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
    """One line of results on stdout, notes on stderr."""
    values = "  ".join(f"{record['metric']} {record['value']:.5g}" for record in records)
    first = records[0]
    drawn = f"  truncation {first['fake']['truncation']:g}" if "truncation" in first["fake"] else ""
    k = f", k = {first['nearest_k']}" if "nearest_k" in first else ""
    print(
        f"{path}{drawn}  {first['n_real']} real {first['n_fake']} fake  {first['protocol']['name']}, "
        f"{first['extractor']['name']} features{k}:  {values}",
        flush=True,
    )
    for note in dict.fromkeys(note for record in records for note in record.get("notes") or []):
        print(f"note: {note}", file=sys.stderr)
