"""The layout of an image LMDB, and reading it: f"{size}-{index:05d}" -> encoded image, b"length" -> number of images in
ascii (both rosinality's), b"manifest" -> JSON: how it was made and from what (ours). A finished store is one file,
data.mdb; one that is being written is building.mdb, renamed at the end."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from common.files import parse_json

PREPARE = "python3 prepare_data.py"  # for messages that say what to run
DATA_FILE, BUILDING_FILE = "data.mdb", "building.mdb"
SCHEMA = {"length": int, "names": [str], "sizes": [int], "source_sizes?": [[int]], "skipped?": [[str]]}  # of a manifest


class DatasetError(ValueError):
    """A data set cannot be used as asked; the message is one sentence that says what to run."""


def is_lmdb(path: Path) -> bool:
    """Whether `path` is an LMDB rather than a folder of images."""
    return path.is_file() or any((path / name).exists() for name in (DATA_FILE, BUILDING_FILE))


def image_key(size: int, index: int) -> bytes:
    """The key of one image; five digits or more."""
    return f"{size}-{index:05d}".encode()


# py-lmdb refuses to open one file twice in a process, so the data sets of a process share what is open. Weak: a store
# closes when its last reader goes. A handle must not be used after a fork, and counts as open there until it is closed.
_open_stores = weakref.WeakValueDictionary()


def _close_inherited() -> None:
    for store in list(_open_stores.values()):
        store.close()
    _open_stores.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def open_store(path: str | os.PathLike) -> lmdb.Environment:
    """Open an LMDB (folder or bare file) for reading, shared within this process. Raises DatasetError for none."""
    path = Path(path)
    file = path if path.is_file() else path / DATA_FILE
    key = os.path.realpath(file)
    if (store := _open_stores.get(key)) is not None:
        return store
    again = f"run {PREPARE} --out {path} ... again"
    if not file.exists():
        state = "is unfinished" if (path / BUILDING_FILE).exists() else f"holds no {DATA_FILE}"
        raise DatasetError(f"{path} {state}: {again}")
    n_bytes = file.stat().st_size
    try:
        store = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        reason = str(error).rpartition(": ")[2] if n_bytes else "it is empty"
        raise DatasetError(f"{file} is not a readable LMDB ({reason}): {again}") from error
    if n_bytes < (expected := used_bytes(store)):
        store.close()
        raise DatasetError(f"{file} is cut short ({n_bytes} of {expected} bytes): copy it again, or {again}")
    _open_stores[key] = store
    return store


def used_bytes(store: lmdb.Environment) -> int:
    """Bytes up to the last page in use. LMDB maps the file: reading beyond its end kills the process with SIGBUS."""
    return (store.info()["last_pgno"] + 1) * store.stat()["psize"]


@contextmanager
def reading(store: lmdb.Environment) -> Iterator[lmdb.Transaction]:
    """A transaction that only reads. Raises DatasetError where the store is damaged."""
    try:
        with store.begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        reason = str(error).rpartition(": ")[2]
        raise DatasetError(f"{store.path()} is damaged ({reason}): run {PREPARE} --overwrite ... again") from error


def read_manifest(store: lmdb.Environment) -> dict | None:
    """The JSON that prepare_data.py wrote about the store; None in one made by another tool."""
    with reading(store) as transaction:
        manifest = transaction.get(b"manifest")
    return manifest and parse_json(manifest, SCHEMA, source=store.path(), what="LMDB of prepare_data.py")


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
