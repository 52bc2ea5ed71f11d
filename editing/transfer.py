"""Attributes of one face given to another by a conditional generator: the same latent and noise, another condition.

A face keeps the condition under which its latent was found; what moves it is the difference between the target
attributes and its own, so that t = 0 is the inversion itself and t = 1 the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import Distributed, gather_list, shard
from common.files import safe_name
from common.grids import make_strip
from common.images import normalise, read_image, save_image
from common.tables import append_table, write_table
from editing.attributes import (
    EXPRESSION,
    Condition,
    ConditionScorer,
    base_fingerprint,
    load_condition_scorer,
    read_condition,
)
from editing.edit import InvertedFace, face_at, note_tuned
from editing.evaluate import evaluate, score_frames
from inversion.report import ORIGINALS, PER_GRID
from model import Generator, load_generator
from perceptual.identity import identity_or_none
from sampling.render import Source, latents_source, render
from scorer.interface import AttributeScorer
from scorer.network import load_scorer

KINDS = ("original", "reference", "inverted", "edited")  # rows of a grid


@dataclass(frozen=True)
class Target:
    """Target attributes: of a reference face, or numbers."""

    label: str  # in file names
    name: str  # in tables
    values: dict[int, float]  # position of an attribute -> number in [0, 1]
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Models:
    """A conditional generator with its scorer, and what compares its frames."""

    ckpt: Path
    condition: Condition
    generator: Generator
    scorer: ConditionScorer
    eval_scorer: AttributeScorer | None  # a second one for the table
    identity: torch.nn.Module | None  # of perceptual/identity.py


def load_models(
    ckpt: Path,
    device: torch.device,
    *,
    scorer: str | None,  # where the one that the generator was trained with is now; None: where it was
    eval_scorer: str | None,
    identity: str,  # auto, none, or a name
    weights_dir: Path | None,
) -> Models:
    """Load a conditional generator with its scorers. Raises ConditionError for an unconditional one, UserError for
    another scorer than it was trained with."""
    condition, generator = read_condition(ckpt), load_generator(ckpt, device)
    trained = load_condition_scorer(ckpt, condition, device, scorer=scorer, weights_dir=weights_dir)
    evaluator = load_scorer(eval_scorer, device, weights_dir=weights_dir) if eval_scorer else None
    if evaluator:
        ConditionScorer(evaluator, condition.attributes)  # knows them all
    return Models(ckpt, condition, generator, trained, evaluator, identity_or_none(identity, device, weights_dir))


def read_targets(images, models: Models, attributes: str | None) -> list[Target]:
    """A target per reference: its attributes of the given names, with commas between (default: its expression, where
    the generator knows of one, else all)."""
    targets, labels, device, known = [], set(), models.generator.token.device, models.condition.attributes
    expression = [name for name in EXPRESSION if name in known]
    names = attributes.split(",") if attributes else expression or known
    chosen = [models.condition.index(name.strip()) for name in names]
    for i, name in enumerate(images.names):
        image = images.read(i)  # uint8 [3, S, S]
        values = models.scorer.read(normalise(image[None], device))[0].tolist()
        label = f"as_{safe_name(Path(name).stem)}"
        label = f"{label}_{i}" if label in labels else label
        labels.add(label)
        targets.append(Target(label, name, {k: values[k] for k in chosen}, image.permute(1, 2, 0).numpy()))
    return targets


def parse_target(text: str, condition: Condition) -> Target:
    """The target of --set, such as smile=1,age=60."""
    return Target(safe_name(text.replace("=", "")), text, condition.parse(text))


def open_inversions(path: Path, models: Models, dist: Distributed) -> Source:
    """Saved latents of this generator, or of the one that its file says it was trained from."""
    generator, base = models.generator, base_fingerprint(models.ckpt) if models.condition.light else None
    source = latents_source(generator, path, accept=(base,) if base else ())
    if source.origin["fingerprint"] not in (None, generator.fingerprint) and dist.is_main:
        print(f"{path}: inversions of the generator that {models.ckpt} was trained from, taken as neutral ones")
    return source


def original_file(folder: Path, name: str, i: int) -> Path:
    """File of an inversion's original: called after it or, in folders of earlier versions, by its number."""
    named = folder / ORIGINALS / f"{name}.png"
    return named if named.is_file() else folder / f"origin_{i}.png"


def read_face(models: Models, source: Source, i: int, folder: Path, start: str) -> InvertedFace:
    """A face of saved latents. One without recorded attributes was found under the neutral 0.5."""
    face, scorer = face_at(source, i, models.generator), models.scorer
    condition = torch.full((len(scorer.names),), 0.5) if face.condition is None else face.condition
    path, scored = original_file(folder, face.name, i), condition
    original = np.asarray(read_image(path)) if path.is_file() else None
    if face.condition is None or start == "inversion":
        frames = render_path(face.generator, face, condition[None])
        scored = scorer.to_unit(torch.from_numpy(score_frames(scorer.scorer, frames)))[0]
    return replace(face, condition=condition, scored=scored, original=original)


def target_path(face: InvertedFace, target: Target, ts: Sequence[float]) -> torch.Tensor:
    """Target attributes on the path, [K, d]: the face's own at t = 0, those of the target at 1, beyond it above."""
    goal = face.scored.clone()
    for position, value in target.values.items():
        goal[position] = value
    return face.scored + torch.tensor(list(ts), dtype=goal.dtype)[:, None] * (goal - face.scored)


def edit_faces(
    models: Models,
    inversions: Path,  # a folder of inversions with their originals, or a .npy
    targets: Sequence[Target],
    output_dir: Path,
    *,
    paired: bool,  # the first face with the first target ...; else each with each
    start: str,  # attributes that an edit starts from: those of the source, or of the inversion
    ts: Sequence[float],  # places of the frames on the path: 0, the inversion, ..., 1, the target
    dist: Distributed,
) -> None:
    """Frames, tables and grids of every face with its targets, as each is done; the ranks share the faces. Raises
    ValueError when --paired finds more faces than targets, or fewer."""
    source, scorer = open_inversions(inversions, models, dist), models.scorer
    folder, n = inversions if inversions.is_dir() else inversions.parent, len(source.names)
    if paired and len(targets) != n:
        raise ValueError(f"--paired needs as many references as sources, found {len(targets)} and {n}")
    pairs = list(enumerate(targets)) if paired else [(i, target) for target in targets for i in range(n)]
    single = paired or len(targets) == 1
    if dist.is_main:
        note_tuned(source)
    results, local = [], shard(n, dist.rank, dist.world_size)
    for i in tqdm(local, desc="editing", unit="face", disable=not dist.is_main):
        face = read_face(models, source, i, folder, start)
        for number, (k, target) in enumerate(pairs):
            if k != i:
                continue
            conditions = face.condition + target_path(face, target, ts) - face.scored
            frames = render_path(face.generator, face, conditions)
            rows = table_rows(models, face, i, target, ts, frames)
            column = save_edit(output_dir, face, target, frames, rows, scorer, single)
            if face.original is not None:
                column["original"] = original_file(folder, face.name, i), caption_of(face.original, target, scorer)
            if dist.is_main:
                append_table(output_dir / "edits.csv", rows, start=not results)
            results.append((number, rows, column))
    results = sorted((result for share in gather_list(results) for result in share), key=lambda result: result[0])
    if dist.is_main:
        write_table(output_dir / "edits.csv", [row for _, rows, _ in results for row in rows])
        write_grids(output_dir / "grids", [(pairs[number][1], column) for number, _, column in results], paired)
        changed = [scorer.names[k] for k in sorted({k for target in targets for k in target.values})]
        summary = summarise([rows[-1] for _, rows, _ in results], changed)
        print(f"{output_dir}: {n} faces, {len(pairs)} edits at strength {ts[-1]:g}: {summary}")


def render_path(generator, face: InvertedFace, conditions: torch.Tensor) -> list[np.ndarray]:
    """Frames, uint8 [size, size, 3], of a face under conditions [K, d] or, per token, [K, L, d]."""
    ws = torch.as_tensor(face.w).expand(len(conditions), -1, -1)
    return list(render(generator, ws, noise=face.noise, condition=conditions))


def table_rows(models: Models, face: InvertedFace, i: int, target: Target, ts, frames) -> list[dict]:
    """Rows of edits.csv, one per frame: target attributes, what the scorers read, measures."""
    scorer, eval_scorer = models.scorer, models.eval_scorer
    result = evaluate(frames, scorer.scorer, models.identity)
    values = {"asked": target_path(face, target, ts).numpy() * models.condition.units}  # the published column name
    values["read"] = result.scores[:, scorer.columns]
    if eval_scorer:
        values["eval"] = score_frames(eval_scorer, frames)[:, [eval_scorer.column(name) for name in scorer.names]]
    rows = []
    for j, t in enumerate(ts):
        row = {"image": face.name, "origin": i, "target": target.name, "t": round(float(t), 4)}
        row["frame"] = f"{face.name}_{target.label}_{t:.3g}.png"
        for kind, table in values.items():
            row |= {f"{kind}_{n}": round(float(v), 4) for n, v in zip(scorer.names, table[j], strict=True)}
        row["identity"] = "" if result.identity is None else round(float(result.identity[j]), 4)
        rows.append(row | {"change": round(float(result.change[j]), 4)})
    return rows


def save_edit(folder: Path, face, target: Target, frames, rows, scorer: ConditionScorer, single: bool) -> dict:
    """Frames, and with more than two a strip; single: the ends also under the face's name. Returns a column of a grid:
    {kind: (file, caption)}, of a reference without its file."""
    captions = [caption([row[f"read_{name}"] for name in scorer.names], target, scorer) for row in rows]
    images = {f"frames/{row['frame']}": frame for row, frame in zip(rows, frames, strict=True)}
    if single:
        images |= {f"unedited/{face.name}.png": frames[0], f"edited/{face.name}.png": frames[-1]}
    if len(frames) > 2:
        images[f"strips/{face.name}_{target.label}.png"] = make_strip(frames, captions)
    for name, image in images.items():
        save_image(image, folder / name)
    files, ends = [folder / "frames" / row["frame"] for row in rows], {"inverted": 0, "edited": -1}
    column = {kind: (files[j], captions[j]) for kind, j in ends.items()}
    if target.image is not None:
        column["reference"] = None, caption_of(target.image, target, scorer)
    return column


def caption_of(image: np.ndarray, target: Target, scorer: ConditionScorer) -> str:
    return caption(score_frames(scorer.scorer, [image])[0, scorer.columns], target, scorer)


def caption(values: Sequence[float], target: Target, scorer: ConditionScorer) -> str:
    """'smile 0.93', or of several attributes '0.93 0.98 34': of values [d], those that the target moves."""
    moved = sorted(target.values)
    numbers = [f"{values[k]:.0f}" if scorer.kinds[k] == "years" else f"{values[k]:.2f}" for k in moved]
    return f"{scorer.names[moved[0]]} {numbers[0]}" if len(numbers) == 1 else " ".join(numbers)


def write_grids(folder: Path, columns: list[tuple[Target, dict]], paired: bool) -> None:
    """Grids of at most PER_GRID faces: one after the other for each target, or for all when paired. Images are read
    again, no more at a time than one grid shows."""
    groups: dict[str, list] = {}
    for target, column in columns:
        groups.setdefault("paired" if paired else target.label, []).append((target, column))

    def cell(kind, target, column):
        file, text = column[kind]
        return target.image if file is None else np.asarray(read_image(file)), text

    for label, group in groups.items():
        kinds = [kind for kind in KINDS if all(kind in column for _, column in group)]
        for start in range(0, len(group), PER_GRID):
            pairs = group[start : start + PER_GRID]  # a column each
            images, texts = zip(*(cell(kind, *pair) for kind in kinds for pair in pairs), strict=True)
            grid = make_strip(images, texts, nrow=len(pairs))
            save_image(grid, folder / f"{label}_{start // PER_GRID:03d}.png")


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
