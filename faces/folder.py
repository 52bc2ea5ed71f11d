"""A folder of photos becomes a folder of aligned faces: in parallel, resumable, with an account of every photo. Writes
OUT/aligned/NAME.png; OUT/alignment.json (docs/formats.md), also while a run is under way; OUT/report.csv."""

import functools
import io
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common.cli import UsageError, UserError
from common.files import atomic_write, check_shape, read_json
from common.images import ImageError, fit_image, list_images, read_image
from common.runs import write_json
from common.tables import write_table
from common.workers import map_ordered
from faces import align as geometry
from faces.detect import DetectorError, FaceDetector
from faces.settings import AlignSettings

VERSION = 1
REPORT = ("photo", "outcome", "faces_found", "faces_aligned", "names", "score", "yaw", "note")
SAVE_EVERY = 30.0  # seconds
PHOTOS_PER_WORKER = 8  # below this a worker costs more than it does
PROFILE_YAW = 45.0  # degrees: from here on a face is reported as a profile
TIGHT_NOTE = "cut too tightly"
TIGHT = 0.4  # share of a face's frame outside its photo from which a note is written
INVERSIONS, PAIRS, OVERVIEW = "inversions", "before_after", "overview.jpg"  # in the folder of edit_photos.py's results
FRAMED = 0.06  # of the side: template_error up to which an image looks aligned
RECORD = {"photo": str, "name": str, "stamp": str, "outcome": str, "faces_found": int, "note": str}


@dataclass(frozen=True)
class PhotoTask:
    """A photo to align."""

    path: Path
    source: str  # its path relative to the photos' folder
    name: str  # of its crop, without suffix
    settings: AlignSettings = field(default_factory=AlignSettings)
    landmarks: object = None  # faces given by hand (see `geometry.parse_landmarks`), None to look for some
    stamp: str = ""
    weights_dir: Path | None = None


@dataclass(frozen=True)
class PhotoRecord:
    """The outcome of one photo: aligned, already aligned, no face, skipped, unreadable or bad landmarks."""

    photo: str
    name: str
    stamp: str  # changes when the photo or its landmarks change
    outcome: str
    faces_found: int = 0
    note: str = ""
    faces: list[geometry.Alignment] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def _detector(weights_dir):
    cv2.setNumThreads(1)  # the photos are what is done in parallel
    return FaceDetector(weights_dir)


def align_photo(task: PhotoTask) -> tuple[PhotoRecord, list[tuple[str, bytes]]]:
    """The record of one photo, and (name, PNG) of each crop. Runs in the workers; nothing in a photo raises."""
    settings, record = task.settings, PhotoRecord(task.source, task.name, task.stamp, "no face")
    try:
        photo = read_image(task.path)
    except (ImageError, OSError) as error:
        return replace(record, outcome="unreadable", note=str(error)), []
    try:
        faces = _given_faces(task)
        if faces is None:
            seen = _detector(task.weights_dir).detect(photo, many=settings.faces == "all")
            faces = [(f.landmarks, {"box": [round(v, 2) for v in f.box], "score": round(f.score, 4)}) for f in seen]
        if not faces:
            return record, []
        chosen, notes = _choose(faces, settings.faces, settings.max_yaw)
        alignments, crops = [], []
        for i, (points, info) in enumerate(chosen):
            info |= {"name": task.name if len(chosen) == 1 else f"{task.name}_face{i}", "source": task.source}
            tolerance = settings.aligned_tolerance / 100
            alignment = geometry.align(photo, points, size=settings.size, aligned_tolerance=tolerance, **info)
            geometry.crop_aligned(photo, alignment).save(buffer := io.BytesIO(), "PNG")
            crops.append((alignment.name, buffer.getvalue()))
            alignments.append(alignment)
    except DetectorError as error:
        return replace(record, outcome="unreadable", note=str(error)), []
    except UserError as error:
        return replace(record, outcome="bad landmarks", note=str(error)), []
    whole, note = all(alignment.whole for alignment in alignments), ", ".join(notes + _remarks(alignments))
    outcome = "skipped" if not crops else "already aligned" if whole else "aligned"
    return replace(record, outcome=outcome, faces_found=len(faces), note=note, faces=alignments), crops


def _given_faces(task: PhotoTask) -> list[tuple] | None:
    """Faces given by hand, the largest first: in the --landmarks file, or in a JSON file beside the photo with an entry
    "landmarks"."""
    value, where, beside = task.landmarks, f"--landmarks, {task.source}", task.path.with_suffix(".json")
    if value is None and beside.is_file():
        value, where = read_json(beside, object, what="file of landmarks"), beside
        if isinstance(value, dict) and "landmarks" not in value:
            return None  # some other program's
    elif value is None:
        return None
    faces = geometry.parse_landmarks(value, where)
    faces.sort(key=lambda points: -np.linalg.norm(np.subtract(*geometry.ffhq_quad(points)[[3, 0]])))  # sides of frames
    return [(points, {}) for points in faces]


def _choose(faces, which, max_yaw):
    """The faces to align and, in words, what was left out. faces: (landmarks, info), largest first."""
    notes, chosen = [], faces
    if which != "all":
        index = 0 if which == "largest" else int(which)
        chosen = faces[index : index + 1]
        if not chosen:
            notes.append(f"there is no face {index}, only {len(faces)}")
        elif len(faces) > 1:
            notes.append(f"{len(faces)} faces, {'the largest' if index == 0 else f'number {index}'} taken")
    kept = [(points, info) for points, info in chosen if abs(geometry.estimate_yaw(points)) <= max_yaw]
    if len(kept) < len(chosen):
        notes.append(f"{len(chosen) - len(kept)} turned by more than {max_yaw:g} degrees")
    return kept, notes


def _remarks(alignments: list[geometry.Alignment]) -> list[str]:
    remarks = ["profile"] if any(abs(face.yaw) > PROFILE_YAW for face in alignments) else []
    # an eye, the nose or a mouth corner beyond the border: what the crop shows there is mirrored
    if any((np.clip(f.landmarks, 0, np.array(f.photo_size) - 1) != f.landmarks).any() for f in alignments):
        remarks.append("partly outside the photo")
    if (share := max(map(geometry.outside_share, alignments), default=0.0)) > TIGHT:
        remarks.append(f"{TIGHT_NOTE}: {share:.0%} of the frame lies outside the photo and is filled by mirroring")
    return remarks


def looks_aligned(path: Path, weights_dir=None) -> bool | None:
    """Whether the centre square of an image shows a face about in FFHQ's frame; None: unknown."""
    try:
        image = read_image(path)
        image = fit_image(image, min(image.size))
        faces = _detector(weights_dir).detect(image)
    except (ImageError, OSError, DetectorError):
        return None
    return geometry.template_error(faces[0].landmarks, image.size) <= FRAMED if faces else None


def list_photos(photos, output_dir: Path) -> dict[str, Path]:
    """Photos, single ones and those in folders, as {path below their common folder: path}, sorted, without our own
    results: those below output_dir, and what edit_photos.py wrote into folders below, or beside its edited photos.
    Raises FileNotFoundError for an absent path, UserError when there is no image."""
    photos = [Path(path) for path in photos]
    for path in photos:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: a folder of photos or a photo is expected")
    root = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in photos])
    found, results = [path for path in photos if not path.is_dir()], []
    for folder in (path for path in photos if path.is_dir()):
        below = output_dir.resolve() in (folder.resolve(), *folder.resolve().parents)
        ours = (output_dir / "aligned" if below else output_dir).resolve()
        images = [path for path in list_images(folder) if ours not in Path(os.path.realpath(path)).parents]
        results += (written := _edit_results(folder, images))
        found += set(images) - set(written)
    if results:
        print(
            f"note: {len(results)} results of edit_photos.py are left out, the first is {results[0]}", file=sys.stderr
        )
    if not found:
        raise UserError(f"{', '.join(map(str, photos))} holds no images")
    return dict(sorted((Path(os.path.relpath(path, root)).as_posix(), path) for path in found))


def _edit_results(folder: Path, images: list[Path]) -> list[Path]:
    """Images below a folder that edit_photos.py wrote: all those in folders of its results; of `folder` itself, whose
    edited photos may be edited again, only what stands beside them."""
    holds_results = functools.cache(lambda folder: all((folder / name).is_dir() for name in (INVERSIONS, PAIRS)))
    written = []
    for path in images:
        *_, top = inside = [path, *path.parents][: len(path.relative_to(folder).parts)]  # path ... top, in folder
        beside = holds_results(folder) and top.name in (PAIRS, OVERVIEW)
        written += [path] if beside or any(map(holds_results, inside)) else []
    return written


def require_elsewhere(photos: dict[str, Path], output_dir: Path, mark: str | None = None, own=()) -> None:
    """Raise UsageError where a result, which is called as its photo {name: path}, would replace the photo; with `mark`,
    a name in every folder of the script's results, also where it, or a file called as in `own`, would replace a file
    in another folder."""
    known = mark is None or (output_dir / mark).exists()
    for name, path in photos.items():
        if not (target := output_dir / name).exists():
            continue
        if not known or path.exists() and target.samefile(path):
            raise UsageError(
                f"--output_dir {output_dir}: a result would replace the photo {target}: name another folder"
            )
    if not known and (taken := [name for name in own if (output_dir / name).exists()]):
        raise UsageError(f"--output_dir {output_dir}: a result would replace its {taken[0]}: name another folder")


def align_folder(photos, output_dir, settings, *, landmarks=None, n_worker=1, overwrite=False, weights_dir=None):
    """PhotoRecords of photos {source: path}, in order; landmarks: JSON file {photo: landmarks} of faces by hand."""
    output_dir = Path(output_dir)
    by_hand = {} if landmarks is None else read_json(landmarks, {str: object}, what="object {photo: landmarks}")
    earlier = {} if overwrite else _read_records(output_dir, settings)
    names = choose_names(photos, {source: record.name for source, record in earlier.items()})
    todo, records = [], {}
    for source, path in photos.items():
        keys = (source, Path(source).name, Path(source).stem)  # what faces by hand may be called
        given = next((by_hand[key] for key in keys if key in by_hand), None)
        files = [file for file in (path, path.with_suffix(".json")) if file.is_file()]
        stamp = [f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files]
        stamp = " ".join(stamp + ([json.dumps(given)] if given is not None else []))
        task = PhotoTask(path, source, names[source], settings, given, stamp, weights_dir)
        records[source] = record = earlier.get(source)
        crops = [output_dir / "aligned" / f"{face.name}.png" for face in record.faces] if record else []
        if not record or record.stamp != task.stamp or not all(crop.is_file() for crop in crops):
            todo.append(task)
    saved, done = time.monotonic(), 0
    results = map_ordered(align_photo, todo, min(n_worker, -(-len(todo) // PHOTOS_PER_WORKER)))
    try:
        for record, crops in tqdm(results, total=len(todo), desc="aligning", unit="photo", disable=None):
            for name, png in crops:
                with atomic_write(output_dir / "aligned" / f"{name}.png") as file:
                    file.write(png)
            records[record.photo], done = record, done + 1
            if time.monotonic() - saved > SAVE_EVERY:
                _write_records(output_dir, settings, records)
                saved = time.monotonic()
    finally:
        if done or not todo:  # what a run that ends here has done
            _write_records(output_dir, settings, records)
    _report(output_dir, records.values())
    return list(records.values())


def require_faces(records, output_dir: Path) -> None:
    """Raise UserError when not one of the photos gave a face."""
    if not any(record.faces for record in records):
        outcomes = count_outcomes(records)
        raise UserError(f"none of {len(records)} photos gave a face ({outcomes}): see {output_dir / 'report.csv'}")


def count_outcomes(records) -> str:
    """'12 aligned, 1 no face'"""
    counts = Counter(record.outcome for record in records)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def choose_names(sources, taken) -> dict[str, str]:
    """A name for the crop of each photo, unique whatever the case of letters: the stem; where that is taken, the whole
    relative path with _ for its separators; then a number. `taken`: names given in an earlier run, which stay."""
    names, used = {}, {name.casefold() for name in taken.values()}
    stems = [Path(source).stem.casefold() for source in sources]
    for source, stem in zip(sources, stems, strict=True):
        if source in taken:
            names[source] = taken[source]
            continue
        name, long = Path(source).stem, re.sub(r"[/\\.]", "_", source)
        base = re.fullmatch(r"(.*)_face\d+", stem)  # might be a face of another photo
        if stems.count(stem) > 1 or name.casefold() in used or (base and base[1] in stems):
            name = long if not re.fullmatch(r".*_face\d+", long) else long + "_"
        number = 2
        while name.casefold() in used:
            name, number = f"{long}-{number}", number + 1
        names[source] = name
        used.add(name.casefold())
    return names


def _read_records(output_dir, settings) -> dict[str, PhotoRecord]:
    """{photo: record} of earlier runs with these settings, finished or not: what their alignment.json says."""
    file = output_dir / "alignment.json"
    if not file.is_file():
        return {}
    try:
        state = read_json(file, {"version": int, "settings": {str: object}}, what="alignment.json")
        if (state["version"], state["settings"]) != (VERSION, asdict(settings)):
            return {}
        check_shape(state, {"faces": [geometry.FACE], "photos": [RECORD | {"faces": [str]}]})
        faces, photos = {face["name"]: geometry.alignment_of(face) for face in state["faces"]}, state["photos"]
        return {row["photo"]: PhotoRecord(**row | {"faces": [faces[name] for name in row["faces"]]}) for row in photos}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, or use --overwrite") from error


def _write_records(output_dir, settings, records) -> None:
    known = [record for record in records.values() if record is not None]
    faces = [asdict(face) for record in known for face in record.faces]
    photos = [{**vars(record), "faces": [face.name for face in record.faces]} for record in known]
    state = {"version": VERSION, "settings": asdict(settings), "faces": faces, "photos": photos}
    write_json(output_dir / "alignment.json", state)


def _report(output_dir, records) -> None:
    rows, listed = [], set()
    for record in records:
        names = [face.name for face in record.faces]
        scores = " ".join(f"{face.score:.2f}" for face in record.faces if face.score is not None)
        yaws = " ".join(f"{face.yaw:.0f}" for face in record.faces)
        outcome = (record.photo, record.outcome, record.faces_found, len(record.faces))
        cells = (*outcome, " | ".join(names), scores, yaws, record.note)
        rows.append(dict(zip(REPORT, cells, strict=True)))
        listed |= set(names)
    write_table(output_dir / "report.csv", rows)
    others = sorted(path.name for path in (output_dir / "aligned").glob("*.png") if path.stem not in listed)
    if others:
        unknown = f"{len(others)} images in {output_dir / 'aligned'} belong to no photo of this run"
        print(f"note: {unknown}, the first is {others[0]}; they are not in alignment.json", file=sys.stderr)
