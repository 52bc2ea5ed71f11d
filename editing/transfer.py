"""Attributes of one face given to another by a conditional generator: the same latent and noise, another condition.

    for t, frame in zip(ts, render_path(generator, face, condition_path(face, target, ts))): ...

A face keeps the condition under which its latent was found; what moves it is the difference between the target
attributes and its own, so that t = 0 is the inversion itself and t = 1 the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.files import safe_name
from common.grids import make_strip
from common.images import read_image, save_image
from editing.attributes import Condition, ConditionScorer
from editing.edit import InvertedFace, face_at, render_ws
from editing.evaluate import evaluate, score_frames
from editing.sweep import save_frames
from inversion.report import ORIGINALS

LEAST = 128  # pixels of an image in a grid: smaller ones are enlarged, so that the captions have room
PER_GRID = 8  # columns
KINDS = ("original", "reference", "inverted", "edited")  # rows of a grid


@dataclass(frozen=True)
class Target:
    """Target attributes: of a reference face, or numbers."""

    label: str  # in file names
    name: str  # in tables
    values: dict[int, float]  # position of an attribute -> number in [0, 1]
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Column:
    """One column of a grid: files and captions per kind of image; a reference's image is its target's."""

    files: dict[str, Path]
    captions: dict[str, str]


# -- faces and targets ---------------------------------------------------------------------------------------------


def read_targets(images, reader: ConditionScorer, chosen: Sequence[int] | None, device) -> list[Target]:
    """A target per reference: its attributes at the positions `chosen` (default all)."""
    targets, labels = [], set()
    for i, name in enumerate(images.names):
        image = images.read(i)  # uint8 [3, S, S]
        values = reader.read(image[None].to(device).float() / 127.5 - 1)[0].tolist()
        values = {k: values[k] for k in (range(len(values)) if chosen is None else chosen)}
        label = f"as_{safe_name(Path(name).stem)}"
        label = f"{label}_{i}" if label in labels else label
        labels.add(label)
        targets.append(Target(label, name, values, image.permute(1, 2, 0).numpy()))
    return targets


def original_file(folder: Path, name: str, i: int) -> Path:
    """Where an inversion keeps its original: under its name, or, of earlier runs, its number."""
    named = folder / ORIGINALS / f"{name}.png"
    return named if named.is_file() else folder / f"origin_{i}.png"


def read_face(generator, reader: ConditionScorer, source, i: int, folder: Path, start: str) -> InvertedFace:
    """A face of saved latents. One without recorded attributes was found under the neutral 0.5."""
    face = face_at(source, i)
    condition = torch.full((len(reader.names),), 0.5) if face.condition is None else face.condition
    path, scored = original_file(folder, face.name, i), condition
    original = np.asarray(read_image(path)) if path.is_file() else None
    if face.condition is None or start == "inversion":
        frames = render_path(generator, face, condition[None])
        scored = reader.to_unit(torch.from_numpy(score_frames(reader.scorer, frames)))[0]
    return replace(face, condition=condition, scored=scored, original=original)


def pair_up(n: int, targets: Sequence[Target], paired: bool) -> list[tuple[int, Target]]:
    """(face, target) for each of n faces with each target; paired: the first with the first, and so on.

    Raises ValueError when there are not as many of both.
    """
    if not paired:
        return [(i, target) for target in targets for i in range(n)]
    if len(targets) != n:
        raise ValueError(f"--paired needs as many references as sources, found {len(targets)} and {n}")
    return list(enumerate(targets))


# -- frames --------------------------------------------------------------------------------------------------------


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
    return list(render_ws(generator, ws, face.noise, condition=conditions))


# -- results -------------------------------------------------------------------------------------------------------


def frame_names(face: InvertedFace, target: Target, ts) -> list[str]:
    return [f"{face.name}_{target.label}_{t:.3g}" for t in ts]


def table_rows(face, i: int, target: Target, ts, frames, known: Condition, scorers, identity) -> list[dict]:
    """Rows of edits.csv, one per frame: target attributes, what each of the scorers {kind: scorer} reads, measures."""
    result = evaluate(frames, scorers["read"], identity)
    values = {"asked": target_path(face, target, ts).numpy() * np.array(known.units)}  # the published column name
    for kind, scorer in scorers.items():
        values[kind] = columns_of(scorer, score_frames(scorer, frames), known.attributes)
    rows = []
    for j, (t, name) in enumerate(zip(ts, frame_names(face, target, ts), strict=True)):
        row = {"image": face.name, "origin": i, "target": target.name, "t": round(float(t), 4), "frame": f"{name}.png"}
        for kind, table in values.items():
            row |= {f"{kind}_{n}": round(float(v), 4) for n, v in zip(known.attributes, table[j], strict=True)}
        row["identity"] = "" if result.identity is None else round(float(result.identity[j]), 4)
        rows.append(row | {"change": round(float(result.change[j]), 4)})
    return rows


def columns_of(scorer, scores: np.ndarray, names) -> np.ndarray:
    """Scores [K, A] of a scorer -> the columns of these attributes."""
    return scores[:, [scorer.column(name) for name in names]]


def save_edit(folder: Path, face, target: Target, ts, frames, known: Condition, scorer, single: bool) -> Column:
    """Frames, and with more than two a strip; single: the ends also under the face's name. Returns their column."""
    chosen = sorted(target.values)
    attributes, kinds = [known.attributes[k] for k in chosen], [known.kinds[k] for k in chosen]

    def read(images):
        scores = columns_of(scorer, score_frames(scorer, images), attributes)
        return [caption(row, attributes, kinds) for row in scores]

    names, words = frame_names(face, target, ts), read(frames)
    save_frames(folder, face.name, dict(zip(names, frames, strict=True)), (frames[0], frames[-1]) if single else ())
    if len(frames) > 2:
        strip = transfer_grid([list(zip(frames, words, strict=True))])
        save_image(strip, folder / "strips" / f"{face.name}_{target.label}.png")
    files = {"inverted": folder / "frames" / f"{names[0]}.png", "edited": folder / "frames" / f"{names[-1]}.png"}
    others = {"original": face.original, "reference": target.image}
    captions = {kind: read([image])[0] for kind, image in others.items() if image is not None}
    return Column(files, captions | {"inverted": words[0], "edited": words[-1]})


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


def write_grids(folder: Path, columns: list[tuple[Target, Column]], paired: bool) -> None:
    """Grids of at most PER_GRID faces: one after the other for each target, or for all when paired. Images are read
    again, no more at a time than one grid shows."""
    groups: dict[str, list] = {}
    for target, column in columns:
        groups.setdefault("paired" if paired else target.label, []).append((target, column))

    def cell(kind, target, column):
        image = target.image if kind == "reference" else np.asarray(read_image(column.files[kind]))
        return image, column.captions[kind]

    for label, group in groups.items():
        kinds = [kind for kind in KINDS if all(kind in column.captions for _, column in group)]
        for start in range(0, len(group), PER_GRID):
            rows = [[cell(kind, *pair) for pair in group[start : start + PER_GRID]] for kind in kinds]
            save_image(transfer_grid(rows), folder / f"{label}_{start // PER_GRID:03d}.png")


def summarise(rows: list[dict], names) -> str:
    """Mean distance to the target at the end of the path, by attribute and scorer; mean identity."""
    parts = []
    for kind, words in (("read", "off by"), ("eval", "by --eval_scorer off by")):
        for name in (name for name in names if f"{kind}_{name}" in rows[0]):
            error = np.mean([abs(row[f"{kind}_{name}"] - row[f"asked_{name}"]) for row in rows])
            parts.append(f"{name} {words} {error:.3f}")
    if rows[0]["identity"] != "":
        parts.append(f"identity {np.mean([row['identity'] for row in rows]):.3f}")
    return ", ".join(parts)
