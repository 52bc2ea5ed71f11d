"""Strict readers of array files: sizes are checked before memory is taken, nothing is unpickled, and whatever is wrong
becomes one ValueError that names the file."""

import os
import zipfile
from contextlib import contextmanager

import numpy as np

from common.checkpoint import require_file

EXPANSION = 200  # an archive may hold at most this many times its own size (deflate itself reaches 1,000 on zeros)


def read_npy(path, what: str = ".npy file") -> np.ndarray:
    """The array of a `.npy` file. Raises FileNotFoundError, or ValueError for anything but one whole, plain array."""
    with _open(path, what, ".npy") as file:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or file.read(1):
            raise ValueError("it holds more than one array")
        return array


def read_npz(path, what: str = ".npz file") -> dict[str, np.ndarray]:
    """{name: array} of a `.npz` file. Raises as `read_npy`, also for one that unpacks to far more than its size."""
    with _open(path, what, ".npz") as file:
        n_bytes = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
        if n_bytes > EXPANSION * os.path.getsize(path) + 2**20:
            raise ValueError("it unpacks to far more than its own size")
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        return {name: np.asarray(arrays[name]) for name in arrays.files}


@contextmanager
def _open(path, what: str, suffix: str):
    with open(require_file(path, what), "rb") as file:
        try:
            yield file
        except Exception as error:  # numpy, zipfile and zlib raise a dozen types for damaged content
            raise ValueError(f"{path} is truncated, damaged or not a {suffix} file ({error})") from error


def require_floats(array: np.ndarray, source) -> np.ndarray:
    """The array as float32. Raises ValueError when it holds other things than numbers, or any that is not finite."""
    if array.dtype.kind != "f":
        raise ValueError(f"{source} holds {array.dtype}; expected floating-point numbers")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{source} has values that are not finite")
    return array
