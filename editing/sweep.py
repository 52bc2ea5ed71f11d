"""The sweep of edit_attribute.py: distances along boundaries or to targets, and the files and rows of each face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.cli import UsageError
from common.files import safe_name
from common.grids import make_strip
from common.images import save_image
from editing.boundary import Boundary, load_boundary
from editing.edit import InvertedFace, edit_w, score_along, search_distance
from editing.evaluate import Evaluation

ROUNDS = 3  # of the coordinate search for several targets at once: one edit moves the other attributes a little
LIMIT = 6.0  # standard deviations within which a target is searched for
FRAMES, LEAST = 12, 96  # of a strip: frames at most, and pixels at least, so that captions have room


def read_boundary(path, generator) -> Boundary:
    """A boundary for this generator. Raises BoundaryError for another's."""
    config = generator.config
    width = config.style_dim * (1 if config.w_space else config.n_tokens)
    return load_boundary(path, space=config.space, width=width, fingerprint=generator.fingerprint)


# -- distances -----------------------------------------------------------------------------------------------------


def common_range(boundaries) -> tuple[float, float] | None:
    """The range that all boundaries allow; None where one of them does not say."""
    ranges = [boundary.range for boundary in boundaries]
    return (max(low for low, _ in ranges), min(high for _, high in ranges)) if all(ranges) else None


def in_latent_units(line: np.ndarray, boundaries, unit: str, distance: str) -> np.ndarray:
    """Distances [K, 1 or number of boundaries] in `unit` -> [K, number of boundaries] in latent units."""
    if unit == "latent":
        return np.broadcast_to(line, (len(line), len(boundaries)))
    means = [boundary.mean if distance == "absolute" else 0.0 for boundary in boundaries]
    return line * [boundary.std for boundary in boundaries] + means


def pair_targets(targets: dict[str, float], boundaries) -> dict[int, tuple[str, float]]:
    """{number of the boundary: (attribute, value)}, by attribute; a single boundary may serve any target."""
    if len(targets) == len(boundaries) == 1:
        return dict(enumerate(targets.items()))
    moved = [boundary.attribute for boundary in boundaries]
    for name in targets.keys() - set(moved):
        raise UsageError(f"--target {name}: no --boundary moves it; they move {', '.join(moved)}")
    return {moved.index(name): (name, value) for name, value in targets.items()}


def search_targets(generator, face: InvertedFace, boundaries, targets, scorer, layers) -> np.ndarray:
    """Relative distances [1, number of boundaries] at which the scorer sees the target values (or comes nearest)."""
    result = np.zeros(len(boundaries))
    for _ in range(ROUNDS if len(targets) > 1 else 1):
        for k, (name, value) in targets.items():
            result[k] = 0
            (start,) = edit_w(face.w, boundaries, result[None], layers=layers)
            score = score_along(generator, replace(face, w=start), boundaries[k], scorer, scorer.column(name), layers)
            near, limit = tolerance(scorer, name), LIMIT * boundaries[k].std
            result[k], _ = search_distance(score, value, limit=limit, near=near)
    return result[None]


def tolerance(scorer, name) -> float:
    """Distance from the target within which a score counts as there: 2 years, or 0.05."""
    return 2 if scorer.attributes[scorer.column(name)].kind == "years" else 0.05


def describe_target(scorer, name, value, scores) -> str:
    """Number of faces that came to the target, and the scores of the others, in words."""
    near = tolerance(scorer, name)
    missed = [score for score in scores if abs(score - value) > near]
    rest = f"; the others come to {min(missed):.3g} to {max(missed):.3g} at best, within {LIMIT:g} sd" if missed else ""
    return f"{name}={value:g}: {len(scores) - len(missed)} of {len(scores)} faces within {near}{rest}"


# -- results of a face ---------------------------------------------------------------------------------------------


def name_frames(line: np.ndarray, boundaries, shown: str, targets) -> list[str]:
    """Suffixes of the frames' file names: 'age+3', 'age+2_smile-1.5', or of targets 'age60'."""
    if targets:
        return ["_".join(f"{safe_name(name)}{value:g}" for name, value in targets.values())]
    labels = [shown] if line.shape[1] == 1 else [boundary.attribute for boundary in boundaries]
    parts = [[f"{safe_name(n)}{round(d, 2) + 0.0:+g}" for n, d in zip(labels, row, strict=True)] for row in line]
    names = ["_".join(part) for part in parts]
    return names if len(set(names)) == len(names) else [f"{name}_{j}" for j, name in enumerate(names)]


def save_frames(folder: Path, name: str, frames: dict[str, np.ndarray], pair=()) -> None:
    """Frames by name; pair: unedited and edited face, also saved under the face's own name, for align_faces.py."""
    for frame_name, frame in frames.items():
        save_image(frame, folder / "frames" / f"{frame_name}.png")
    for kind, frame in zip(("unedited", "edited"), pair, strict=False):
        save_image(frame, folder / kind / f"{name}.png")


def table_rows(i: int, image: str, names, distances, result: Evaluation, attributes) -> list[dict]:
    """Rows of edits.csv, one per frame; the result has the inversion first."""
    measures = {"identity": result.identity, "perceptual": result.perceptual, "change": result.change}
    return [
        {"image": image, "origin": i, "edit": j, "distance": round(float(distances[j, 0]), 4), "frame": f"{name}.png"}
        | {n: round(float(s), 4) for n, s in zip(attributes, result.scores[j + 1], strict=True)}
        | {measure: "" if v is None else round(float(v[j + 1]), 4) for measure, v in measures.items()}
        for j, name in enumerate(names)
    ]


def caption_frames(scorer, attribute, scores, distances) -> list[str]:
    """Scores of the attribute in the frames [K + 1]; of one that the scorer does not know, the distance."""
    if attribute not in scorer.names:
        return ["0", *(f"{distance:+.3g}" for distance in distances[:, 0])]
    column = scorer.column(attribute)
    digits = 0 if scorer.attributes[column].kind == "years" else 2
    return [f"{value:.{digits}f}" for value in scores[:, column]]


def draw_strip(frames, captions):
    """The inversion and at most FRAMES of the others side by side."""
    chosen = np.unique(np.linspace(1, len(frames) - 1, min(FRAMES, len(frames) - 1)).round().astype(int))
    scale = max(1, LEAST // frames[0].shape[0])
    cells = [frames[j].repeat(scale, 0).repeat(scale, 1) for j in [0, *chosen]]
    return make_strip(cells, [f"inv. {captions[0]}", *(captions[j] for j in chosen)])
