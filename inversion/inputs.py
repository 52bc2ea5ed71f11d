"""Pictures to invert, by position: from a folder, single files or an LMDB, in an order that is always the same.

pictures = open_pictures(["photos/", "another face.jpg"], 256)
picture = pictures.read(0)                                              # uint8 [3, 256, 256]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.images import ImageError, fit_image, list_images, read_image
from common.lmdb_store import BUILDING_FILE, DATA_FILE, open_store, sizes_present
from dataset import MultiResolutionDataset
from faces.align import read_alignment


class Pictures:
    """Files, each fitted to size x size as it is read. `names` are unique: relative POSIX paths, or as given."""

    def __init__(self, entries: Sequence[tuple[str, Path]], size: int, fit: str = "crop"):
        self.paths = [path for _, path in entries]
        self.names = _unique([_readable(name) for name, _ in entries])
        self.size, self.fit = size, fit
        self.enlarged: list[str] = []  # names of those read so far that have fewer pixels than asked for
        self.left_out: dict[str, str] = {}  # photo -> why it is not among the pictures (inversion/photos.py)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> torch.Tensor:
        """uint8 [3, size, size]. ImageError, in one sentence, for a file that is no readable picture."""
        path = self.paths[position]
        try:
            image = read_image(path)
        except FileNotFoundError as error:  # it was there when the folder was listed
            raise ImageError(f"{path} is gone") from error
        side = max(image.size) if self.fit == "pad" else min(image.size)
        if side < self.size:
            self.enlarged.append(self.names[position])
        image = fit_image(image, self.size, fit=self.fit)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def alignment(self) -> list[dict | None]:
        """Per picture what align_faces.py recorded (alignment.json beside it or one folder up), or None."""
        found: dict[Path, dict] = {}
        return [_find_alignment(path, found) for path in self.paths]


class StoredPictures:
    """The same, from an LMDB."""

    def __init__(self, path: Path, size: int):
        self.dataset = MultiResolutionDataset(path, size)
        self.names = _unique([_readable(name) for name in self.dataset.names])
        self.size = size
        self.enlarged: list[str] = []
        self.left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> torch.Tensor:
        """uint8 [3, size, size]; DatasetError, a ValueError, for a damaged item."""
        return self.dataset[position]

    def alignment(self) -> list[None]:
        return [None] * len(self)


def open_pictures(sources: Sequence[str | os.PathLike], size: int, *, fit: str = "crop") -> Pictures | StoredPictures:
    """The pictures of one LMDB, or of folders (any depth, sorted) and files in the order given.

    fit: what to do with pictures that are not square (common/images.py). Raises FileNotFoundError for a path that is
    absent, ValueError when there is no picture or an LMDB has none of this size.
    """
    entries: list[tuple[str, Path]] = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist: a folder of images, an image or an LMDB is expected")
        if _is_store(source):
            if len(sources) > 1:
                raise UserError(f"{source} is an LMDB: give it alone, here {len(sources)} data sets are given")
            _require_size(source, size)
            return StoredPictures(source, size)
        if source.is_dir():
            found = list_images(source)
            if not found:
                raise UserError(f"{source} holds no images: a folder of .jpg, .png, ... files or an LMDB is expected")
            entries += [(path.relative_to(source).as_posix(), path) for path in found]
        else:
            entries.append((source.name, source))
    return Pictures(entries, size, fit)


def _is_store(path: Path) -> bool:
    if path.is_dir():
        return (path / DATA_FILE).exists() or (path / BUILDING_FILE).exists()
    return path.suffix.lower() == ".mdb"


def _require_size(path: Path, size: int) -> None:
    present = sizes_present(open_store(path))
    if present and size not in present:
        raise UserError(
            f"{path} has images of size {', '.join(map(str, present))}, the generator makes {size}: give a folder of "
            f"pictures, which are fitted, or run python3 prepare_data.py --size {size} --out ANOTHER_LMDB ..."
        )


def _readable(name: str) -> str:
    """A name that any text file can hold: bytes that are no UTF-8 are shown as such."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _unique(names: list[str]) -> list[str]:
    """Later ones of equal names (a.jpg of two folders) get a number."""
    taken: set[str] = set()
    result = []
    for name in names:
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name} ({number})"
        taken.add(unique)
        result.append(unique)
    return result


def _find_alignment(path: Path, known: dict[Path, dict]) -> dict | None:
    for folder in (path.parent, path.parent.parent):
        file = folder / "alignment.json"
        if file not in known:
            known[file] = read_alignment(file) if file.is_file() else {}
        if path.stem in known[file]:
            return known[file][path.stem].to_dict()
    return None


def pixel_seed(picture: torch.Tensor, seed: int) -> int:
    """Seed of a picture's draws, 63 bits of its pixels and `seed`: neither its name nor its company matters."""
    digest = hashlib.sha256(f"{seed}:".encode() + picture.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
