"""Strict readers of array files (.npy, .npz) from anywhere: sizes are checked before memory is taken, nothing is
unpickled, and whatever is wrong becomes one ValueError that names the file."""

import math
import os
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np

from common.checkpoint import require_file

EXPANSION = 200  # an archive may hold at most this many times its own size (deflate itself reaches 1,000 on zeros)
# What numpy and zipfile raise for damaged content.
DAMAGE = (ValueError, TypeError, EOFError, KeyError, OSError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npy(path, what: str = ".npy file") -> np.ndarray:
    """The array of a `.npy` file. Raises FileNotFoundError, or ValueError for anything but one whole, plain array."""
    with _open(path, what, ".npy") as file:
        return _read_array(file, os.path.getsize(path))


def read_npz(path, what: str = ".npz file") -> dict[str, np.ndarray]:
    """{name: array} of a `.npz` file. Raises as `read_npy`, also for one that unpacks to far more than its size."""
    with _open(path, what, ".npz") as file:
        archive = zipfile.ZipFile(file)
        if sum(member.file_size for member in archive.infolist()) > EXPANSION * os.path.getsize(path) + 2**20:
            raise ValueError("it unpacks to far more than its own size")
        arrays = {}
        for member in archive.infolist():
            with archive.open(member) as stream:
                arrays[member.filename.removesuffix(".npy")] = _read_array(stream, member.file_size)
        return arrays


@contextmanager
def _open(path, what: str, suffix: str):
    with open(require_file(path, what), "rb") as file:
        try:
            yield file
        except DAMAGE as error:
            raise ValueError(f"{path} is truncated, damaged or not a {suffix} file ({error})") from error


def _read_array(stream, n_bytes: int) -> np.ndarray:
    """One array of the .npy format, `n_bytes` long with its header."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
    shape, fortran, dtype = read_header(stream)
    expected, found = math.prod(shape) * dtype.itemsize, n_bytes - stream.tell()
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError("it holds Python objects, not numbers")
    if expected != found:
        raise ValueError(f"its header announces {expected:,} bytes, {found:,} follow")
    data = bytearray(expected)
    if stream.readinto(data) != expected:  # of a zip, this compares its checksum as well
        raise EOFError("it is cut short")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def require_floats(array: np.ndarray, source) -> np.ndarray:
    """The array as float32. Raises ValueError when it holds other things than numbers, or any that is not finite."""
    if array.dtype.kind != "f":
        raise ValueError(f"{source} holds {array.dtype}; expected floating-point numbers")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{source} has values that are not finite")
    return array
