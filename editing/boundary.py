"""Boundaries in latent space: the direction along which an attribute grows, kept in a file, moved along.

InterFaceGAN (Shen et al. 2020, arXiv 2005.09635): a hyperplane separates samples that have an attribute from those that
do not, and latents move along its normal.
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from common.arrays import read_npy, read_npz, require_floats
from common.checkpoint import require_file
from common.files import atomic_write, parse_json
from common.workers import blocks

BLOCK = 4096  # latents in memory at a time
# The text `boundary` of a file: name -> type (common/files.py).
SCHEMA = {"intercept": float, "attribute": str, "space": (str, None), "mean": float, "std": (float, None)}
SCHEMA |= {"fit?": str, "ratio?": float, "n_samples?": int, "truncation?": float, "size?": (int, None)}
SCHEMA |= {"accuracies?": {str: (float, None)}, "orthogonal_to?": [str], "given?": [str], "fingerprint?": (str, None)}


class BoundaryError(ValueError):
    """A boundary cannot be fitted, read or applied; the message is one sentence."""


@dataclass(frozen=True)
class Boundary:
    """A unit normal in a latent space, and its metadata."""

    normal: np.ndarray  # float32 [1, D], D = 512 for w (and w+, layer by layer) or L * 512 for w++
    intercept: float  # the hyperplane is normal . x + intercept = 0
    attribute: str
    space: str | None
    mean: float  # of normal . x over the samples it was fitted on
    std: float | None  # its deviation, a unit of distances; None for a bare direction
    fit: str = "ridge"
    ratio: float = 0.02
    n_samples: int = 0
    accuracies: dict = field(default_factory=dict)  # train, validation and remaining, each 0..1 or None
    given: list = field(default_factory=list)  # attributes that were held fixed in the fit
    orthogonal_to: list = field(default_factory=list)  # attributes whose directions were projected out
    truncation: float = 1.0
    fingerprint: str | None = None
    size: int | None = None
    range: tuple[float, float] | None = None  # lowest and highest distance at which edits still are faces, in std

    def measured_on(self, latents) -> "Boundary":
        """The boundary with mean and std of latents [N, D] (see `project_all`), and the hyperplane at their median."""
        along = project_all(latents, self.normal[0])
        statistics = {"mean": float(along.mean()), "std": float(along.std()), "intercept": -float(np.median(along))}
        return replace(self, **statistics, accuracies={})

    def save(self, path) -> Path:
        """Write `.npz`. Raises OSError naming the file."""
        info = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("normal", "range")}
        arrays = {"normal": self.normal, "boundary": json.dumps(info, ensure_ascii=False)}
        if self.range is not None:
            arrays["range"] = np.array(self.range, np.float32)
        with atomic_write(path) as file:
            np.savez(file, **arrays)
        return Path(path)


def load_boundary(path, *, space=None, width=None, fingerprint=None) -> Boundary:
    """Read a boundary; space, width (of its normal) and fingerprint (of the generator) are checked where given.

    A `.npy` or `.pt` is a bare direction [1, D] or [D], such as those InterFaceGAN publishes: it has the name of its
    file, goes through the origin, and has no std. Raises FileNotFoundError, or BoundaryError for another file or use.
    """
    path = Path(path)
    require_file(path, "boundary")
    try:
        boundary = _read_direction(path) if path.suffix in (".npy", ".pt") else _read_boundary(path)
    except ValueError as error:
        raise BoundaryError(f"{path} is no boundary of edit_attribute.py: {error}") from error
    actual = {"space": boundary.space, "generator": boundary.fingerprint, "width": boundary.normal.shape[1]}
    for what, expected in {"space": space, "generator": fingerprint, "width": width}.items():
        if None not in (expected, actual[what]) and actual[what] != expected:
            raise BoundaryError(f"{path} is a boundary of {what} {actual[what]}, expected {expected}")
    return boundary


def boundary_of(path, generator) -> Boundary:
    """A boundary for this generator. Raises as `load_boundary`."""
    config = generator.config
    width = config.style_dim * (1 if config.w_space else config.n_tokens)
    return load_boundary(path, space=config.space, width=width, fingerprint=generator.fingerprint)


def _read_boundary(path) -> Boundary:
    arrays = read_npz(path, "boundary")
    if not {"normal", "boundary"} <= set(arrays):
        raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'nothing'}; expected normal and boundary")
    normal = require_floats(arrays["normal"], "its normal")
    if normal.ndim != 2 or len(normal) != 1 or abs(np.linalg.norm(normal) - 1) > 1e-3:
        raise ValueError(f"its normal has shape {list(normal.shape)} or is not of length 1")
    info = parse_json(str(arrays["boundary"]), SCHEMA, source="its text", what="description of a boundary")
    if "range" in arrays:
        info["range"] = tuple(require_floats(arrays["range"], "its range").ravel().tolist())
        if len(info["range"]) != 2:
            raise ValueError(f"its range has {len(info['range'])} numbers")
        if not info["range"][0] <= 0 <= info["range"][1]:
            raise ValueError("its range goes from {:g} to {:g}; expected it about 0".format(*info["range"]))
    if info["std"] is not None and info["std"] <= 0:
        raise ValueError(f"its standard deviation is {info['std']:g}")
    known = {f.name for f in fields(Boundary)}
    return Boundary(normal=normal, **{name: value for name, value in info.items() if name in known})


def _read_direction(path) -> Boundary:
    if path.suffix == ".npy":
        array = read_npy(path, "boundary")
    else:
        try:
            array = torch.load(path, map_location="cpu", weights_only=True).detach().numpy()
        except Exception as error:  # a damaged pickle can raise anything at all
            raise ValueError(f"it holds no single tensor ({type(error).__name__})") from error
    normal = require_floats(array, "it")
    if normal.size == 0 or normal.shape not in ((normal.size,), (1, normal.size)):
        raise ValueError(f"it holds numbers of shape {list(normal.shape)}; a direction is [D] or [1, D]")
    length = float(np.linalg.norm(normal.astype(np.float64)))
    if not 0 < length < float("inf"):
        raise ValueError(f"its direction has the length {length:g}")
    name = path.stem.removeprefix("boundary-")
    return Boundary(normal.reshape(1, -1) / np.float32(length), 0.0, name, None, 0.0, None, fit="")


def project_all(latents, normal) -> np.ndarray:
    """normal . x, [N], of latents [N, D]: an array, or what gives rows when indexed by an array of them."""
    rows = map(np.array, blocks(range(len(latents)), BLOCK))
    return np.concatenate([np.asarray(latents[r]) @ normal for r in rows])


def orthogonalise(boundary: Boundary, others, latents) -> Boundary:
    """The boundary with the directions of other boundaries projected out, so that moving leaves those attributes; mean,
    std and median are those of latents [N, D]. Raises BoundaryError when nothing is left, or the shapes differ."""
    for other in others:
        if other.normal.shape != boundary.normal.shape or {other.space, boundary.space} - {None, boundary.space}:
            found, expected = (f"{b.attribute} is of space {b.space} {list(b.normal.shape)}" for b in (other, boundary))
            raise BoundaryError(f"boundary {found}, {expected}")
    normals = np.concatenate([other.normal for other in others]).astype(np.float64)  # [K, D]
    _, scale, basis = np.linalg.svd(normals, full_matrices=False)
    basis = basis[scale > 1e-6]  # [rank, D], orthonormal
    normal = boundary.normal[0].astype(np.float64)
    rest = normal - basis.T @ (basis @ normal)
    length, names = np.linalg.norm(rest), [other.attribute for other in others]
    if length < 1e-3:
        raise BoundaryError(f"nothing of the boundary {boundary.attribute} is left beside {', '.join(names)}")
    normal = (rest / length).astype(np.float32)[None]
    return replace(boundary, normal=normal, orthogonal_to=names, range=None).measured_on(latents)


def move_along(w, boundary: Boundary, distances, *, distance="relative", layers=None) -> np.ndarray:
    """Latents along the normal: w [L, 512], distances [K] -> float32 [K, L, 512]; a 512-wide normal moves all layers.

    distance "relative": the distance is added. "absolute" (InterFaceGAN's `linear_interpolate`): the projection on the
    normal (W, W++; of the layers that move) *becomes* the distance; to W+, a vector per layer, it is added.
    """
    w = np.asarray(w, np.float32)
    n_layers, width = w.shape
    steps = np.asarray(distances, np.float64)
    moving = np.zeros((n_layers, 1))
    moving[list(range(n_layers) if layers is None else layers)] = 1
    if boundary.normal.size not in (width, w.size):
        numbers = boundary.normal.shape[1]
        raise BoundaryError(f"boundary {boundary.attribute} has {numbers} numbers, the latent {n_layers} x {width}")
    if distance not in ("relative", "absolute"):
        raise BoundaryError(f"--distance {distance}: expected absolute or relative")
    normal = boundary.normal.reshape(-1, width).astype(np.float64)  # [1 or L, 512]
    direction = np.broadcast_to(normal, w.shape) * moving  # [L, 512]
    if distance == "absolute" and len(normal) > 1:
        steps = (steps - (w * direction).sum()) / max(np.square(direction).sum(), 1e-12)
    elif distance == "absolute" and (w == w[:1]).all():
        steps = steps - w[0] @ normal[0]
    return (w + steps[:, None, None] * direction).astype(np.float32)
