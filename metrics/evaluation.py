"""From two sets of images to stamped numbers: what fid.py, prdc.py and train.py --eval_every share."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common.cli import ArgumentParser, UsageError, UserError
from common.distributed import setup, shutdown
from metrics.distance import compute_fid, compute_kid
from metrics.extractors import build_extractor, metric_name
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
from metrics.sources import CHECKPOINTS, Sampling, is_checkpoint, open_source

METRICS = ("fid", "kid", "prdc")


def evaluate(
    real: Features, fake: Features, metrics: Iterable[str], *, nearest_k: int | None = None, device="cpu",
    progress: bool = False,
) -> list[dict]:  # fmt: skip
    """Records (see metrics.protocol) of `fid`, `kid` and `prdc`, of features of one extractor and protocol."""
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
            found += [(name, values[name], {"nearest_k": k}) for name in PRDC]
        else:
            raise UserError(f"--metric {metric}: expected {', '.join(METRICS)}")
    about = {"protocol": protocol, "extractor": extractor, "real": real.about, "fake": fake.about}
    return [make_record(metric_name(name, extractor["name"]), value, **facts, **about) for name, value, facts in found]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def evaluation_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--real", "--inception", required=True,
                        help="folder of images, LMDB, checkpoint, folder of latents, or features (.npz)")  # fmt: skip
    parser.add_argument("--fake", help="the same kinds, or a folder of checkpoints: each of them")
    parser.add_argument("--ckpt", help="the same as --fake; with a --fake of latents: their generator")
    parser.add_argument("--start_num", type=int, default=0, help="first step of a folder of checkpoints")
    parser.add_argument("--output", type=Path,
                        help="file that results are added to, a JSON line each; default: metrics.jsonl of the "
                             "checkpoint's run folder, else here")  # fmt: skip
    add_extractor_flags(parser)
    add_sampling_flags(parser)
    return parser


def run_command(args, metrics: tuple[str, ...]) -> int:
    """Evaluate every checkpoint at every truncation against the real images; print and append the results."""
    fakes, truncations = find_fakes(args), parse_truncations(args.truncation)
    if args.n_sample < 1 or args.batch < 1:
        raise UsageError(f"--n_sample and --batch must be at least 1, got {args.n_sample} and {args.batch}")
    nearest_k = getattr(args, "nearest_k", None)
    place = setup(args.device)
    try:
        extractor = build_extractor(args.extractor, PROTOCOLS[args.protocol], weights_dir=args.weights_dir,
                                    device=place.device)  # fmt: skip

        def opened(path, sampling, size):
            if path.suffix == ".npz":
                return require_same(load_features(path), extractor, path)
            if not path.exists() and path.with_suffix(".safetensors").exists():
                path = path.with_suffix(".safetensors")  # a training that goes on has shrunk it meanwhile
            return open_source(path, size=size, ckpt=args.ckpt, sampling=sampling, device=place.device,
                               workers=args.workers)  # fmt: skip

        def features(source, seed):
            return source if isinstance(source, Features) else extract(
                source, extractor, args.n_sample, seed=seed, batch=args.batch, place=place, cache_dir=cache_folder(args)
            )  # fmt: skip

        reals: dict[object, Features] = {}
        for path in fakes:
            for truncation in truncations:
                fake = opened(path, Sampling(truncation, args.truncation_mean, args.noise, args.seed), args.size)
                size = args.size or (fake.about["size"] if isinstance(fake.about["size"], int) else None)
                if size not in reals:  # drawn from another seed than the fakes, if it is a generator as well
                    seed = args.seed + 1
                    reals[size] = features(opened(Path(args.real), Sampling(seed=seed), size), seed)
                fake = features(fake, args.seed)
                if place.is_main:
                    records = evaluate(reals[size], fake, metrics, nearest_k=nearest_k, device=place.device,
                                       progress=True)  # fmt: skip
                    append_records(args.output or default_output(path), records)
                    report(path, truncation, records)
    finally:
        shutdown()
    return 0


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


def report(path: Path, truncation: float, records: list[dict]) -> None:
    """One line of results on stdout, notes on stderr."""
    values = "  ".join(f"{record['metric']} {record['value']:.5g}" for record in records)
    first = records[0]
    print(f"{path}  truncation {truncation:g}  {first['n_real']} real {first['n_fake']} fake  "
          f"{first['protocol']['name']}:  {values}", flush=True)  # fmt: skip
    for note in dict.fromkeys(note for record in records for note in record.get("notes") or []):
        print(f"note: {note}", file=sys.stderr)
