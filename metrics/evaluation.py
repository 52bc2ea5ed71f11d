"""From two sets of images to stamped numbers: what fid.py, prdc.py and train.py --eval_every share."""

import hashlib
import itertools
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from common.cli import UsageError, UserError
from common.distributed import setup, shutdown
from metrics.distance import compute_fid, compute_kid
from metrics.extractors import AUTO, build_extractor, metric_name
from metrics.features import Features, cache_folder, extract, open_images
from metrics.manifold import PRDC, compute_prdc
from metrics.protocol import PROTOCOLS, append_records, make_record
from metrics.sources import Sampling, is_checkpoint, is_lmdb

METRICS = ("fid", "kid", "prdc")


def evaluate(
    real: Features, fake: Features, metrics: Iterable[str], *, nearest_k=None, device="cpu", progress=False
) -> list[dict]:
    """Records (see metrics.protocol) of `fid`, `kid` and `prdc`, of features of one extractor and protocol.
    nearest_k: of prdc; default 3 under the protocol `paper`, else 5. Warnings about a number are in its `notes`.
    Raises ValueError for unlike features, or too few, or ones that are not finite."""
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
        make_record(metric_name(name, extractor["name"]), value, **d | {"notes": d["notes"] + general}, **sides)
        for name, value, d in results
    ]


def find_warnings(real: Features, fake: Features) -> list[str]:
    """Warnings about any number of these features: repeated images, and sides of different sizes."""
    notes = []
    for name, side in (("real", real), ("generated", fake)):
        rows = side.values.numpy()
        n_copies = len(rows) - len({hashlib.blake2b(row, digest_size=16).digest() for row in rows})
        if n_copies:
            copies = f"{n_copies:,} of {len(rows):,} {name} images have exactly the features of another"
            notes.append(f"{copies}: repeated images, which shrink the balls around them")
    sizes = [f"{s}x{s}" if isinstance(s := side.info.get("size"), int) else s for side in (real, fake)]
    if None not in sizes and sizes[0] != sizes[1]:
        notes.append(f"real images have {sizes[0]} pixels, generated ones {sizes[1]}: their resize tells them apart")
    return notes


def compare(
    metrics: tuple[str, ...],  # of METRICS
    *,
    real: str,  # folder, LMDB, checkpoint, latents or features
    fake: str | None,  # as `real`, or a folder of checkpoints; None: ckpt, else ./checkpoint
    ckpt: str | None,  # generator of latents
    start_num: int,  # first step of a folder of checkpoints
    output: Path | None,  # file of the results; None: `default_output`
    extractor: str,  # a name of metrics.extractors, or auto
    protocol: str,  # a name of PROTOCOLS
    n_sample: int,  # images of each side
    size: int | None,  # pixels of the real images; None: as they are, or those of the generated ones
    batch: int,  # images per forward pass and process
    workers: int,  # threads that decode images
    weights_dir: str | None,  # of the extractor's weights
    cache_dir: str | None,  # of the feature cache; "none": no cache
    truncation: list[float],  # psi, each in turn
    truncation_mean: int,  # samples for the mean of w
    noise: str,  # of NOISE_MODES
    seed: int,  # of the generated images
    device: str,
    ops: str | None,
    dist_timeout: float,
    nearest_k: int | None = None,  # of prdc
    local_rank: int = 0,  # torch.distributed.launch passes it; not used
) -> None:
    """Print and append the metrics of every checkpoint at every truncation against the real images."""
    fakes = find_fakes(fake or ckpt, start_num)
    if n_sample < 1 or batch < 1:
        raise UsageError(f"--n_sample and --batch must be at least 1, got {n_sample} and {batch}")
    # the paper's precision and recall: VGG-16 on reals drawn from all, its FID: Inception on the first of them
    as_published = protocol == "paper" and metrics == ("prdc",)
    preferred = ("vgg16", *AUTO[1:]) if as_published else AUTO
    dist = setup(device, ops=ops, timeout=dist_timeout)
    try:
        network = {"weights_dir": weights_dir, "device": dist.device, "preferred": preferred}
        network = build_extractor(extractor, PROTOCOLS[protocol], **network)
        opening = {"ckpt": ckpt, "device": dist.device, "workers": workers}
        options = {"batch": batch, "dist": dist, "cache_dir": cache_folder(cache_dir)}
        options["order"] = "drawn" if as_published else None
        reals: dict[int | None, Features] = {}
        for path, psi in itertools.product(fakes, truncation):
            path = exported_meanwhile(path)
            sampling = Sampling(psi, truncation_mean, noise, seed)
            source = open_images(path, network, sampling=sampling, size=size, **opening)
            pixels = size or size_for(Path(real), source.info.get("size"))
            if pixels not in reals:  # drawn from another seed than the fakes, if it is a generator as well
                images = open_images(Path(real), network, sampling=Sampling(seed=seed + 1), size=pixels, **opening)
                reals[pixels] = extract(images, network, n_sample, seed=seed + 1, **options)
            features = extract(source, network, n_sample, seed=seed, **options)
            if dist.is_main:
                computing = {"nearest_k": nearest_k, "device": dist.device, "progress": True}
                records = evaluate(reals[pixels], features, metrics, **computing)
                report(path, records)
                append_records(output or default_output(path), records)
    finally:
        shutdown()


def exported_meanwhile(path: Path) -> Path:
    """`path`, or the export that a running training (train.py --keep) has reduced it to since it was listed."""
    exported = path.with_suffix(".safetensors")
    if path.exists() or not exported.exists():
        return path
    warnings.warn(f"{path} does not exist any more: {exported}, exported from it, is read", stacklevel=2)
    return exported


def size_for(real: Path, size: int | str | None) -> int | None:
    """Pixels that the real images are taken at, given those of the generated ones.
    '32x32' are images of a folder as they are: an LMDB gives its images of that size, a folder its own as they are."""
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
    counts = f"{path}{drawn}  {first['n_real']} real {first['n_fake']} fake"
    print(f"{counts}  {first['protocol']['name']}, {first['extractor']['name']} features{k}:  {values}", flush=True)
    for note in dict.fromkeys(note for record in records for note in record["notes"]):
        print(f"warning: {note}", file=sys.stderr)
