"""Files: written whole or not at all, read only where they are regular, JSON only in the shape that is expected.

with atomic_write("report.csv") as file: file.write(b"...")
entries = read_json("alignment.json", {"version": int, "faces": [dict]}, what="alignment.json of align_faces.py")
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError
from common.lock import process_start

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a write, which names no file
MAX_JSON = 256 << 20  # bytes; the alignment.json of 70,000 faces has 60 MB

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(rf"\.tmp-{_HOST}-(\d+)-(\w*)-\d+\b")  # process id and start, number of the call
_count = itertools.count()
_swept: set[Path] = set()  # folders that this process has looked through for what killed ones left


# -- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Binary file that appears under `path` only when the block ends well, complete.

    sync: and on the disk, so that it survives a power cut. See `atomic_path`.
    """
    with atomic_path(path, suffix="", sync=sync) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_path(path: str | os.PathLike, *, suffix: str | None = None, sync: bool = True) -> Iterator[Path]:
    """A temporary path for the block to write to, which takes the name `path` when the block ends well.

    It lies in the same folder (created when absent) under a name of its own for each process and call, so that any
    number may write the same `path`: the last one wins. On any exception it is removed and what was under `path` stays;
    what a killed process left is removed by the next one that writes to the folder. suffix: of the temporary name
    (default: that of `path`). Raises OSError naming `path` (full disk, no permission).
    """
    path = Path(path)
    suffix = path.suffix if suffix is None else suffix
    temporary = path.with_name(f".tmp-{_HOST}-{os.getpid()}-{process_start(os.getpid())}-{next(_count)}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            yield temporary
            os.replace(temporary, path)
            if sync:
                _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except Exception as error:
        cause = _os_error(error)  # torch.save hides ENOSPC behind a RuntimeError of its own
        unnamed = cause is not None and cause.filename is None and cause.errno in DISK_ERRORS
        if not unnamed and getattr(cause, "filename", None) != str(temporary):
            raise
        raise OSError(cause.errno, f"could not be written: {cause.strerror}", str(path)) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError among `error` and the errors it was raised from, else None."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are no more; once per folder and process."""
    if folder in _swept:
        return
    _swept.add(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.match(entry.name)
            if match and process_start(int(match[1])) != match[2]:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; Windows cannot open folders and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -------------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file at `path`, opened for reading. Never waits for a pipe and never reads a device.

    Raises FileNotFoundError (also for a link to nothing, which is named), UserError when it is no regular file.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        if path.is_symlink():
            text = f"is a link to {os.readlink(path)}, which does not exist"
            raise FileNotFoundError(errno.ENOENT, text, str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}: a file is expected")
    return os.fdopen(descriptor, "rb")


def read_json(path: str | os.PathLike, schema, *, what: str, max_bytes: int = MAX_JSON):
    """The value in a JSON file, of the shape `schema` (see `check_shape`); what: the kind of file, for messages.

    Numbers are finite and whole ones have at most 64 bits. Raises FileNotFoundError, or UserError naming the file and
    the first place where it is not what it should be.
    """
    with open_regular(path) as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise UserError(f"{path} is no {what}: it has more than {max_bytes >> 20} MiB")
    return parse_json(text, schema, source=path, what=what)


def parse_json(text: str | bytes, schema, *, source, what: str):
    """`read_json` of a text that stands in another file, `source`."""
    try:
        value = json.loads(text, parse_int=_int64, parse_float=_finite, parse_constant=_finite)
        check_shape(value, schema)
    except RecursionError as error:
        raise UserError(f"{source} is no {what}: it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is no {what}: not JSON ({error})") from error
    except ValueError as error:
        raise UserError(f"{source} is no {what}: {error}") from error
    return value


def check_shape(value, schema, where: str = "") -> None:
    """Raise ValueError, naming the place, unless the JSON `value` has the shape `schema`.

    A schema is a type (float takes whole numbers, int no bool), None, a tuple of alternatives, [schema] for a list of
    such, {name: schema} for an object (a name that ends with "?" may be absent; others are ignored), or {str: schema}
    for an object of such under any names.
    """
    if isinstance(schema, tuple):
        if not any(_fits(value, alternative) for alternative in schema):
            raise ValueError(_mismatch(value, " or ".join(map(_name, schema)), where))
        deeper = [s for s in schema if isinstance(s, (list, dict)) and _fits(value, s)]
        return check_shape(value, deeper[0], where) if deeper else None
    if not _fits(value, schema):
        raise ValueError(_mismatch(value, _name(schema), where))
    if isinstance(schema, list):
        for index, item in enumerate(value):
            check_shape(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, dict) and str in schema:
        for key, item in value.items():
            check_shape(item, schema[str], f"{where}[{key[:40]!r}]")
    elif isinstance(schema, dict):
        for key, expected in schema.items():
            name = key.removesuffix("?")
            inner = f"{where}.{name}" if where else name
            if name in value:
                check_shape(value[name], expected, inner)
            elif not key.endswith("?"):
                raise ValueError(f"`{inner}` is absent")
    return None


def _fits(value, schema) -> bool:
    if schema is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if schema is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if schema is None:
        return value is None
    return isinstance(value, schema if isinstance(schema, type) else type(schema))


_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", list: "a list"}


def _name(schema) -> str:
    if schema is None:
        return "null"
    return _NAMES.get(schema if isinstance(schema, type) else type(schema), "an object")


def _mismatch(value, expected: str, where: str) -> str:
    found = "null" if value is None else _name(type(value))
    return f"{f'`{where}`' if where else 'it'} is {found}, not {expected}"


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value
