"""Goals for the attributes of a face, and what is read of them before and after an edit.

Target(15, relative=True).goal(before=31, kind="years")                                                   # 46.0
position_for(positions, values, goal=46, near=1)                          # where along an edit the goal is reached
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEAR = {"years": 1.0, "probability": 0.08}  # a reading as near as this to its goal has arrived
EDGE = 0.03  # probabilities nearer than this to 0 or 1 are not asked for
VISIBLE = 0.25  # of the asked change: less than this in the photo is no visible effect


@dataclass(frozen=True)
class Target:
    """Goal for an attribute: years, or a probability from 0 to 1; relative: change from what the photo shows."""

    value: float
    relative: bool = False

    def goal(self, before: float, kind: str) -> float:
        """The reading to reach, of an attribute whose reading is `before`."""
        goal = before + self.value if self.relative else self.value
        return float(max(goal, 0) if kind == "years" else np.clip(goal, EDGE, 1 - EDGE))


@dataclass(frozen=True)
class Reading:
    """An attribute of one face: in the photo before, its goal, in the drawn face and in the photo after the edit."""

    before: float
    goal: float
    drawn: float
    photo: float
    kind: str

    @property
    def arrived(self) -> bool:
        return abs(self.photo - self.goal) <= 1.5 * NEAR.get(self.kind, 0.1) or self._signed(self.photo) > 1

    @property
    def visible(self) -> bool:
        """False when the photo shows less than a quarter of a change that was asked for."""
        asked_little = abs(self.goal - self.before) <= NEAR.get(self.kind, 0.1)
        return asked_little or self._signed(self.photo) >= VISIBLE

    def _signed(self, value: float) -> float:
        """Share of the asked change at a value."""
        change = self.goal - self.before
        return (value - self.before) / change if change else 1.0


def open_error(error: float, goal: float, before: float, kind: str) -> float:
    """0 for a probability beyond its goal: more of a smile than was asked for is no error."""
    beyond = kind == "probability" and min(goal, 1 - goal) <= 0.1 and error * (goal - before) < 0
    return 0.0 if beyond else error


def position_for(positions: np.ndarray, values: np.ndarray, goal: float, near: float) -> float:
    """Position at which `values` (read at `positions`, [K]) reach a goal: on the crossing nearest to 0, by straight
    lines; else the least of the positions that come within `near`, else that which comes nearest."""
    gaps = np.abs(values - goal)
    crossings = np.flatnonzero((values[:-1] - goal) * (values[1:] - goal) < 0)
    if len(crossings):
        k = min(crossings, key=lambda k: abs(positions[k] + positions[k + 1]))
        share = (goal - values[k]) / (values[k + 1] - values[k])
        return float(positions[k] + share * (positions[k + 1] - positions[k]))
    return float(positions[np.lexsort((np.abs(positions), np.maximum(near, gaps)))[0]])
