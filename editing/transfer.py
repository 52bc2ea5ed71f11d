"""Attributes of one face given to another by a conditional generator: the same latent and noise, another condition.

    for t, frame in zip(ts, render_path(generator, face, condition_path(face, target, ts))): ...

A face keeps the condition under which its latent was found; what moves it is the difference between the target
attributes and its own, so that t = 0 is the inversion itself and t = 1 the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.grids import make_strip
from editing.edit import InvertedFace, render_codes

LEAST = 128  # pixels of an image in a grid: smaller ones are enlarged, so that the captions have room


@dataclass(frozen=True)
class Target:
    """Target attributes: of a reference face, or numbers."""

    label: str  # in file names
    name: str  # in tables
    values: dict[int, float]  # position of an attribute -> number in [0, 1]
    image: np.ndarray | None = None


def target_path(face: InvertedFace, target: Target, ts: Sequence[float]) -> torch.Tensor:
    """Target attributes on the path, [K, d]: the face's own at t = 0, those of the target at 1, beyond it above."""
    goal = face.scored.clone()
    for position, value in target.values.items():
        goal[position] = value
    return face.scored + torch.tensor(list(ts), dtype=goal.dtype)[:, None] * (goal - face.scored)


def condition_path(face: InvertedFace, target: Target, ts: Sequence[float]) -> torch.Tensor:
    """Conditions [K, d] of the frames at ts."""
    return face.condition + target_path(face, target, ts) - face.scored


def render_path(generator, face: InvertedFace, conditions: torch.Tensor) -> list[np.ndarray]:
    """Frames, uint8 [size, size, 3], of a face under conditions [K, d]."""
    ws = torch.as_tensor(face.w).expand(len(conditions), -1, -1)
    return list(render_codes(generator, ws, face.noise, condition=conditions))


def pair_up(n: int, targets: Sequence[Target], paired: bool) -> list[tuple[int, Target]]:
    """(face, target) for each of n faces with each target; paired: the first with the first, and so on.

    Raises ValueError when there are not as many of both.
    """
    if not paired:
        return [(i, target) for target in targets for i in range(n)]
    if len(targets) != n:
        raise ValueError(f"--paired needs as many references as sources, found {len(targets)} and {n}")
    return list(zip(range(n), targets, strict=True))


def caption(values: Sequence[float], names: Sequence[str], kinds: Sequence[str]) -> str:
    """'smile 0.93', or of several attributes '0.93 0.98 34'."""
    numbers = [f"{v:.0f}" if kind == "years" else f"{v:.2f}" for v, kind in zip(values, kinds, strict=True)]
    return f"{names[0]} {numbers[0]}" if len(numbers) == 1 else " ".join(numbers)


def transfer_grid(rows: Sequence[Sequence[tuple[np.ndarray, str]]]):
    """Grid of rows of (image, caption), one face per column: original, reference, inverted, edited."""
    factor = -(-LEAST // len(rows[0][0][0]))
    cells = [cell for row in rows for cell in row]
    images = [image.repeat(factor, 0).repeat(factor, 1) for image, _ in cells]
    return make_strip(images, [text for _, text in cells], nrow=len(rows[0]))
