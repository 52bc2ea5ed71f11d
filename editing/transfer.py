"""Attributes of one face given to another by a conditional generator: the same codes and noise, another condition.

    for t, frame in zip(ts, render_path(generator, face, condition_path(face, target, ts))): ...

A face keeps the condition under which its codes were found; what moves it is the difference between the attributes
asked for and its own, so that t = 0 is the inversion itself and t = 1 the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.grids import make_strip
from sampling.render import Noise, render

LEAST = 128  # pixels of a picture in a sheet: smaller ones are enlarged, so that the captions have room


@dataclass(frozen=True)
class Face:
    """An inverted picture."""

    name: str
    code: torch.Tensor  # [L, D]
    noise: Noise  # of this picture alone, [1, 1, r, r] each
    own: torch.Tensor  # [d] in [0, 1], the condition of its codes
    scored: torch.Tensor  # [d], the attributes that the scorer reads in it
    original: np.ndarray | None = None  # uint8 [S, S, 3]


@dataclass(frozen=True)
class Target:
    """Attributes asked for: of a reference face, or numbers."""

    label: str  # in file names
    name: str  # in tables
    values: dict[int, float]  # position of an attribute -> number in [0, 1]
    picture: np.ndarray | None = None


def asked(face: Face, target: Target, ts: Sequence[float]) -> torch.Tensor:
    """Attributes asked for on the way, [K, d]: the face's own at t = 0, those of the target at 1, beyond it above."""
    goal = face.scored.clone()
    for position, value in target.values.items():
        goal[position] = value
    return face.scored + torch.tensor(list(ts), dtype=goal.dtype)[:, None] * (goal - face.scored)


def condition_path(face: Face, target: Target, ts: Sequence[float]) -> torch.Tensor:
    """Conditions [K, d] of the frames at ts."""
    return face.own + asked(face, target, ts) - face.scored


def render_path(generator, face: Face, conditions: torch.Tensor) -> list[np.ndarray]:
    """Frames, uint8 [size, size, 3], of a face under conditions [K, d]."""
    codes = [face.code] * len(conditions)
    return list(render(generator, codes, noise=face.noise, condition=conditions))


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


def transfer_sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]]):
    """Sheet of rows of (picture, caption), one face per column: original, reference, inverted, edited."""
    factor = -(-LEAST // len(rows[0][0][0]))
    cells = [cell for row in rows for cell in row]
    pictures = [picture.repeat(factor, 0).repeat(factor, 1) for picture, _ in cells]
    return make_strip(pictures, [text for _, text in cells], nrow=len(rows[0]))
