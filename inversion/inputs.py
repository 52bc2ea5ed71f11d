"""Images to invert, by position: from folders, single files or an LMDB, in a fixed order; photos are aligned first."""

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.cli import UserError
from common.distributed import Distributed, broadcast_object
from common.images import fit_image, image_size, list_images, read_image, to_planes
from common.lmdb_store import BUILDING_FILE, DATA_FILE
from common.workers import n_cores
from dataset import MultiResolutionDataset
from faces.align import read_alignment
from faces.folder import align_folder, list_photos, looks_aligned, require_faces
from faces.settings import AlignSettings


class Images:
    """Images by position. names: unique; paths: their files, none for an LMDB; read: position -> uint8 [3, size, size],
    with ImageError, DatasetError or OSError, in one sentence, for what is no readable image."""

    def __init__(self, names: Iterable[str], read: Callable[[int], torch.Tensor], paths: Sequence[Path] = ()):
        self.names, self.read, self.paths = _unique_names(names), read, list(paths)
        self.left_out: dict[str, str] = {}  # photo -> why it gave no image (`open_faces`)

    def __len__(self) -> int:
        return len(self.names)

    def alignment(self) -> list[dict | None]:
        """Per image the record of align_faces.py (alignment.json beside it or one folder up), or None."""
        files = functools.cache(lambda file: read_alignment(file) if file.is_file() else {})
        records = []
        for path in map(Path, map(os.path.abspath, self.paths)):
            found = (files(folder / "alignment.json").get(path.stem) for folder in path.parents[:2])
            records.append(next((asdict(record) for record in found if record), None))
        return records or [None] * len(self)


def read_file(paths: Sequence[Path], size: int, fit: str, resample: str, position: int) -> torch.Tensor:
    """An image file fitted to size x size, uint8 [3, size, size]."""
    return to_planes(fit_image(read_image(paths[position]), size, fit=fit, resample=resample)).contiguous()


def open_images(sources: Sequence, size: int, *, fit: str = "crop", resample: str = "lanczos") -> Images:
    """The images of one LMDB, or of folders (any depth, sorted) and files in the order given. fit, resample: of
    common.images.fit_image. Raises FileNotFoundError for a path that is absent, ValueError when there is no image or an
    LMDB has none of this size."""
    names, paths = [], []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist: a folder of images, an image or an LMDB is expected")
        if source.suffix.lower() == ".mdb" or (source / DATA_FILE).exists() or (source / BUILDING_FILE).exists():
            if len(sources) > 1:
                raise UserError(f"{source} is an LMDB: give it alone, here {len(sources)} data sets are given")
            dataset = MultiResolutionDataset(source, size)
            return Images(dataset.names, dataset.__getitem__)
        files = list_images(source) if source.is_dir() else [source]
        if not files:
            raise UserError(f"{source} holds no images: a folder of .jpg, .png, ... files or an LMDB is expected")
        names += [path.relative_to(source).as_posix() if source.is_dir() else path.name for path in files]
        paths += files
    return Images(names, functools.partial(read_file, paths, size, fit, resample), paths)


def _unique_names(names: Iterable[str]) -> list[str]:
    """Names that any text file can hold; later ones of equal names (a.jpg of two folders) get a number."""
    result: dict[str, None] = {}
    for name in (os.fsencode(name).decode("utf-8", "backslashreplace") for name in names):
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        result[next(text for text in itertools.chain([name], numbered) if text not in result)] = None
    return list(result)


def pixel_seed(image: torch.Tensor, seed: int) -> int:
    """Seed of an image's draws: 63 bits of its pixels (uint8) and `seed`, whatever its name and position."""
    digest = hashlib.sha256(f"{seed}:".encode() + image.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def open_faces(
    sources: Sequence,
    size: int,
    folder: Path,  # of the results: faces are aligned into folder/aligned
    *,
    align: str,  # "auto": crops of align_faces.py and LMDBs stay as they are, of other photos the largest face is taken
    dist: Distributed,
    weights_dir: Path | None = None,
    limit: int | None = None,  # only the first images are examined and aligned
    **fitting: str,  # fit and resample of `open_images`
) -> Images:
    """`open_images` of the sources, with `align` "auto" aligned, in the order of the photos; all ranks must call it.
    Photos without a face are in `left_out`. Raises as `open_images`; FileNotFoundError without the detector's weights,
    UserError when no photo gives a face."""
    images = open_images(sources, size, **fitting)
    if not images.paths:  # an LMDB
        return images
    records = list(zip(images.paths, images.alignment(), strict=True))[:limit]
    if align == "off":
        if dist.is_main:
            warn_of_photos(records[:64], size, weights_dir)
        return images
    source_of = {path: source for source, path in list_photos(sources, folder).items()}
    chosen = [(path, is_crop(path, record)) for path, record in records if path in source_of]
    raw = sorted((source_of[path], path) for path, aligned in chosen if not aligned)
    if not raw:
        return images
    how = {"settings": AlignSettings(size=size), "n_worker": n_cores(), "weights_dir": weights_dir}
    photos = broadcast_object(align_folder(dict(raw), folder, **how) if dist.is_main else None)
    crops = {photo.photo: [folder / "aligned" / f"{face.name}.png" for face in photo.faces] for photo in photos}
    faces = [face for path, aligned in chosen for face in ([path] if aligned else crops[source_of[path]])]
    if not faces:
        require_faces(photos, folder)
    images = open_images(faces, size, **fitting)
    without = (photo for photo in photos if not photo.faces)
    images.left_out = {photo.photo: ": ".join(filter(None, (photo.outcome, photo.note))) for photo in without}
    return images


def is_crop(path: Path, record: dict | None) -> bool:
    """Whether an image is the crop recorded in alignment.json; the photo itself may have the same name."""
    return record is not None and image_size(path) == (record["size"], record["size"])


def warn_of_photos(records: list[tuple[Path, dict | None]], size: int, weights_dir: Path | None) -> None:
    """One line on stderr if an image looks like a photo: not square, or far larger than the generator's images."""
    for path, record in records:
        width, height = image_size(path) or (size, size)
        suspicious = (width != height or width > 2 * size) and not is_crop(path, record)
        if suspicious and looks_aligned(path, weights_dir) is not True:
            advice = "as faces must be: use --align auto, or align_faces.py before"
            print(f"warning: {path} has {width}x{height} pixels and seems not to be aligned, {advice}", file=sys.stderr)
            return
