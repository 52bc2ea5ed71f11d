"""The layout of an image LMDB: what prepare_data.py writes and dataset.py reads.

f"{size}-{index:05d}" -> encoded image, b"length" -> number of images in ascii (both rosinality's), b"manifest" -> JSON:
how it was made and from what (ours). A finished store is one file, data.mdb; building.mdb beside it is one in the
making, which becomes data.mdb by a rename, so that a half-written store is never taken for a whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from common.files import parse_json

FIRST_MAP_SIZE = 64 << 20  # bytes; doubled whenever it is full
DISK_RESERVE = 64 << 20  # bytes left free on the disk
PREPARE = "python3 prepare_data.py"  # for messages that say what to run
DATA_FILE, BUILDING_FILE = "data.mdb", "building.mdb"


class DatasetError(ValueError):
    """A data set cannot be used as asked; the message is one sentence that says what to run."""


def image_key(size: int, index: int) -> bytes:
    """The key of one image; five digits or more."""
    return f"{size}-{index:05d}".encode()


# py-lmdb refuses to open one file twice in a process, so the data sets of a process share what is open. Weak: a store
# closes when its last reader goes. A handle must not be used after a fork, and counts as open there until it is closed.
_open_stores: weakref.WeakValueDictionary[str, lmdb.Environment] = weakref.WeakValueDictionary()


def _close_inherited() -> None:
    for store in list(_open_stores.values()):
        store.close()
    _open_stores.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def open_store(path: str | os.PathLike) -> lmdb.Environment:
    """Open an LMDB (folder or bare file) for reading, shared within this process.

    Raises DatasetError if there is none, or if it is cut short or no LMDB at all.
    """
    path = Path(path)
    file = path if path.is_file() else path / DATA_FILE
    key = os.path.realpath(file)
    store = _open_stores.get(key)
    if store is not None:
        return store
    again = f"run {PREPARE} --out {path} ... again"
    if not file.exists():
        if (path / BUILDING_FILE).exists():
            raise DatasetError(f"{path} is unfinished: {again}")
        raise DatasetError(f"{path} holds no {DATA_FILE}: {again.removesuffix(' again')}")
    try:
        store = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        reason = "it is empty" if file.stat().st_size == 0 else str(error).rpartition(": ")[2]
        raise DatasetError(f"{file} is not a readable LMDB ({reason}): {again}") from error
    expected = _n_bytes(store)
    if file.stat().st_size < expected:
        store.close()
        found = f"{file.stat().st_size} of {expected} bytes"
        raise DatasetError(f"{file} is cut short ({found}): copy it again, or {again}")
    _open_stores[key] = store
    return store


@contextmanager
def reading(store: lmdb.Environment) -> Iterator[lmdb.Transaction]:
    """A transaction that only reads. Raises DatasetError where the store is damaged."""
    try:
        with store.begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        reason = str(error).rpartition(": ")[2]
        raise DatasetError(
            f"{store.path()} is damaged ({reason}): run {PREPARE} --overwrite ... to make it anew"
        ) from error


def read_manifest(store: lmdb.Environment) -> dict | None:
    """The JSON that prepare_data.py wrote about the store; None in one made by another tool."""
    with reading(store) as transaction:
        manifest = transaction.get(b"manifest")
    shape = {"length": int, "names": [str], "sizes": [int], "source_sizes?": [[int]], "skipped?": [[str]]}
    return (
        None if manifest is None else parse_json(manifest, shape, source=store.path(), what="LMDB of prepare_data.py")
    )


def sizes_present(store: lmdb.Environment) -> list[int]:
    """The resolutions that a store holds, by one look-up per resolution."""
    sizes = []
    with reading(store) as transaction, transaction.cursor() as cursor:
        found = cursor.set_range(b"0")
        while found and cursor.key()[:1].isdigit():
            size = cursor.key().partition(b"-")[0]
            if size.isdigit() and int(size) in sizes:
                raise lmdb.CorruptedError("keys out of order")
            if size.isdigit():
                sizes.append(int(size))
            found = cursor.set_range(size + b".")  # "." follows "-": past all images of this size
    return sorted(sizes)


def _n_bytes(store: lmdb.Environment) -> int:
    """Bytes up to the last page in use. LMDB maps the file: reading beyond its end kills the process with SIGBUS."""
    return (store.info()["last_pgno"] + 1) * store.stat()["psize"]


# -- writing -------------------------------------------------------------------------------------------------------


def sources_digest(sources: list[list]) -> str:
    """Tells one list of source files, [[name, bytes, mtime], ...], from another."""
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


class StoreWriter:
    """Fills FOLDER/building.mdb with encoded images and makes it FOLDER/data.mdb at the end.

    What a killed run left is begun anew: encoding is fast, and half a store is never taken for a whole one. settings:
    go into the manifest; `sizes` among them. sources: [name, bytes, mtime] of every file, in order. One writer at a
    time (common/lock.py is the caller's).
    """

    def __init__(self, folder: Path, settings: dict, sources: list[list]):
        self.folder, self.settings, self.sources = folder, settings, sources
        self.file = folder / BUILDING_FILE
        self.good: list[list] = []  # [name, width, height]
        self.skipped: list[list[str]] = []  # [name, reason]

    def __enter__(self) -> StoreWriter:
        self.file.unlink(missing_ok=True)
        # Not synced before the end: until then the file is nobody's
        self.env = lmdb.open(
            str(self.file), subdir=False, map_size=FIRST_MAP_SIZE, meminit=False, lock=False, sync=False
        )
        return self

    def __exit__(self, *_) -> None:
        self.env.close()
        self.file.unlink(missing_ok=True)

    def write(self, items: list[tuple[list[bytes] | str, tuple[int, int] | None]]) -> None:
        """One transaction for the next sources: (encoded images, one per size; (width, height)), or (why the file is
        left out, None). Raises OSError, early, if the disk will not do."""
        n_bytes = sum(len(data) for encoded, size in items if size for data in encoded)
        self._require_room(n_bytes)
        self._transact(lambda transaction: self._put(transaction, items), n_bytes)
        for encoded, size in items:
            name = self.sources[len(self.good) + len(self.skipped)][0]
            if size is None:
                self.skipped.append([name, encoded])
            else:
                self.good.append([name, *size])

    def finish(self, **info) -> dict:
        """Add `length` and the manifest, and put the store in place. Returns the manifest (with `info` in it)."""
        manifest = {
            **self.settings,
            **info,
            "length": len(self.good),
            "names": [name for name, _, _ in self.good],
            "source_sizes": [size for _, *size in self.good],
            "skipped": self.skipped,
            "sources_digest": sources_digest(self.sources),
        }
        encoded = json.dumps(manifest).encode()
        self._transact(lambda transaction: self._conclude(transaction, encoded), len(encoded))
        self.env.close()
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.file, self.folder / DATA_FILE)
        return manifest

    def _transact(self, change, n_bytes: int) -> None:
        while True:
            try:
                with self.env.begin(write=True) as transaction:
                    return change(transaction)
            except lmdb.MapFullError:  # rolled back: the same again in a larger map
                self.env.set_mapsize(max(2 * self.env.info()["map_size"], 4 * n_bytes))
            except lmdb.Error as error:
                text = f"could not be written: {str(error).rpartition(': ')[2]}"
                raise OSError(errno.EIO, text, str(self.file)) from error

    def _conclude(self, transaction, manifest: bytes) -> None:
        transaction.put(b"length", str(len(self.good)).encode())
        transaction.put(b"manifest", manifest)

    def _put(self, transaction, items) -> None:
        index = len(self.good)
        for encoded, image_size in items:
            if image_size is not None:
                for size, data in zip(self.settings["sizes"], encoded, strict=True):
                    transaction.put(image_key(size, index), data)
                index += 1

    def _require_room(self, n_bytes: int) -> None:
        """Stop early, by the rate so far (half as much again is forgiven), not when the disk is full."""
        free, done = shutil.disk_usage(self.folder).free, len(self.good) + len(self.skipped)
        needed = _n_bytes(self.env) / done * (len(self.sources) - done) if done else 0
        if free < 2 * n_bytes + DISK_RESERVE or needed > 1.5 * free:
            more = f"it needs about {needed / 1e9:.1f} GB more and " if needed else ""
            text = f"the disk is full: {more}{free / 1e9:.1f} GB are free; choose fewer sizes or --format jpeg"
            raise OSError(errno.ENOSPC, text, str(self.folder))
