"""Features of images: computed in micro-batches, shared among the ranks, kept in a cache keyed by content and protocol.

Every rank takes a contiguous share of the images; rank 0 ends with all features in order. The cache file of a set goes
by the sha256 of its images (of the weights and the draw, for a generator), of the extractor's weights and of the
protocol: a changed image, filter or extractor is another file, a moved folder is not. The same `.npz` is accepted
wherever images are, and says itself what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import require_file
from common.cli import UserError
from common.distributed import Distributed, add_device_flags, broadcast_object, gather_list, shard
from common.files import atomic_write
from common.lmdb_store import DatasetError
from metrics.extractors import Extractor, extractor_names
from metrics.protocol import PROTOCOLS
from metrics.sources import ImageSource

FORMAT = 1  # raised when the same inputs give other features
GATHER = 64  # MiB of features collected from all ranks at a time
HERE = Distributed(0, 0, 1, torch.device("cpu"), None)


@dataclass
class Features:
    """Features of a set of images, and what they are of. `values` is None on ranks other than 0."""

    values: torch.Tensor | None  # float32 [N, D]
    about: dict  # of the source, with n and digest
    extractor: dict  # name, sha256, size, dim
    protocol: dict


def describe(extractor: Extractor) -> dict:
    return {"name": extractor.name, "sha256": extractor.sha256, "size": extractor.size, "dim": extractor.dim}


def extract(
    source,
    extractor: Extractor,
    n: int,
    *,
    seed: int = 0,
    batch: int = 64,
    dist: Distributed = HERE,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    order: str | None = None,
) -> Features:
    """Features of n images of a source (all there are, when fewer), chosen without replacement.

    batch: images per forward pass and rank. cache_dir: folder of the cache; None: no cache. order: which images of a
    larger set, `first` or `drawn`; None: as the protocol has it for FID. All ranks must call it.
    Raises DatasetError for a damaged image, ValueError when features are not finite.
    """
    protocol = extractor.protocol
    order = order or ("first" if protocol.name == "paper" else "drawn")
    positions = source.choose(n, order, seed)
    about = {**source.about, "n": len(positions)}
    if isinstance(source, ImageSource):
        about["chosen"] = "all" if len(positions) == source.n else order
        about["seed"] = seed if about["chosen"] == "drawn" else None
    about["digest"] = broadcast_object(source.digest(positions) if dist.is_main else None)
    found = Features(None, about, describe(extractor), asdict(protocol))
    path = None if cache_dir is None else Path(cache_dir) / f"{_key(found)}.npz"
    if broadcast_object(path is not None and path.exists() if dist.is_main else None):
        found.values = load_features(path).values if dist.is_main else None
        return found
    found.values = _compute(source, extractor, positions, batch, dist, progress)
    if path is not None and dist.is_main:
        save_features(path, found)
    return found


def _key(features: Features) -> str:
    facts = [FORMAT, features.about["digest"], features.extractor, features.protocol]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _compute(source, extractor, positions, batch, dist, progress) -> torch.Tensor | None:
    """This rank's share, sent to rank 0 in blocks, so that no other rank ever holds the whole."""
    n, dim = len(positions), extractor.dim
    shares = [shard(n, rank, dist.world_size) for rank in range(dist.world_size)]
    rows = max(batch, (GATHER << 20) // (4 * dim * dist.world_size) // batch * batch)  # per rank and block
    n_blocks = max(1, -(-max(len(share) for share in shares) // rows))
    result = torch.empty(n, dim) if dist.is_main else None
    mine = [positions[i] for i in shares[dist.rank]]
    batches = source.batches(mine, batch, dist.device)
    title = f"{extractor.name} of {Path(source.about['path']).name}"
    with tqdm(total=n, desc=title, unit="img", disable=None if progress and dist.is_main else True) as bar:
        for block in range(n_blocks):
            values, error = _block(batches, extractor, min(rows, max(0, len(mine) - block * rows)), bar, dist)
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
    values, done = torch.empty(n, extractor.dim), 0
    try:
        while done < n:
            images = next(batches)
            found = extractor(images.to(dist.device)).cpu()
            if found.shape[1] != extractor.dim:
                raise UserError(f"{extractor.name} gives {found.shape[1]} features, {extractor.dim} were declared")
            if not torch.isfinite(found).all():
                raise UserError(f"{extractor.name} gives features that are not finite: broken images or weights?")
            values[done : done + len(images)] = found
            done += len(images)
            bar.update(len(images) * dist.world_size)
    except (ValueError, OSError) as error:
        return values, str(error)
    return values, None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def default_cache() -> Path:
    """$WPP_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WPP_CACHE") or Path(home) / "wpp" / "features")


def save_features(path: Path, features: Features) -> None:
    """Write features [N, D] with all that is known of them, atomically."""
    known = json.dumps({"about": features.about, "extractor": features.extractor, "protocol": features.protocol})
    with atomic_write(path) as file:
        np.savez(file, features=features.values.numpy(), known=np.array(known))


def load_features(path: str | os.PathLike) -> Features:
    """Features from a file of `save_features`. Raises FileNotFoundError, or ValueError when it is not one."""
    path = require_file(path, "features file (.npz)")
    try:
        with np.load(path, allow_pickle=False) as file:
            values, known = file["features"], json.loads(str(file["known"]))
    except KeyError as error:
        raise UserError(
            f"{path} has no entry {error}: features made elsewhere do not say how: "
            "compute them anew from the images with metrics/extract_features.py"
        ) from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated, damaged or no features file ({error})") from error
    return Features(torch.from_numpy(values.astype(np.float32, copy=False)), **known)


def require_same(features: Features, extractor: Extractor, path) -> Features:
    """The features of a file, if they are this extractor's under this protocol; ValueError naming both sides."""
    wanted = (describe(extractor), asdict(extractor.protocol))
    if (features.extractor, features.protocol) != wanted:
        sides = [
            f"{e['name']} (weights {str(e['sha256'])[:8]}), protocol {p['name']}"
            for e, p in ((features.extractor, features.protocol), wanted)
        ]
        raise UserError(f"{path} holds features of {sides[0]}; asked for are those of {sides[1]}")
    return features


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_extractor_flags(parser) -> None:
    """Flags of everything that extracts features."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--extractor",
        default="auto",
        metavar="NAME",
        help=f"{', '.join(extractor_names())}; auto: Inception (for the paper's precision and recall "
        "VGG-16), else the stand-in squeeze or scorer",
    )
    group.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="tf-compat",
        help="how images reach the extractor: paper (and pytorch-fid), tf-compat (torch-fidelity, most "
        "papers), clean (clean-fid)",
    )
    group.add_argument("--n_sample", type=int, default=50_000, help="images of each side; all there are, when fewer")
    group.add_argument(
        "--size",
        type=int,
        help="pixels: which size of an LMDB, or what to fit the images of a folder to; default: as they "
        "are, or that of the generated images",
    )
    group.add_argument("--batch", type=int, default=64, help="images per forward pass and process")
    group.add_argument("--workers", type=int, default=2, help="threads that decode images")
    group.add_argument("--weights_dir", help="folder with the extractor's weights, looked into first")
    group.add_argument(
        "--cache_dir",
        help="folder of the feature cache; none: no cache; default $WPP_CACHE, else ~/.cache/wpp/features",
    )
    add_device_flags(parser)


def add_sampling_flags(parser) -> None:
    group = parser.add_argument_group("generated images")
    group.add_argument(
        "--truncation", default="1", metavar="PSI[,PSI...]", help="w = mean + psi (w - mean); several values: a sweep"
    )
    group.add_argument("--truncation_mean", type=int, default=10_000, help="samples for the mean of w")
    group.add_argument("--noise", default="random", help="random (drawn for each image), const (the stored maps), none")
    group.add_argument("--seed", type=int, default=0, help="of the images drawn")


def cache_folder(args) -> Path | None:
    return None if args.cache_dir == "none" else Path(args.cache_dir or default_cache())
