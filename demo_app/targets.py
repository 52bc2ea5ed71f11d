"""Targets for the attributes of a face, and the readings before and after an edit."""

import argparse
from dataclasses import dataclass

FLAGS = {"age": "age", "gender": "gender", "smile": "smile", "eyeglasses": "glasses", "mouth_open": "mouth_open"}
NEAR = {"years": 1.0, "probability": 0.08}  # tolerance: a reading this near to its goal has reached it
EDGE = 0.1  # a goal keeps this far from probability 0 and 1, unless a face is there: further out faces get worse
VISIBLE = {"years": 4.0, "probability": 0.2}  # a reading that moved this far, or by a quarter of the change, is visible


@dataclass(frozen=True)
class Target:
    """Target of an attribute: years, or a probability from 0 to 1; relative: change from what the photo shows."""

    value: float
    relative: bool = False

    def goal(self, before: float, kind: str) -> float:
        """The reading to reach, of an attribute whose reading is `before`."""
        goal = before + self.value if self.relative else self.value
        return float(max(goal, 0) if kind == "years" else min(max(goal, min(EDGE, before)), max(1 - EDGE, before)))


def parse_years(text: str) -> Target:
    """'60' -> a goal; '+15', '-10' -> a change. Raises ArgumentTypeError."""
    return _parse(text, 200, "years such as 60, or a change such as +15 or -10")


def parse_share(text: str) -> Target:
    """'1' -> a goal; '+0.5', '-0.5' -> a change. Raises ArgumentTypeError."""
    return _parse(text, 1, "a number from 0 to 1, or a change such as +0.5")


def parse_gender(text: str) -> Target:
    known = {"female": 0.0, "woman": 0.0, "male": 1.0, "man": 1.0}
    if text.strip().lower() in known:
        return Target(known[text.strip().lower()])
    return _parse(text, 1, "female, male, or a number from 0 (female) to 1 (male)")


def _parse(text: str, most: float, expected: str) -> Target:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text[:20]!r}")
    return Target(value, relative=text.strip()[0] in "+-")


def shows(before: float, goal: float, photo: float, kind: str) -> bool:
    """False when the reading `photo` has moved too little from `before` towards `goal` to be seen."""
    change = abs(goal - before)
    moved = (photo - before) * (1 if goal > before else -1)
    return change <= NEAR[kind] or moved >= min(change / 4, VISIBLE[kind])


def open_error(error: float, goal: float, kind: str) -> float:
    """0 for a probability beyond a goal near 0 or 1: more of a smile than the goal is no error."""
    beyond = kind == "probability" and (error < 0 if goal >= 1 - EDGE else error > 0 and goal <= EDGE)
    return 0.0 if beyond else error


@dataclass(frozen=True)
class Reading:
    """Attribute of a face: in the photo before, the goal, in the drawn face and in the photo after the edit."""

    before: float
    goal: float
    drawn: float
    photo: float
    kind: str

    @property
    def visible(self) -> bool:
        return shows(self.before, self.goal, self.photo, self.kind)

    def describe(self) -> str:
        """'31 -> 46, target 46 (48 in the drawn face)', with a remark where the photo shows no effect."""
        digits = 0 if self.kind == "years" else 2
        text = f"{self.before:.{digits}f} -> {self.photo:.{digits}f}, target {self.goal:.{digits}f}"
        return f"{text} ({self.drawn:.{digits}f} in the drawn face)" + ("" if self.visible else ": no visible effect")
