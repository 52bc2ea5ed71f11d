"""Features of images: computed in micro-batches, shared among the ranks, kept in a cache keyed by content and protocol.

Every rank takes a contiguous share of the images; rank 0 ends with all features in order. The cache file of a set goes
by the sha256 of its images (of the weights and the draw, for a generator), of the extractor's weights and of the
protocol: a changed image, filter or extractor is another file, a moved folder is not. A cache that cannot be written or
read costs time, never a result. The same `.npz` is accepted wherever images are.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.arrays import read_npz, require_floats
from common.cli import UserError, add_device_flags
from common.distributed import Distributed, broadcast_object, gather_list, shard
from common.files import atomic_write, parse_json
from common.lmdb_store import DatasetError
from metrics.extractors import Extractor, extractor_names
from metrics.protocol import PROTOCOLS
from metrics.sources import ImageSource, Sampling, open_source

FORMAT = 1  # raised when the same inputs give other features
GATHER_BYTES = 64 << 20  # features collected from all ranks at a time
HERE = Distributed(0, 0, 1, torch.device("cpu"), None)


@dataclass
class Features:
    """Features of a set of images, and how they were computed. `values` is None on ranks other than 0."""

    values: torch.Tensor | None  # float32 [N, D]
    info: dict  # of the source, with n and digest
    extractor: dict  # name, sha256, size, dim
    protocol: dict


def describe(extractor: Extractor) -> dict:
    return {"name": extractor.name, "sha256": extractor.sha256, "size": extractor.size, "dim": extractor.dim}


def open_images(path: Path, extractor: Extractor, *, sampling: Sampling, size=None, ckpt=None, device="cpu", workers=2):
    """The source of images at `path` (see `open_source`), or the Features in a .npz, for `extract`.

    Raises FileNotFoundError or ValueError in one sentence.
    """
    if path.suffix == ".npz":
        source = require_same(load_features(path), extractor, path)
    else:
        source = open_source(path, size=size, ckpt=ckpt, sampling=sampling, device=device, workers=workers)
    if sampling.truncation not in (1, source.info.get("truncation")):
        raise UserError(f"{path} holds images: --truncation {sampling.truncation:g} is for images yet to be made")
    return source


def extract(
    source,
    extractor: Extractor,
    n: int,
    *,
    seed: int = 0,  # of the choice among more images than n
    batch: int = 64,  # images per forward pass and rank
    dist: Distributed = HERE,
    cache_dir: str | os.PathLike | None = None,  # None: no cache
    progress: bool = True,
    order: str | None = None,  # of a larger set: `first` or `drawn`; None: as the protocol has it for FID
) -> Features:
    """Features of n images of a source (all there are, when fewer), chosen without replacement. All ranks must call it.

    Features are returned as they are. Raises DatasetError for a damaged image, ValueError when features are not finite.
    """
    if isinstance(source, Features):
        return source
    protocol = extractor.protocol
    order = order or ("first" if protocol.name == "paper" else "drawn")
    positions = source.choose(n, order, seed)
    info = {**source.info, "n": len(positions)}
    if isinstance(source, ImageSource):
        info["chosen"] = "all" if len(positions) == source.n else order
        info["seed"] = seed if info["chosen"] == "drawn" else None
    info["digest"] = broadcast_object(source.digest(positions) if dist.is_main else None)
    features = Features(None, info, describe(extractor), asdict(protocol))
    path = None if cache_dir is None else Path(cache_dir) / f"{_key(features)}.npz"
    if dist.is_main and path is not None:
        features.values = _read_cache(path, (len(positions), extractor.dim))
    if not broadcast_object(features.values is not None):
        features.values = _compute(source, extractor, positions, batch, dist, progress)
        if dist.is_main and path is not None:
            _write_cache(path, features)
    return features


def _key(features: Features) -> str:
    settings = [FORMAT, features.info["digest"], features.extractor, features.protocol]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _read_cache(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """The cached values; None when there are none, or with a warning when the file is damaged."""
    try:
        values = load_features(path).values
        if values.shape != shape:
            raise UserError(f"{path} holds {list(values.shape)} features, expected {list(shape)}")
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"cached features are not used: {error}", stacklevel=2)
        return None


def _write_cache(path: Path, features: Features) -> None:
    try:
        save_features(path, features)
    except OSError as error:
        text = f"features are not cached in {path.parent} (--cache_dir): {error.strerror or error}"
        warnings.warn(text, stacklevel=2)  # without the name of the file: shown once per folder


def _compute(source, extractor, positions, batch, dist, progress) -> torch.Tensor | None:
    """All features on rank 0, to which the others send theirs in blocks, so that none of them holds the whole."""
    n, dim = len(positions), extractor.dim
    shares = [shard(n, rank, dist.world_size) for rank in range(dist.world_size)]
    rows = max(batch, GATHER_BYTES // (4 * dim * dist.world_size) // batch * batch)  # per rank and block
    n_blocks = max(1, -(-max(len(share) for share in shares) // rows))
    result = torch.empty(n, dim) if dist.is_main else None
    local = [positions[i] for i in shares[dist.rank]]
    batches = source.batches(local, batch, dist.device)
    title = f"{extractor.name} of {Path(source.info['path']).name}"
    with tqdm(total=n, desc=title, unit="img", disable=None if progress and dist.is_main else True) as bar:
        for block in range(n_blocks):
            values, error = _block(batches, extractor, min(rows, max(0, len(local) - block * rows)), bar, dist)
            answers = gather_list((values, error))  # an error on one rank ends all, in its words
            if error := next((error for _, error in answers if error), None):
                raise DatasetError(error)
            if dist.is_main:
                for share, (values, _) in zip(shares, answers, strict=True):
                    start = share.start + block * rows
                    result[start : start + len(values)] = values
    return result


def _block(batches, extractor, n: int, bar, dist) -> tuple[torch.Tensor, str | None]:
    """Features of the next n images, on the CPU; or the sentence that says why there are none."""
    values, filled = torch.empty(n, extractor.dim), 0
    try:
        while filled < n:
            images = next(batches)
            features = extractor(images.to(dist.device)).cpu()  # [B, D]
            if features.shape[1] != extractor.dim:
                raise UserError(f"{extractor.name} gives {features.shape[1]} features, {extractor.dim} were declared")
            if not torch.isfinite(features).all():
                raise UserError(f"{extractor.name} gives features that are not finite: broken images or weights?")
            values[filled : filled + len(images)] = features
            filled += len(images)
            bar.update(len(images) * dist.world_size)
    except (ValueError, OSError) as error:
        return values, str(error)
    return values, None


# -- files ---------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """$WPP_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WPP_CACHE") or Path(home) / "wpp" / "features")


def save_features(path: Path, features: Features) -> None:
    """Write features [N, D] with their metadata, atomically."""
    metadata = {"about": features.info, "extractor": features.extractor, "protocol": features.protocol}
    with atomic_write(path) as file:
        np.savez(file, features=features.values.numpy(), known=np.array(json.dumps(metadata)))


def load_features(path: str | os.PathLike) -> Features:
    """Features from a file of `save_features`. Raises FileNotFoundError, or ValueError when it is not one."""
    arrays = read_npz(path, "features file (.npz)")
    if not {"features", "known"} <= set(arrays):
        raise UserError(
            f"{path} has the entries {', '.join(arrays)}: features made elsewhere do not say how: compute them "
            "anew from the images with metrics/extract_features.py"
        )
    about = {"n": int, "size?": (int, str, None), "truncation?": (float, None)}
    schema = {"about": about, "extractor": {"name": str, "dim": int}, "protocol": {"name": str}}
    metadata = parse_json(str(arrays["known"]), schema, source=path, what="features file")
    values = torch.from_numpy(require_floats(arrays["features"], path))
    shape = (metadata["about"]["n"], metadata["extractor"]["dim"])
    if values.shape != shape:
        raise UserError(f"{path}: its features have the shape {list(values.shape)}, expected {list(shape)}")
    return Features(values, metadata["about"], metadata["extractor"], metadata["protocol"])


def require_same(features: Features, extractor: Extractor, path) -> Features:
    """The features of a file, if they are this extractor's under this protocol; ValueError naming both sides."""
    target = (describe(extractor), asdict(extractor.protocol))
    if (features.extractor, features.protocol) != target:
        sides = [
            f"{e['name']} (weights {str(e.get('sha256'))[:8]}), protocol {p['name']}"
            for e, p in ((features.extractor, features.protocol), target)
        ]
        raise UserError(f"{path} holds features of {sides[0]}; expected those of {sides[1]}")
    return features


# -- command line --------------------------------------------------------------------------------------------------


def add_extractor_flags(parser) -> None:
    """Flags of everything that extracts features."""
    add = parser.add_argument_group("features").add_argument
    names = f"{', '.join(extractor_names())}; auto: Inception (paper's precision and recall: VGG-16), else a fallback"
    add("--extractor", default="auto", metavar="NAME", help=names)
    protocols = "images to extractor: paper (pytorch-fid), tf-compat (torch-fidelity, most papers), clean (clean-fid)"
    add("--protocol", choices=list(PROTOCOLS), default="tf-compat", help=protocols)
    add("--n_sample", type=int, default=50_000, help="images of each side; all there are, when fewer")
    sizes = "pixels: size of an LMDB, or to fit a folder to; default: as they are, or those of the generated images"
    add("--size", type=int, help=sizes)
    add("--batch", type=int, default=64, help="images per forward pass and process")
    add("--workers", type=int, default=2, help="threads that decode images")
    add("--weights_dir", help="folder with the extractor's weights, looked into first")
    add(
        "--cache_dir",
        help="folder of the feature cache; none: no cache; default $WPP_CACHE, else ~/.cache/wpp/features",
    )
    add_device_flags(parser)


def add_sampling_flags(parser) -> None:
    add = parser.add_argument_group("generated images").add_argument
    add("--truncation", default="1", metavar="PSI[,PSI...]", help="w = mean + psi (w - mean); several values: a sweep")
    add("--truncation_mean", type=int, default=10_000, help="samples for the mean of w")
    add("--noise", default="random", help="random (drawn for each image), const (the stored maps), none")
    add("--seed", type=int, default=0, help="seed of the images")


def cache_folder(cache_dir: str | None) -> Path | None:
    """Folder of the flag --cache_dir."""
    return None if cache_dir == "none" else Path(cache_dir or default_cache())
