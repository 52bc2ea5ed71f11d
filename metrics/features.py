"""Features of images: computed in micro-batches, shared among the ranks, kept in a cache keyed by content and protocol.

The name of a cache file is the sha256 of the images (of a generator: weights and draw), the extractor's weights and the
protocol. A cache that fails costs time, never a result. The same `.npz` is accepted wherever images are.
"""

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
from common.cli import UserError
from common.distributed import Distributed, broadcast_object, gather_list, shard
from common.files import atomic_write, parse_json
from common.lmdb_store import DatasetError
from metrics.extractors import Extractor
from metrics.flags import Sampling
from metrics.sources import ImageSource, open_source

FORMAT = 2  # of a cached file, raised when the same inputs give another one
HERE = Distributed(0, 1, torch.device("cpu"))
ABOUT = {"n": int, "size?": (int, None), "truncation?": (float, None)}
SCHEMA = {"about": ABOUT, "extractor": {"name": str, "dim": int}, "protocol": {"name": str}}  # of a file (.npz)


@dataclass
class Features:
    """Features of a set of images, and how they were computed. `values` is None on ranks other than 0."""

    values: torch.Tensor | None  # float32 [N, D]
    info: dict  # of the source, with n and digest
    extractor: dict  # name, sha256, size, dim
    protocol: dict


def open_images(path: Path, extractor: Extractor, *, sampling: Sampling, **options):
    """The source of images at `path` (options: see `open_source`), or the Features in a .npz, for `extract`."""
    if path.suffix == ".npz":
        source = require_same(load_features(path), extractor, path)
    else:
        source = open_source(path, sampling=sampling, **options)
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
    order: str | None = None,  # of a larger set: `first` or `drawn`; None: as the protocol has it for FID
) -> Features:
    """Features of n images of a source (all there are, when fewer), chosen without replacement; Features are returned
    as they are. All ranks must call it. Raises DatasetError for a damaged image or features that are not finite."""
    if isinstance(source, Features):
        return source
    order = order or ("first" if extractor.protocol.name == "paper" else "drawn")
    positions = source.choose(n, order, seed)
    info = {**source.info, "n": len(positions)}
    if isinstance(source, ImageSource):
        info["chosen"] = "all" if len(positions) == source.n else order
        info["seed"] = seed if info["chosen"] == "drawn" else None
    info["digest"] = broadcast_object(source.digest(positions) if dist.is_main else None)
    features = Features(None, info, extractor.describe(), asdict(extractor.protocol))
    settings = [FORMAT, info["digest"], features.extractor, features.protocol]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    cached = Path(cache_dir) / f"{key}.npz" if cache_dir is not None and dist.is_main else None
    if cached:
        features.values = _read_cache(cached, (len(positions), extractor.dim))
    if broadcast_object(features.values is None):
        features.values = _compute(source, extractor, positions, batch, dist)
        if cached:
            try:
                save_features(cached, features)
            except OSError as error:  # without the file's name: shown once per folder
                reason = error.strerror or error
                warnings.warn(f"features are not cached in {cache_dir} (--cache_dir): {reason}", stacklevel=2)
    return features


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


def _compute(source, extractor, positions, batch, dist) -> torch.Tensor | None:
    """All features, on rank 0; each rank computes a share. An error of one of them ends all, in its words."""
    share, values, error = shard(len(positions), dist.rank, dist.world_size), [torch.empty(0, extractor.dim)], None
    title = f"{extractor.name} of {Path(source.info['path']).name}"
    with tqdm(total=len(share), desc=title, unit="img", leave=False, disable=None if dist.is_main else True) as bar:
        try:
            for images in source.batches([positions[i] for i in share], batch, dist.device):
                values.append(extractor(images.to(dist.device)).cpu())  # [B, D]
                bar.update(len(images))
                if not torch.isfinite(values[-1]).all():
                    raise ValueError(f"{extractor.name} gives features that are not finite: broken images or weights?")
        except (ValueError, OSError) as reason:
            error = str(reason)
    values, errors = zip(*gather_list((torch.cat(values), error)), strict=True)
    if error := next(filter(None, errors), None):
        raise DatasetError(error)
    return torch.cat(values) if dist.is_main else None


def cache_folder(cache_dir: str | None = None) -> Path | None:
    """Folder of the flag --cache_dir: none for 'none'; default $WPP_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return None if cache_dir == "none" else Path(cache_dir or os.environ.get("WPP_CACHE") or f"{home}/wpp/features")


def save_features(path: Path, features: Features) -> None:
    """Write features [N, D] with their metadata, atomically."""
    metadata = {"about": features.info, "extractor": features.extractor, "protocol": features.protocol}
    with atomic_write(path) as file:
        np.savez(file, features=features.values.numpy(), metadata=np.array(json.dumps(metadata)))


def load_features(path: str | os.PathLike) -> Features:
    """Features from a file of `save_features`. Raises FileNotFoundError, or ValueError when it is not one."""
    arrays = read_npz(path, "features file (.npz)")
    if not {"features", "metadata"} <= set(arrays):
        raise UserError(f"{path} has the entries {', '.join(arrays)}: features made elsewhere do not say how")
    metadata = parse_json(str(arrays["metadata"]), SCHEMA, source=path, what="features file")
    values = torch.from_numpy(require_floats(arrays["features"], path))
    shape = (metadata["about"]["n"], metadata["extractor"]["dim"])
    if values.shape != shape:
        raise UserError(f"{path}: its features have the shape {list(values.shape)}, expected {list(shape)}")
    return Features(values, metadata["about"], metadata["extractor"], metadata["protocol"])


def require_same(features: Features, extractor: Extractor, path) -> Features:
    """The features of a file, if they are this extractor's under this protocol; ValueError naming both sides."""
    sides = [(features.extractor, features.protocol), (extractor.describe(), asdict(extractor.protocol))]
    if sides[0] != sides[1]:
        found, expected = (f"{e['name']} (weights {str(e.get('sha256'))[:8]}), protocol {p['name']}" for e, p in sides)
        raise UserError(f"{path} holds features of {found}; expected those of {expected}")
    return features
