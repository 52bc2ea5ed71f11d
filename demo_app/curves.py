"""Curves of one attribute of a face: what a photo shows, read at positions of an edit, and where it shows a goal."""

import numpy as np

from editing.edit import nearest_crossing, nearest_value

FINE = 10  # positions per one that was read, by straight lines between them
PERSON = 0.65  # least identity of a face after an edit of the whole head; below, large edits break faces (docs/log.md)


def cut_curve(positions: np.ndarray, values: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve ([K] each) from its start to where identity `same` falls below PERSON, with FINE positions
    per given one, by straight lines."""
    fine = np.arange(FINE * (len(positions) - 1) + 1) / FINE
    positions, values, same = (np.interp(fine, range(len(positions)), x) for x in (positions, values, same))
    kept = np.cumprod(same >= PERSON, dtype=bool)
    kept[0] = True
    return positions[kept], values[kept]


def position_for(positions: np.ndarray, values: np.ndarray, goal: float, near: float) -> float:
    """Position at which `values` (read at `positions`, [K]) reach a goal: on the crossing nearest to 0, by straight
    lines; else the least of those within `near`, else that which comes nearest."""
    k = nearest_crossing(positions, values, goal)
    if k is None:
        return float(positions[nearest_value(positions, values, goal, near)])
    share = (goal - values[k]) / (values[k + 1] - values[k])
    return float(positions[k] + share * (positions[k + 1] - positions[k]))
