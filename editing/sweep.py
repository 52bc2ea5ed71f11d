"""The sweep of edit_attribute.py: distances along boundaries or to targets, and the files and rows of each face."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import UsageError
from common.distributed import Distributed, gather_list, shard
from common.files import safe_name
from common.grids import make_strip
from common.images import save_image
from common.tables import append_table, write_table
from common.video import save_video
from editing.boundary import Boundary
from editing.edit import InvertedFace, edit_face, edit_w, face_at, note_tuned, score_along, search_distance
from editing.evaluate import Evaluation, evaluate
from sampling.render import Source

ROUNDS = 3  # of the coordinate search for several targets at once: one edit moves the other attributes a little
LIMIT = 6.0  # standard deviations within which a target is searched for
FRAMES = 12  # of a strip, at most


@dataclass(frozen=True)
class Edit:
    """A move along boundaries: all faces to the same distances, or each face to its targets."""

    boundaries: list[Boundary]
    line: np.ndarray  # [K, 1 or number of boundaries]: distances of the frames
    unit: str  # of these: latent or std
    distance: str  # absolute or relative (editing/boundary.py)
    targets: dict[int, tuple[str, float]]  # of `pair_targets`: they replace the line
    layers: list[int] | None  # those that move; None: all

    def distances(self) -> np.ndarray:
        """Distances of the frames, [K, number of boundaries], in latent units."""
        if self.unit == "latent":
            return np.broadcast_to(self.line, (len(self.line), len(self.boundaries)))
        means = [boundary.mean if self.distance == "absolute" else 0.0 for boundary in self.boundaries]
        return self.line * [boundary.std for boundary in self.boundaries] + means


@dataclass(frozen=True)
class Output:
    """The files of each face."""

    folder: Path
    attribute: str  # the one in file names and captions
    published: bool  # file names
    video: str  # none or a format
    fps: float

    def write(self, i: int, face: str, frames, suffixes: list[str], captions: list[str]) -> list[str]:
        """Save frames, strip and video of the face at position i; returns the names of the frames."""
        label = safe_name(self.attribute)
        names, strip = [f"{face}_{suffix}" for suffix in suffixes], f"{face}_{label}"
        if self.published:
            strip = f"origin_{i}_{label}"
            names = [f"origin_{i}_edit_{j}_{label}_{text}" for j, text in enumerate(captions[1:])]
        images = {f"strips/{strip}": draw_strip(frames, captions)}
        images |= {f"frames/{name}": frame for name, frame in zip(names, frames[1:], strict=True)}
        if len(frames) == 2:  # for align_faces.py
            images |= {f"unedited/{face}": frames[0], f"edited/{face}": frames[1]}
        for name, image in images.items():
            save_image(image, self.folder / f"{name}.png")
        if self.video != "none":
            save_video(frames[1:], self.folder / "videos" / f"{strip}.{self.video}", self.fps)
        return names


def common_range(boundaries) -> tuple[float, float] | None:
    """The range that all boundaries allow; None where one of them does not say."""
    ranges = [boundary.range for boundary in boundaries]
    return (max(low for low, _ in ranges), min(high for _, high in ranges)) if all(ranges) else None


def pair_targets(targets: dict[str, float], boundaries) -> dict[int, tuple[str, float]]:
    """{number of the boundary: (attribute, value)}, by attribute; a single boundary may serve any target."""
    if len(targets) == len(boundaries) == 1:
        return dict(enumerate(targets.items()))
    moved = [boundary.attribute for boundary in boundaries]
    for name in targets.keys() - set(moved):
        raise UsageError(f"--target {name}: no --boundary moves it; they move {', '.join(moved)}")
    return {moved.index(name): (name, value) for name, value in targets.items()}


def search_targets(face: InvertedFace, edit: Edit, scorer) -> np.ndarray:
    """Relative distances [1, number of boundaries] at which the scorer sees the target values (or comes nearest)."""
    result, layers = np.zeros(len(edit.boundaries)), edit.layers
    for _ in range(ROUNDS if len(edit.targets) > 1 else 1):
        for k, (name, value) in edit.targets.items():
            result[k], boundary = 0, edit.boundaries[k]
            (start,) = edit_w(face.w, edit.boundaries, result[None], layers=layers)
            score = score_along(face.generator, replace(face, w=start), boundary, scorer, scorer.column(name), layers)
            limit, near = LIMIT * boundary.std, tolerance(scorer, name)
            result[k], _ = search_distance(score, value, limit=limit, near=near)
    return result[None]


def tolerance(scorer, name) -> float:
    """Distance from the target within which a score counts as there: 2 years, or 0.05."""
    return 2 if scorer.attributes[scorer.column(name)].kind == "years" else 0.05


def describe_target(scorer, name, value, scores) -> str:
    """Number of faces that reached the target, and the scores of the others, in words."""
    near = tolerance(scorer, name)
    missed = [score for score in scores if abs(score - value) > near]
    rest = f"; the others come to {min(missed):.3g} to {max(missed):.3g} at best, within {LIMIT:g} sd" if missed else ""
    return f"{name}={value:g}: {len(scores) - len(missed)} of {len(scores)} faces within {near}{rest}"


def edit_faces(generator, source: Source, edit: Edit, networks, output: Output, dist: Distributed) -> None:
    """Edit saved latents: files and rows of edits.csv of every face, as each is done; the ranks share the faces.
    networks: scorer, identity or None, perceptual or None."""
    scorer, distances, rows = networks[0], edit.distances(), []
    suffixes = name_frames(edit, output.attribute)
    if dist.is_main:
        note_tuned(source)
    for i in tqdm(shard(len(source.names), dist.rank, dist.world_size), desc="editing", unit="face", disable=None):
        face, distance = face_at(source, i, generator), "relative" if edit.targets else edit.distance
        if edit.targets:
            distances = search_targets(face, edit, scorer)
        frames = edit_face(face.generator, face, edit.boundaries, distances, distance=distance, layers=edit.layers)
        result = evaluate(frames, *networks)
        captions = caption_frames(scorer, output.attribute, result.scores, distances)
        names = output.write(i, face.name, frames, suffixes, captions)
        new = table_rows(i, face.name, names, distances, result, scorer.names)
        if dist.is_main:
            append_table(output.folder / "edits.csv", new, start=not rows)
        rows += new
    rows = [row for share in gather_list(rows) for row in share]
    if dist.is_main:
        write_table(output.folder / "edits.csv", rows)
        print(f"{len(source.names)} faces along {', '.join(b.attribute for b in edit.boundaries)}: {output.folder}")
        for name, value in edit.targets.values():
            print(describe_target(scorer, name, value, [row[name] for row in rows]))


def name_frames(edit: Edit, shown: str) -> list[str]:
    """Suffixes of the frames' file names: 'age+3', 'age+2_smile-1.5', or of targets 'age60'."""
    if edit.targets:
        return ["_".join(f"{safe_name(name)}{value:g}" for name, value in edit.targets.values())]
    labels = [shown] if edit.line.shape[1] == 1 else [boundary.attribute for boundary in edit.boundaries]
    rows = [zip(labels, row, strict=True) for row in edit.line]
    names = ["_".join(f"{safe_name(n)}{round(d, 2) + 0.0:+g}" for n, d in row) for row in rows]
    return names if len(set(names)) == len(names) else [f"{name}_{j}" for j, name in enumerate(names)]


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
    return make_strip([frames[j] for j in [0, *chosen]], [f"inv. {captions[0]}", *(captions[j] for j in chosen)])
