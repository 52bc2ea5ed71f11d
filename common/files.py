"""Files: written whole or not at all, read only where they are regular, JSON only in the shape that is expected.

with atomic_write("report.csv") as file: file.write(b"...")
entries = read_json("alignment.json", {"version": int, "faces": [dict]}, what="alignment.json of align_faces.py")
"""

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

NAME_LENGTH = 120  # characters; with suffix and numbers a name stays below the 255 bytes that file systems take
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(rf"\.tmp-{_HOST}-(\d+)-(\w*)-\d+\b")  # process id and start, number of the call
_count = itertools.count()
_swept: set[Path] = set()  # folders in which this process has removed what killed ones left


@contextmanager
def atomic_write(path: str | os.PathLike, *, sync: bool = True) -> Iterator[BinaryIO]:
    """`atomic_path` as a binary file; sync: on the disk when the block ends, so that it survives a power cut."""
    with atomic_path(path, suffix="", sync=sync) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str, encoding: str = "utf-8", errors: str = "strict") -> None:
    """Write `text`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode(encoding, errors))


@contextmanager
def atomic_path(path: str | os.PathLike, *, suffix: str | None = None, sync: bool = True) -> Iterator[Path]:
    """A temporary path for the block to write to, renamed to `path` when the block ends. It lies in the same folder
    (created when absent) under a unique name: of several writers the last wins. On an exception it is removed and
    `path` stays as it was; what a killed process left is removed by the next writer."""
    path = Path(path)
    suffix = path.suffix if suffix is None else suffix
    temporary = path.with_name(f".tmp-{_HOST}-{os.getpid()}-{process_start(os.getpid())}-{next(_count)}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            yield temporary
            os.replace(temporary, path)
            if sync and os.name != "nt":  # Windows cannot open folders and needs no such call
                descriptor = os.open(path.parent, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except Exception as error:
        cause = error  # torch.save hides ENOSPC behind a RuntimeError of its own
        while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
            cause = cause.__cause__ or cause.__context__
        unnamed = cause is not None and cause.filename is None and cause.errno in DISK_ERRORS
        if not unnamed and getattr(cause, "filename", None) != str(temporary):
            raise
        raise OSError(cause.errno, f"could not be written: {cause.strerror}", str(path)) from error


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are no more; once per folder and process."""
    if folder in _swept:
        return
    _swept.add(folder)
    for name in os.listdir(folder):
        match = _TEMPORARY.match(name)
        if match and process_start(int(match[1])) != match[2]:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file at `path`, opened for reading; no pipe, no device. Raises FileNotFoundError, or UserError."""
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


def read_json(path: str | os.PathLike, schema, *, what: str):
    """The value in a JSON file, of the shape `schema` (see `check_shape`), its numbers finite, whole ones of at most 64
    bits; what: the kind of file. Raises FileNotFoundError, or UserError naming the file and the first wrong place."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise UserError(f"{path} is no {what}: it has more than {MAX_JSON >> 20} MiB")
    return parse_json(text, schema, source=path, what=what)


def parse_json(text: str | bytes, schema, *, source, what: str):
    """`read_json` of a text that stands in another file, `source`."""
    try:
        value = json.loads(text, parse_int=_int64, parse_float=_finite, parse_constant=_finite)
        check_shape(value, schema)
    except RecursionError as error:
        raise UserError(f"{source} is no {what}: it is nested too deeply") from error
    except ValueError as error:
        reason = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{source} is no {what}: {reason}") from error
    return value


def check_shape(value, schema, where: str = "") -> None:
    """Raise ValueError, naming the place, unless the JSON `value` has the shape `schema`: a type (float takes whole
    numbers, int no bool), None, a tuple of alternatives, [schema] for a list of such, {name: schema} for an object (a
    name that ends with "?" may be absent; others are ignored), {str: schema} for an object of such under any names."""
    alternatives = schema if isinstance(schema, tuple) else (schema,)
    fitting = [alternative for alternative in alternatives if _fits(value, alternative)]
    if not fitting:
        found = "null" if value is None else _name(type(value))
        raise ValueError(f"{f'`{where}`' if where else 'it'} is {found}, not {' or '.join(map(_name, alternatives))}")
    schema = next((s for s in fitting if isinstance(s, (list, dict))), None)
    if isinstance(schema, list):
        for index, item in enumerate(value):
            check_shape(item, schema[0], f"{where}[{index}]")
    elif schema and str in schema:
        for key, item in value.items():
            check_shape(item, schema[str], f"{where}[{key[:40]!r}]")
    elif schema:
        for key, expected in schema.items():
            name = key.removesuffix("?")
            inner = f"{where}.{name}" if where else name
            if name in value:
                check_shape(value[name], expected, inner)
            elif name == key:
                raise ValueError(f"`{inner}` is absent")


def _fits(value, schema) -> bool:
    if schema is None:
        return value is None
    schema = schema if isinstance(schema, type) else type(schema)
    if schema in (int, float):
        return isinstance(value, (int, schema)) and not isinstance(value, bool)
    return isinstance(value, schema)


_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", list: "a list", None: "null"}


def _name(schema) -> str:
    return _NAMES.get(schema if schema is None or isinstance(schema, type) else type(schema), "an object")


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def safe_name(text: str) -> str:
    """`text` as one part of a path: no separators, control characters or leading dots, never empty, not too long."""
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]', "_", str(text)).strip().lstrip(".").rstrip(". ")
    while len(name.encode()) > 2 * NAME_LENGTH or len(name) > NAME_LENGTH:
        name = name[:-1]
    if not name.strip("_"):
        return "unnamed"
    return f"_{name}" if RESERVED.fullmatch(name) else name


def safe_path(text: str, fallback: str = "unnamed") -> str:
    """`text` as a relative path of safe names: its folders stay, but it never leads upwards."""
    parts = [safe_name(part) for part in re.split(r"[/\\]", str(text)) if part.strip() not in ("", ".", "..")]
    return "/".join(parts) or fallback
