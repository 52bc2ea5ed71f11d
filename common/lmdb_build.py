"""A folder of images becomes an LMDB (common/lmdb_store.py): what prepare_data.py does. Starts without torch."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import lmdb
import PIL
from tqdm import tqdm

from common import lmdb_store
from common.cli import UserError
from common.files import write_text
from common.images import RESAMPLE, ImageError, fit_image, list_images, open_image, read_image
from common.lock import lock_folder
from common.tables import csv_text
from common.workers import map_ordered

CHUNK = 16  # files per task of a worker, and per transaction
COMPAT_ASPECT = 64  # settings["compat"] scales the whole image before it takes the centre
FIRST_MAP_SIZE = 64 << 20  # bytes; doubled whenever it is full
DISK_RESERVE = 64 << 20  # bytes left free on the disk


def build_lmdb(path, out, *, settings: dict, n_worker=1, max_bad: int | float = 0.05, overwrite=False) -> dict:
    """Make the LMDB `out` from the images below `path`. Returns its manifest; at once if it is up to date. settings:
    all that decides the bytes. max_bad: unreadable files that are tolerated, a count (int) or a fraction of all
    (float). Raises UserError: no images, too many unreadable ones, or a finished LMDB of something else without
    `overwrite`; OSError: full disk."""
    path, out = Path(path), Path(out)
    files = list_images(path)
    if not files:
        raise UserError(f"{path} holds no images: a folder of .jpg, .png, ... files is expected")
    sources = [_identify(file, path) for file in files]
    if not overwrite and (finished := _finished(out, settings, sources)):
        print(f"{out} is up to date", file=sys.stderr)
        return finished
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    encoded = map_ordered(functools.partial(encode, settings), chunks, min(n_worker, len(chunks)), 4 * n_worker)
    with lock_folder(out, what="prepare_data.py"), StoreWriter(out, settings, sources) as writer:
        with contextlib.closing(encoded), tqdm(total=len(files), unit="img", mininterval=1) as bar:
            for items in encoded:
                writer.write(items)
                bar.update(len(items))
        skipped = csv_text([("path", "reason"), *writer.skipped])
        write_text(out / "skipped.csv", skipped, errors="surrogateescape")
        n_bad, n_all, listed = len(writer.skipped), len(files), f"they are listed in {out / 'skipped.csv'}"
        if n_bad == n_all:
            raise UserError(f"none of the {n_all} image files in {path} can be read: {listed}")
        if n_bad > (max_bad * n_all if isinstance(max_bad, float) else max_bad):
            raise UserError(f"{n_bad} of {n_all} image files in {path} cannot be read, --max_bad {max_bad}: {listed}")
        return writer.finish(pillow=PIL.__version__)


def _identify(file: Path, root: Path) -> list:
    """[name, bytes, seconds since 1970] of a file: a change shows in these."""
    try:
        status = file.stat()
    except OSError:  # a link to nothing
        status = file.lstat()
    return [file.relative_to(root).as_posix(), status.st_size, int(status.st_mtime)]


def _digest(sources: list[list]) -> str:
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def _finished(out: Path, settings: dict, sources: list[list]) -> dict | None:
    """The manifest of an up-to-date `out`; None if there is none. Raises UserError if it is finished otherwise."""
    try:
        store = lmdb_store.open_store(out)
    except lmdb_store.DatasetError:
        return None  # nothing there, unfinished, or damaged: to be made
    with lmdb_store.reading(store) as transaction:
        if transaction.get(b"length") is None:
            return None
    manifest = lmdb_store.read_manifest(store) or {}
    if manifest.get("sources_digest") == _digest(sources):
        differing = [name for name, value in settings.items() if manifest.get(name) != value]
        if not differing:
            return manifest
        change = f"with other settings ({', '.join(f'{n} {manifest.get(n)}, now {settings[n]}' for n in differing)})"
    else:
        change = "from other files" if manifest else "by another tool"
    raise UserError(f"{out} is a finished LMDB made {change}: choose another --out, or replace it with --overwrite")


def encode(settings: dict, paths: list[Path]) -> list[tuple]:
    """One pair per path: (its encodings, one per size; (width, height)), or (why it is left out; None)."""
    results = []
    for path in paths:
        try:
            results.append(_encode_compat(path, settings) if settings["compat"] else _encode_file(path, settings))
        except (ImageError, OSError, MemoryError) as error:
            reason = str(error).removeprefix(f"{path} ").removeprefix("cannot be read as an image: ")
            results.append((" ".join(reason.split()) or "there is not enough memory for it", None))
    return results


def _encode_file(path: Path, settings: dict) -> tuple[list[bytes], tuple[int, int]]:
    options = {"quality": settings["quality"]}
    if settings["format"] == "png":
        options = {"compress_level": 3}  # a third of the time of the default 6, for 5 % more bytes (256 px faces)
    elif settings["format"] == "jpeg":
        options["subsampling"] = settings["subsampling"]
    elif settings["quality"] is None:  # of webp, where quality is now effort: 6 times faster, 5 % more bytes
        options = {"lossless": True, "quality": 0, "method": 1}
    fitting = {name: settings[name] for name in ("fit", "resample", "background")}
    image = read_image(path, background=settings["background"])
    fitted = [fit_image(image, size, **fitting) for size in settings["sizes"]]
    return [_encode(one, settings["format"], **options) for one in fitted], image.size


def _encode(image, image_format: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), image_format, **options)
    return buffer.getvalue()


def _encode_compat(path: Path, settings: dict) -> tuple[list[bytes], tuple[int, int]]:
    """rosinality's prepare_data.py: short side to size, then the centre, by torchvision's rounding; orientation,
    profile and alpha are not looked at. The same Pillow gives the same bytes."""
    with open_image(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    if max(width, height) > COMPAT_ASPECT * min(width, height):
        raise ImageError(f"{path} cannot be read as an image: {width}x{height} pixels are too long for --compat")
    encoded = []
    for size in settings["sizes"]:
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        resized = image if scaled == image.size else image.resize(scaled, RESAMPLE[settings["resample"]])
        left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        crop = resized.crop((left, top, left + size, top + size))
        encoded.append(_encode(crop, "jpeg", quality=settings["quality"]))
    return encoded, (width, height)


class StoreWriter:
    """Writer of encoded images into FOLDER/building.mdb, FOLDER/data.mdb at the end; for one process at a time.
    settings: go into the manifest; `sizes` among them. sources: [name, bytes, mtime] of every file, in order."""

    def __init__(self, folder: Path, settings: dict, sources: list[list]):
        self.folder, self.settings, self.sources = folder, settings, sources
        self.file = folder / lmdb_store.BUILDING_FILE
        self.good: list[list] = []  # [name, width, height]
        self.skipped: list[list[str]] = []  # [name, reason]

    def __enter__(self):
        self.file.unlink(missing_ok=True)
        # Not synced before the end: until then nothing reads the file
        options = {"subdir": False, "meminit": False, "lock": False, "sync": False}
        self.env = lmdb.open(str(self.file), map_size=FIRST_MAP_SIZE, **options)
        return self

    def __exit__(self, *_) -> None:
        self.env.close()
        self.file.unlink(missing_ok=True)

    def write(self, items: list[tuple[list[bytes] | str, tuple[int, int] | None]]) -> None:
        """Write the next sources, as `encode` gave them, in one transaction. Raises OSError before the disk is full."""
        entries, skipped, good, start = {}, [], [], len(self.good) + len(self.skipped)
        for (name, *_), (encoded, size) in zip(self.sources[start:], items, strict=False):
            if size is None:
                skipped.append([name, encoded])
                continue
            index = len(self.good) + len(good)
            keys = [lmdb_store.image_key(s, index) for s in self.settings["sizes"]]
            entries |= dict(zip(keys, encoded, strict=True))
            good.append([name, *size])
        self._require_room(sum(map(len, entries.values())))
        self._put(entries)
        self.good += good
        self.skipped += skipped

    def finish(self, **info) -> dict:
        """Add `length` and the manifest, and put the store in place. Returns the manifest (with `info` in it)."""
        sizes, digest = [size for _, *size in self.good], _digest(self.sources)
        manifest = {**self.settings, **info, "length": len(self.good), "names": [name for name, *_ in self.good]}
        manifest |= {"source_sizes": sizes, "skipped": self.skipped, "sources_digest": digest}
        self._put({b"length": str(len(self.good)).encode(), b"manifest": json.dumps(manifest).encode()})
        self.env.close()
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.file, self.folder / lmdb_store.DATA_FILE)
        return manifest

    def _put(self, entries: dict[bytes, bytes]) -> None:
        while True:
            try:
                with self.env.begin(write=True) as transaction:
                    for key, value in entries.items():
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:  # rolled back: the same again in a larger map
                self.env.set_mapsize(max(2 * self.env.info()["map_size"], 4 * sum(map(len, entries.values()))))
            except lmdb.Error as error:
                text = f"could not be written: {str(error).rpartition(': ')[2]}"
                raise OSError(errno.EIO, text, str(self.file)) from error

    def _require_room(self, n_bytes: int) -> None:
        """Stop before the disk is full: when the rest, at the rate so far, would take over 1.5 times the free space."""
        free, done = shutil.disk_usage(self.folder).free, len(self.good) + len(self.skipped)
        needed = lmdb_store.used_bytes(self.env) / done * (len(self.sources) - done) if done else 0
        if free < 2 * n_bytes + DISK_RESERVE or needed > 1.5 * free:
            more = f"it needs about {needed / 1e9:.1f} GB more and " if needed else ""
            text = f"the disk is full: {more}{free / 1e9:.1f} GB are free; choose fewer sizes or --format jpeg"
            raise OSError(errno.ENOSPC, text, str(self.folder))
