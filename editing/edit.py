"""One inverted face along one or several boundaries: latents, frames, and the distance at which a scorer sees a value.

frames = edit_face(generator, face, [boundary], np.linspace(-3, 3, 7) * boundary.std)      # the inversion first
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from editing.boundary import Boundary, BoundaryError, move_along
from editing.evaluate import score_frames
from inversion.tuning import TUNED, load_tuned
from model import Generator
from sampling.render import Source, render, select_condition, select_noise

SCAN = 6  # steps from 0 to the limit, each way, in which a target is looked for before it is bisected
BISECTIONS = 8


@dataclass(frozen=True)
class InvertedFace:
    """A face as a generator holds it. Of a conditional one also condition, the attributes [d] in [0, 1] under which w
    was found, and scored, those that the scorer reads in the image."""

    name: str
    w: np.ndarray | torch.Tensor  # float32 [L, C]
    noise: list[torch.Tensor]  # per layer [1, 1, r, r]
    condition: torch.Tensor | None = None
    scored: torch.Tensor | None = None
    original: np.ndarray | None = None  # uint8 [S, S, 3]
    generator: Generator | None = None  # that draws it, tuned to it or not


def tuned_file(source: Source, i: int) -> Path | None:
    """The weights tuned to the face at position i (projector.py --tune); None where there are none."""
    file = source.folder / TUNED / f"{source.names[i]}.safetensors"
    return file if source.origin["fingerprint"] and file.is_file() else None


def note_tuned(source: Source) -> None:
    """Say on stderr how many faces of saved latents are drawn by a tuned generator."""
    if n := sum(tuned_file(source, i) is not None for i in range(len(source.names))):
        print(f"{source.folder / TUNED}: {n} of {len(source.names)} faces with a tuned generator each", file=sys.stderr)


def face_at(source: Source, i: int, generator: Generator | None = None) -> InvertedFace:
    """The face at position i of saved latents. generator: that of the latents, or one trained from it, which draws the
    face, with the weights tuned to it where there are any. Raises CheckpointError for weights of another generator."""
    (w,) = source.ws([i])
    condition = select_condition(source.condition, [i])
    condition = None if condition is None else condition[0]
    if generator is not None and (file := tuned_file(source, i)):
        generator = load_tuned(file, generator, source.origin["fingerprint"])
    noise = select_noise(source.noise, [i])
    return InvertedFace(source.names[i], w.numpy(), noise, condition, generator=generator)


def edit_w(w, boundaries: Sequence[Boundary], distances, *, distance="relative", layers=None) -> np.ndarray:
    """Latents [K, L, C] of `w` [L, C] moved along several boundaries at once (see `move_along`). distances: [K] along
    the first boundary, or [K, number of boundaries], latent units."""
    w, steps = np.asarray(w, np.float32), np.asarray(distances, np.float64)
    steps = steps[:, None] if steps.ndim == 1 else steps
    if steps.shape[1] != len(boundaries):
        raise BoundaryError(f"{steps.shape[1]} distances per frame for {len(boundaries)} boundaries")
    moved = np.zeros((len(steps), *w.shape), np.float64)
    for boundary, along in zip(boundaries, steps.T, strict=True):
        moved += move_along(w, boundary, along, distance=distance, layers=layers).astype(np.float64) - w
    return (w + moved).astype(np.float32)


def edit_face(generator, face: InvertedFace, boundaries, distances, **how) -> list[np.ndarray]:
    """Frames uint8 [size, size, 3] of a face: its inversion, then one per row of distances (see `edit_w`)."""
    w = np.asarray(face.w, np.float32)[None]
    return draw_face(generator, face, np.concatenate((w, edit_w(face.w, boundaries, distances, **how))))


def draw_face(generator, face: InvertedFace, ws: np.ndarray) -> list[np.ndarray]:
    """Frames uint8 [size, size, 3] of latents [K, L, C] under the noise and the condition of a face."""
    condition = None if face.condition is None else face.condition[None]
    return list(render(generator, torch.from_numpy(ws), noise=face.noise, condition=condition))


def score_along(generator, face: InvertedFace, boundary, scorer, column: int, layers=None) -> Callable:
    """The function distances [K] (relative, latent units) -> what the scorer's `column` sees there, [K]."""

    def score(distances):
        ws = edit_w(face.w, [boundary], distances, layers=layers)
        return score_frames(scorer, draw_face(generator, face, ws))[:, column]

    return score


def nearest_crossing(at: np.ndarray, values: np.ndarray, target: float) -> int | None:
    """k of the interval at[k] to at[k + 1], nearest to 0, in which the values [K] reach the target; None: nowhere."""
    low, high = values[:-1] - target, values[1:] - target
    crossings = np.flatnonzero((low * high <= 0) & (low != high))
    return min(crossings, key=lambda k: abs(at[k] + at[k + 1]), default=None)


def nearest_value(at: np.ndarray, values: np.ndarray, target: float, near: float) -> int:
    """Index of the least |at| whose value comes within `near` of the target, else of the value nearest to it."""
    return int(np.lexsort((np.abs(at), np.maximum(near, np.abs(values - target))))[0])


def search_distance(score: Callable, target: float, *, limit: float, near: float = 0.0) -> tuple[float, float]:
    """Distance at which `score` (distances [K] -> values [K]) is nearest to `target`: (distance, value there).

    Among 2 * SCAN intervals from -limit to +limit, the one nearest to 0 that crosses the target is bisected: far out a
    face may break. Without a crossing: the smallest distance within `near` of the target, else the nearest.
    """
    at = np.linspace(-limit, limit, 2 * SCAN + 1)
    values = np.asarray(score(at), np.float64)
    k = nearest_crossing(at, values, target)
    if k is not None:
        at, values, near = at[k : k + 2], values[k : k + 2], 0.0
        low, high = at
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            (value,) = score(np.array([middle]))
            at, values = np.append(at, middle), np.append(values, value)
            low, high = (low, middle) if (values[0] - target) * (value - target) <= 0 else (middle, high)
    best = nearest_value(at, values, target, near)
    return float(at[best]), float(values[best])
