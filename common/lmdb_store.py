"""The layout of an image LMDB: what prepare_data.py writes and dataset.py reads.

f"{size}-{index:05d}" -> encoded image, b"length" -> number of images in ascii (both rosinality's), b"manifest" -> JSON:
how it was made and from what (ours). A finished store is one file, data.mdb; building.mdb beside it is one in the
making, which becomes data.mdb by a rename, so that a half-written store is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import lmdb

FIRST_MAP_SIZE = 64 << 20  # bytes; doubled whenever it is full
DISK_RESERVE = 64 << 20  # bytes left free on the disk
COMPACT_ABOVE = 0.02  # share of unused pages from which the finished store is copied compactly
PREPARE = "python3 prepare_data.py"  # for messages that say what to run
DATA_FILE, BUILDING_FILE = "data.mdb", "building.mdb"


class DatasetError(ValueError):
    """A data set cannot be used as asked; the message is one sentence that says what to run."""


def image_key(size: int, index: int) -> bytes:
    """The key of one picture; five digits or more."""
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
    """Opens an LMDB (folder or bare file) for reading, shared within this process.

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
            raise DatasetError(f"{path} is unfinished: {again} with the same arguments, it continues where it stopped")
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


def read_manifest(store: lmdb.Environment) -> dict | None:
    """What prepare_data.py wrote about the store; None in one made by another tool."""
    with store.begin() as transaction:
        manifest = transaction.get(b"manifest")
    return None if manifest is None else json.loads(manifest)


def sizes_present(store: lmdb.Environment) -> list[int]:
    """The resolutions that a store holds, by one look-up per resolution."""
    sizes = []
    with store.begin() as transaction, transaction.cursor() as cursor:
        found = cursor.set_range(b"0")
        while found and cursor.key()[:1].isdigit():
            size = cursor.key().partition(b"-")[0]
            if size.isdigit():
                sizes.append(int(size))
            found = cursor.set_range(size + b".")  # "." follows "-": past all pictures of this size
    return sorted(sizes)


def _n_bytes(store: lmdb.Environment) -> int:
    """Bytes up to the last page in use. LMDB maps the file: reading beyond its end kills the process with SIGBUS."""
    return (store.info()["last_pgno"] + 1) * store.stat()["psize"]


# -- writing -------------------------------------------------------------------------------------------------------


def sources_digest(sources: list[list]) -> str:
    """Tells one list of source files, [[name, bytes, mtime], ...], from another."""
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


class StoreWriter:
    """Fills OUT/building.mdb with encoded pictures and makes it OUT/data.mdb at the end.

    Built on a folder where a killed run with the same settings and files left a store, it goes on with that: `records`
    holds what is done. A record is [name, bytes, mtime, width, height], or [name, bytes, mtime, reason] for a file that
    is left out. The store keeps them, and `settings`, under keys of their own until it is finished; `manifest` is not
    None if only the last rename is missing.
    """

    def __init__(self, folder: Path, settings: dict, sources: list[list]):
        self.folder, self.settings, self.sources = folder, settings, sources
        self.file = folder / BUILDING_FILE
        self.records: list[list] = []
        self.manifest: dict | None = None
        if not (self.file.exists() and self._take_up()):
            self._remove()
            self.env = self._open()
            with self.env.begin(write=True) as transaction:
                transaction.put(b"settings", json.dumps(settings).encode())
        self.n_good = sum(len(record) == 5 for record in self.records)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self.env.close()

    @property
    def skipped(self) -> list[list[str]]:
        """[name, reason] of the files that are left out."""
        return [[record[0], record[3]] for record in self.records if len(record) == 4]

    def write(self, items: list[tuple[list, list[bytes]]]) -> None:
        """One transaction: records with their encoded pictures, one per size (none for a file that is left out).

        Raises ValueError if the disk is too full or another process writes to the same folder.
        """
        n_bytes = sum(len(data) for _, encoded in items for data in encoded)
        if shutil.disk_usage(self.folder).free < 2 * n_bytes + DISK_RESERVE:
            raise ValueError(f"the disk of {self.folder} is full: free some space and run the same command again")
        self._transact(lambda transaction: self._put(transaction, items), n_bytes)
        self.records += [record for record, _ in items]
        self.n_good += sum(bool(encoded) for _, encoded in items)
        self._check_disk()

    def finish(self, **facts) -> dict:
        """Adds `length` and the manifest, and puts the store in place. Returns the manifest (with `facts` in it)."""
        if self.manifest is None:
            good = [record for record in self.records if len(record) == 5]
            manifest = {
                **self.settings,
                **facts,
                "length": len(good),
                "names": [record[0] for record in good],
                "source_sizes": [record[3:] for record in good],
                "skipped": self.skipped,
                "sources_digest": sources_digest(self.sources),
            }
            encoded = json.dumps(manifest).encode()
            self._transact(lambda transaction: self._conclude(transaction, encoded), len(encoded))
            self.manifest = manifest
        self._put_in_place()
        return self.manifest

    def _open(self) -> lmdb.Environment:
        size = max(FIRST_MAP_SIZE, 2 * self.file.stat().st_size if self.file.exists() else 0)
        return lmdb.open(str(self.file), subdir=False, map_size=size, meminit=False, max_readers=8)

    def _take_up(self) -> bool:
        """Reads what a killed run left. False if it is damaged or was made with other settings or of other files."""
        try:
            self.env = self._open()
        except lmdb.Error:
            return False
        if self.file.stat().st_size < _n_bytes(self.env):
            self.env.close()
            return False
        with self.env.begin() as transaction:
            settings, manifest = transaction.get(b"settings"), transaction.get(b"manifest")
            for key in _batch_keys(transaction):
                self.records += json.loads(transaction.get(key))
        if manifest is not None:
            self.manifest = json.loads(manifest)
            same = {**self.manifest, **self.settings} == self.manifest
            same = same and self.manifest["sources_digest"] == sources_digest(self.sources)
        else:
            same = settings is not None and json.loads(settings) == self.settings
            same = same and [record[:3] for record in self.records] == self.sources[: len(self.records)]
        if not same:
            self.env.close()
            self.records, self.manifest = [], None
        return same

    def _transact(self, change, n_bytes: int) -> None:
        while True:
            try:
                with self.env.begin(write=True) as transaction:
                    return change(transaction)
            except lmdb.MapFullError:  # rolled back: the same again in a larger map
                self.env.set_mapsize(max(2 * self.env.info()["map_size"], 4 * n_bytes))

    def _put(self, transaction, items) -> None:
        records = json.dumps([record for record, _ in items]).encode()
        if not transaction.put(f"batch-{len(self.records):010d}".encode(), records, overwrite=False):
            raise ValueError(f"another prepare_data.py is writing to {self.folder}: wait for it or end it")
        index = self.n_good
        for _, encoded in items:
            for size, data in zip(self.settings["sizes"], encoded, strict=False):  # none for a file left out
                transaction.put(image_key(size, index), data)
            index += bool(encoded)

    def _conclude(self, transaction, manifest: bytes) -> None:
        for key in [b"settings", *_batch_keys(transaction)]:
            transaction.delete(key)
        transaction.put(b"length", str(self.n_good).encode())
        transaction.put(b"manifest", manifest)

    def _check_disk(self) -> None:
        """Stops early, judging by the rate so far (half as much again is forgiven), not when the disk is full."""
        needed = _n_bytes(self.env) / len(self.records) * (len(self.sources) - len(self.records))
        free = shutil.disk_usage(self.folder).free
        if needed > 1.5 * free:
            raise ValueError(
                f"{self.folder} needs about {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB: free some"
                " space and run the same command again, or choose fewer sizes or --format jpeg"
            )

    def _put_in_place(self) -> None:
        """building.mdb becomes data.mdb; through a compact copy if it has unused pages and the disk has room."""
        stat = self.env.stat()
        n_used = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] + 2
        n_bytes = n_used * stat["psize"]
        wasteful = self.file.stat().st_size > n_bytes * (1 + COMPACT_ABOVE) + (1 << 20)
        source = self.file
        if wasteful and shutil.disk_usage(self.folder).free > n_bytes + DISK_RESERVE:
            source = self.folder / "compact.mdb"
            with source.open("wb") as copy:
                self.env.copyfd(copy.fileno(), compact=True)
                os.fsync(copy.fileno())
        self.env.close()
        os.replace(source, self.folder / DATA_FILE)
        self._remove()

    def _remove(self) -> None:
        for name in (BUILDING_FILE, f"{BUILDING_FILE}-lock", "compact.mdb"):
            (self.folder / name).unlink(missing_ok=True)


def _batch_keys(transaction) -> list[bytes]:
    keys = []
    with transaction.cursor() as cursor:
        found = cursor.set_range(b"batch-")
        while found and cursor.key().startswith(b"batch-"):
            keys.append(cursor.key())
            found = cursor.next()
    return keys
