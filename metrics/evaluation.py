"""Stamped numbers of two sets of images: what fid.py, prdc.py and train.py --eval_every share."""

import hashlib
import itertools
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from common.cli import UsageError, UserError
from common.distributed import Distributed
from common.flags import read_fields
from common.lmdb_store import is_lmdb
from metrics.distance import compute_fid, compute_kid
from metrics.extractors import AUTO, build_extractor, metric_name
from metrics.features import Features, cache_folder, extract, open_images
from metrics.flags import FeatureSettings, Sampling
from metrics.manifold import compute_prdc
from metrics.protocol import PROTOCOLS, append_records, make_record
from metrics.sources import is_checkpoint, run_folder

METRICS = ("fid", "kid", "prdc")


def evaluate(real: Features, fake: Features, metrics: Iterable[str], *, nearest_k=None, device="cpu") -> list[dict]:
    """Records (see metrics.protocol) of METRICS, of features of one extractor and protocol; `notes` are warnings.
    nearest_k: of prdc; default 3 under the protocol `paper`, else 5. Raises ValueError for too few features."""
    results: list[tuple[str, float, dict]] = []
    if "fid" in metrics:
        value, notes = compute_fid(real.values, fake.values)
        results.append(("fid", value, {"notes": notes}))
    if "kid" in metrics:
        results.append(("kid", *compute_kid(real.values, fake.values)))
    if "prdc" in metrics:
        k = nearest_k or (3 if real.protocol["name"] == "paper" else 5)
        values = compute_prdc(real.values, fake.values, nearest_k=k, device=device)
        results += [(name, value, {"nearest_k": k, "notes": []}) for name, value in values.items()]
    general, records = find_warnings(real, fake), []
    sides = {"protocol": real.protocol, "extractor": real.extractor, "real": real.info, "fake": fake.info}
    for name, value, details in results:
        details["notes"] = details["notes"] + general
        records.append(make_record(metric_name(name, real.extractor["name"]), value, **details, **sides))
    return records


def find_warnings(real: Features, fake: Features) -> list[str]:
    """Warnings about any number of these features: repeated images, and sides of different sizes."""
    notes = []
    for name, side in (("real", real), ("generated", fake)):
        rows = side.values.numpy()
        n_copies = len(rows) - len({hashlib.blake2b(row, digest_size=16).digest() for row in rows})
        if n_copies:
            copies = f"{n_copies:,} of {len(rows):,} {name} images have exactly the features of another"
            notes.append(f"{copies}: repeated images, which shrink the balls around them")
    a, b = (side.info.get("size") for side in (real, fake))
    if None not in (a, b) and a != b:
        notes.append(f"real images have {a}x{a} pixels, generated ones {b}x{b}: their resize tells them apart")
    return notes


def compare(metrics: tuple[str, ...], flags: dict, dist: Distributed) -> None:
    """Print and append the metrics (of METRICS) of every set of generated images against the real ones, under the flags
    of `comparison_parser`."""
    real, fakes = Path(flags["real"]), find_fakes(flags["fake"] or flags["ckpt"], flags["start_num"])
    settings, sampling = (read_fields(kind, flags) for kind in (FeatureSettings, Sampling))
    draws = [replace(sampling, truncation=psi) for psi in flags["truncation"]]
    # the paper's precision and recall: VGG-16 on reals drawn from all, its FID: Inception on the first of them
    as_published = settings.protocol == "paper" and metrics == ("prdc",)
    network = {"weights_dir": settings.weights_dir, "preferred": ("vgg16", *AUTO[1:]) if as_published else AUTO}
    network = build_extractor(settings.extractor, PROTOCOLS[settings.protocol], device=dist.device, **network)
    opening = {"ckpt": flags["ckpt"], "device": dist.device, "workers": settings.workers}
    options = {"batch": settings.batch, "dist": dist, "cache_dir": cache_folder(settings.cache_dir)}
    options["order"] = "drawn" if as_published else None
    reals: dict[int | None, Features] = {}
    for path, sampling in itertools.product(fakes, draws):
        exported = path.with_suffix(".safetensors")
        if not path.exists() and exported.exists():  # by train.py --keep, since it was listed
            warnings.warn(f"{path} does not exist any more: {exported}, exported from it, is read", stacklevel=2)
            path = exported
        source = open_images(path, network, sampling=sampling, size=settings.size, **opening)
        as_they_are = source.info.get("kind") == "folder" and not is_lmdb(real)  # one folder beside another
        size = settings.size or (None if as_they_are else source.info.get("size"))
        if size not in reals:  # drawn from another seed than the fakes, if it is a generator as well
            other = Sampling(seed=sampling.seed + 1)
            images = open_images(real, network, sampling=other, size=size, **opening)
            reals[size] = extract(images, network, settings.n_sample, seed=other.seed, **options)
        features = extract(source, network, settings.n_sample, seed=sampling.seed, **options)
        if dist.is_main:
            records = evaluate(reals[size], features, metrics, nearest_k=flags.get("nearest_k"), device=dist.device)
            report(path, records)
            append_records(flags["output"] or (run_folder(path) or Path()) / "metrics.jsonl", records)


def find_fakes(fake: str | None, start_num: int = 0) -> list[Path]:
    """`fake` itself, or the checkpoints of a folder from step `start_num` on, in order of their steps."""
    path = Path(fake or "checkpoint")
    if fake is None and not path.is_dir():
        raise UsageError("which images are to be evaluated? pass a checkpoint, folder, LMDB or features as --fake")
    files = [file for file in path.iterdir() if is_checkpoint(file)] if path.is_dir() else []
    if not files or (path / "latents.npy").exists():
        return [path]
    steps = {file: int(match[0]) for file in files if (match := re.search(r"\d+$", file.stem))}
    if not steps:
        raise UserError(f"{path}: its checkpoints are not named by step; pass one of them as --fake")
    chosen = sorted((file for file, step in steps.items() if step >= start_num), key=steps.get)
    if not chosen:
        raise UserError(f"{path} has no checkpoint from step {start_num} on (the last is {max(steps.values())})")
    return chosen


def report(path: Path, records: list[dict]) -> None:
    """Print one line of results on stdout, warnings on stderr."""
    values = "  ".join(f"{r['metric']} {'nan' if r['value'] is None else format(r['value'], '.5g')}" for r in records)
    first = records[0]
    drawn = f"  truncation {first['fake']['truncation']:g}" if "truncation" in first["fake"] else ""
    k = f", k = {first['nearest_k']}" if "nearest_k" in first else ""
    counts = f"{path}{drawn}  {first['n_real']} real {first['n_fake']} fake"
    print(f"{counts}  {first['protocol']['name']}, {first['extractor']['name']} features{k}:  {values}", flush=True)
    for note in dict.fromkeys(note for record in records for note in record["notes"]):
        print(f"warning: {note}", file=sys.stderr)
