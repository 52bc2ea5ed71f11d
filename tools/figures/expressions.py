"""The figures of the conditional generator: attributes asked for as numbers, and lent by a reference face."""

from __future__ import annotations

import numpy as np
from PIL import Image

from editing.edit import InvertedFace
from editing.evaluate import score_frames
from editing.transfer import Target, condition_path, render_path
from sampling.render import select_noise
from tools.figures.lab import Lab, draw
from tools.figures.sheet import draw_sheet, readings

ABSENT = "no conditional generator: name one with --cgan"
CANDIDATES = 60  # drawn faces among which the references are found: those that smile most and least


def conditional_faces(lab: Lab) -> list[InvertedFace]:
    """The faces, inverted under their own attributes."""
    found = lab.inversion("conditional")
    own = lab.attributes()  # [N, d]
    return [
        InvertedFace(name, found.codes[i], select_noise(found.noise, [i]), own[i], own[i], lab.pictures[i])
        for i, name in enumerate(lab.names)
    ]


def requests_plate(lab: Lab) -> Image.Image | str:
    """Every attribute asked to be 0 and 1, the others left as they are."""
    if lab.cgan is None:
        return ABSENT
    generator, reader = lab.cgan.tools.generator, lab.cgan.reader
    targets = [
        Target(f"{name} {value}", "", {k: float(value)}) for k, name in enumerate(reader.names) for value in (0, 1)
    ]
    rows = []
    for face, inversion in zip(conditional_faces(lab), lab.inversion("conditional").pictures, strict=True):
        row = [(face.original, ""), (inversion, "")]
        for target in targets:
            (position,) = target.values
            (frame,) = render_path(generator, face, condition_path(face, target, [1.0]))
            (before, after) = readings(reader.scorer, reader.names[position], [inversion, frame])
            row.append((frame, f"{before} to {after}"))
        rows.append(row)
    columns = ["original", "inversion", *(target.label.replace("_", " ") for target in targets)]
    return draw_sheet(
        rows,
        columns=columns,
        labels=lab.names,
        note="asked of the conditional generator; below each: what its scorer reads, inversion to edit",
    )


def transfer_plate(lab: Lab) -> Image.Image | str:
    """The expressions of references on the faces: the paper's cGAN figures."""
    if lab.cgan is None:
        return ABSENT
    generator, reader = lab.cgan.tools.generator, lab.cgan.reader
    if "smile" not in reader.names:
        return "the conditional generator knows no smile"
    seeds, lenders = find_references(lab)
    targets = [Target("", "", dict(enumerate(row.tolist()))) for row in lab.attributes(lenders)]
    smiles = readings(reader.scorer, "smile", lenders)
    rows = [[(None, ""), (None, ""), *zip(lenders, smiles, strict=True)]]
    for face, inversion in zip(conditional_faces(lab), lab.inversion("conditional").pictures, strict=True):
        frames = [
            frame for target in targets for frame in render_path(generator, face, condition_path(face, target, [1.0]))
        ]
        frames = [face.original, inversion, *frames]
        rows.append(list(zip(frames, readings(reader.scorer, "smile", frames), strict=True)))
    return draw_sheet(
        rows,
        columns=["original", "inversion", *(f"as seed {seed}" for seed in seeds)],
        labels=["references", *lab.names],
        note=f"{', '.join(name.replace('_', ' ') for name in reader.names)} of the reference; below "
        "each: the smile that the scorer reads",
    )


def find_references(lab: Lab, n: int = 2) -> tuple[list[int], list[np.ndarray]]:
    """Seeds and pictures of the drawn faces that smile most, then of those that smile least."""
    reader = lab.cgan.reader
    pictures = draw(lab.tools, range(CANDIDATES))
    order = np.argsort(score_frames(reader.scorer, pictures)[:, reader.scorer.column("smile")], kind="stable")
    seeds = [int(seed) for seed in (*order[: -n - 1 : -1], *order[:n])]
    return seeds, [pictures[seed] for seed in seeds]
