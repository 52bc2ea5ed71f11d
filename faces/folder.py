"""A folder of photos becomes a folder of aligned faces: in parallel, resumable, with an account of every photo.

    photos = list_photos([Path("photos")], Path("faces"))
    align_folder(photos, Path("faces"), AlignSettings(size=256), place=setup("cpu"), n_worker=8)

OUT/aligned/NAME.png; OUT/alignment.json: {"version", "settings", "faces": [Alignment as a dict], "photos": [{"photo",
"name", "outcome", "faces_found", "faces": names, "note", "stamp"}]}; OUT/report.csv: the same for people. While a run
is under way its records stand in OUT/.alignment-RANK.jsonl, one line per photo, from which a killed run goes on.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import multiprocessing
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError
from common.distributed import barrier, gather_list, shard
from common.files import atomic_write
from common.images import ImageError, list_images, read_image
from common.runs import write_json
from faces.align import PROFILE_YAW, AlignError, align, crop_aligned, estimate_yaw, parse_landmarks
from faces.detect import FaceDetector

VERSION = 1
REPORT = ("photo", "outcome", "faces_found", "faces_aligned", "names", "score", "yaw", "note")
PHOTOS_PER_WORKER = 8  # below this a worker costs more than it does
AHEAD = 64  # photos handed to the workers before the first result is taken


@dataclass(frozen=True)
class AlignSettings:
    """What the crops depend on, beside the photos. faces: largest, all, or an index as text, 0 being the largest.

    aligned_tolerance: % of the side; max_yaw: degrees. See align_faces.py --help.
    """

    size: int = 256
    faces: str = "largest"
    framing: str = "ffhq"
    aligned_tolerance: float = 4.0
    max_yaw: float = 90.0
    score_threshold: float = 0.6


# -- one photo -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _detector(weights_dir, score_threshold):
    return FaceDetector(weights_dir, score_threshold=score_threshold)


def align_photo(task: dict) -> tuple[dict, list[tuple[str, bytes]]]:
    """What became of one photo: its record for alignment.json, and (name, PNG) of each crop. Runs in the workers."""
    settings = task["settings"]
    record = {"photo": task["source"], "name": task["name"], "stamp": task["stamp"], "faces": []}
    crops: list[tuple[str, bytes]] = []

    def end(outcome, note="", found=0):
        return {**record, "outcome": outcome, "faces_found": found, "note": note}, crops

    try:
        photo = read_image(task["path"])
    except (ImageError, OSError) as error:
        return end("unreadable", str(error))
    try:
        given = _given_landmarks(task)
        if given is None:
            detector = _detector(task["weights_dir"], settings.score_threshold)
            seen = detector.detect(photo, many=settings.faces == "all")
            faces = [(f.landmarks, {"box": [round(v, 2) for v in f.box], "score": round(f.score, 4)}) for f in seen]
        else:
            faces = [(points, {}) for points in given]
        if not faces:
            return end("no face")
        chosen, notes = _choose(faces, settings)
        for i, (points, facts) in enumerate(chosen):
            name = task["name"] if len(chosen) == 1 else f"{task['name']}_face{i}"
            alignment = align(
                photo,
                points,
                size=settings.size,
                framing=settings.framing,
                name=name,
                source=task["source"],
                aligned_tolerance=settings.aligned_tolerance / 100,
                **facts,
            )
            buffer = io.BytesIO()
            crop_aligned(photo, alignment).save(buffer, "PNG")
            crops.append((name, buffer.getvalue()))
            record["faces"].append(alignment.to_dict())
    except AlignError as error:
        crops, record["faces"] = [], []
        return end("bad landmarks", str(error))
    if any(abs(face["yaw"]) > PROFILE_YAW for face in record["faces"]):
        notes.append("profile")
    if any(_is_cut_off(face) for face in record["faces"]):
        notes.append("partly outside the photo")
    whole = bool(crops) and all(face["whole"] for face in record["faces"])
    return end("skipped" if not crops else "already aligned" if whole else "aligned", ", ".join(notes), len(faces))


def _is_cut_off(face) -> bool:
    """An eye, the nose or a mouth corner lies beyond the photo's border: what the crop shows there is mirrored."""
    return any(
        not 0 <= value <= size - 1
        for point in face["landmarks"]
        for value, size in zip(point, face["photo_size"], strict=True)
    )


def _choose(faces, settings):
    """The faces to align and, in words, what was left out. faces: (landmarks, facts), largest first."""
    notes, which = [], settings.faces
    if which == "all":
        chosen = faces
    else:
        index = 0 if which == "largest" else int(which)
        chosen = faces[index : index + 1]
        if not chosen:
            notes.append(f"there is no face {index}, only {len(faces)}")
        elif len(faces) > 1:
            notes.append(f"{len(faces)} faces, {'the largest' if index == 0 else f'number {index}'} taken")
    kept = [(points, facts) for points, facts in chosen if abs(estimate_yaw(points)) <= settings.max_yaw]
    if len(kept) < len(chosen):
        notes.append(f"{len(chosen) - len(kept)} turned by more than {settings.max_yaw:g} degrees")
    return kept, notes


def _given_landmarks(task):
    """Faces given by hand: in the --landmarks file, or in a JSON file beside the photo with an entry "landmarks"."""
    if task["landmarks"] is not None:
        return parse_landmarks(task["landmarks"], f"--landmarks, {task['source']}")
    beside = Path(task["path"]).with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        value = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AlignError(f"{beside} is not JSON: {error}") from error
    if isinstance(value, dict) and "landmarks" not in value:
        return None  # some other program's
    return parse_landmarks(value, beside)


# -- a folder ------------------------------------------------------------------------------------------------------


def align_folder(photos, output_dir, settings, *, dist, landmarks=None, n_worker=1, overwrite=False, weights_dir=None):
    """Aligns photos, as `list_photos` gives them; each process of `dist` does its share.

    photos: {source: path}; records of faces and photos bear the source. landmarks: JSON file {photo: landmarks} of
    faces given by hand. Returns the records, in the order of the photos; `require_faces` tells whether any has a face.
    """
    output_dir = Path(output_dir)
    by_hand = _read_by_hand(landmarks)
    earlier = {} if overwrite else _read_records(output_dir, settings)
    names = choose_names(photos, {source: record["name"] for source, record in earlier.items()})
    tasks = []
    for source, path in photos.items():
        given = _lookup(by_hand, source)
        tasks.append(
            {
                "path": path,
                "source": source,
                "name": names[source],
                "landmarks": given,
                "stamp": _stamp(path, given),
                "settings": settings,
                "weights_dir": weights_dir,
            }
        )
    barrier()  # every process has read the earlier records before one writes
    mine = [tasks[i] for i in shard(len(tasks), dist.rank, dist.world_size)]
    parts = gather_list(_align_all(mine, earlier, output_dir, n_worker, dist))
    records = [record for part in parts for record in part]
    if dist.is_main:
        _write_results(output_dir, settings, records)
    barrier()
    return records


def require_faces(records, output_dir: Path) -> None:
    """Raises UserError when not one of the photos gave a face."""
    if not any(record["faces"] for record in records):
        raise UserError(
            f"none of {len(records)} photos gave a face ({count_outcomes(records)}): see {output_dir / 'report.csv'}"
        )


def list_photos(photos, output_dir: Path) -> dict[str, Path]:
    """{path relative to what they have in common: path} of single photos and those in folders, sorted; not our own
    results: what lies below output_dir, or where the photos do so themselves, our crops there. Raises
    FileNotFoundError for a path that is absent, UserError when there is no picture."""
    photos = [Path(path) for path in photos]
    for path in photos:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: a folder of photos or a photo is expected")
    root = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in photos])
    found = [path for path in photos if not path.is_dir()]
    for folder in (path for path in photos if path.is_dir()):
        below = output_dir.resolve() in (folder.resolve(), *folder.resolve().parents)
        ours = (output_dir / "aligned" if below else output_dir).resolve()
        found += [path for path in list_images(folder) if ours not in path.resolve().parents]
    if not found:
        raise UserError(f"{', '.join(map(str, photos))} holds no pictures")
    return dict(sorted((Path(os.path.relpath(path, root)).as_posix(), path) for path in found))


def count_outcomes(records) -> str:
    """'12 aligned, 1 no face'"""
    outcomes = sorted(record["outcome"] for record in records)
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


def _align_all(tasks, earlier, output_dir, n_worker, dist) -> list[dict]:
    """Records in the order of the tasks; each crop is written, then its record appended to the journal."""
    done = {task["source"]: earlier[task["source"]] for task in tasks if _is_done(task, earlier, output_dir)}
    todo = [task for task in tasks if task["source"] not in done]
    if not todo:
        return [done[task["source"]] for task in tasks]
    journal = output_dir / f".alignment-{dist.rank}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    results = align_photos(todo, n_worker)
    results = tqdm(results, total=len(todo), desc="aligning", unit="photo", disable=None if dist.is_main else True)
    with open(journal, "a", encoding="utf-8") as log:
        # The empty line ends one that a kill may have torn
        log.write("\n" + json.dumps({"settings": asdict(todo[0]["settings"]), "version": VERSION}) + "\n")
        for task, (record, crops) in zip(todo, results, strict=True):
            for name, png in crops:
                with atomic_write(output_dir / "aligned" / f"{name}.png") as file:
                    file.write(png)
            done[task["source"]] = record
            log.write(json.dumps(record, ensure_ascii=False) + "\n")
            log.flush()
    return [done[task["source"]] for task in tasks]


def align_photos(tasks: list[dict], n_worker: int = 1) -> Iterable[tuple[dict, list]]:
    """`align_photo` of every task, in their order, in up to n_worker processes."""
    n_worker = min(n_worker, -(-len(tasks) // PHOTOS_PER_WORKER))
    return map(align_photo, tasks) if n_worker <= 1 else _from_workers(tasks, n_worker)


def _from_workers(tasks, n_worker) -> Iterator[tuple[dict, list]]:
    # not fork: this process may have threads
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    with ProcessPoolExecutor(n_worker, context) as executor:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(executor.submit(align_photo, task))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker process died (out of memory?): what was done is kept, start again") from error
        finally:
            executor.shutdown(cancel_futures=True)


def choose_names(sources, taken) -> dict[str, str]:
    """A name for the crop of each photo, unique whatever the case of letters: the stem; where that is taken, the whole
    relative path with _ for its separators; then a number. `taken`: names given in an earlier run, which stay."""
    names = {source: taken[source] for source in sources if source in taken}
    stems = [Path(source).stem.casefold() for source in sources]
    used = {name.casefold() for name in taken.values()}
    for source, stem in zip(sources, stems, strict=True):
        if source in names:
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


def _read_by_hand(path):
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--landmarks {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"--landmarks {path}: expected an object {{photo: landmarks}}, got a {type(value).__name__}")
    return value


def _lookup(by_hand, source):
    """Landmarks under the photo's relative path, file name or stem, in this order."""
    keys = (source, Path(source).name, Path(source).stem)
    return next((by_hand[key] for key in keys if key in by_hand), None)


def _stamp(path, given) -> str:
    """Changes when the photo or its landmarks change."""
    files = [file for file in (path, path.with_suffix(".json")) if file.is_file()]
    parts = [f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files]
    return " ".join(parts + ([json.dumps(given)] if given is not None else []))


# -- records -------------------------------------------------------------------------------------------------------


def _is_done(task, earlier, output_dir) -> bool:
    record = earlier.get(task["source"])
    return (
        bool(record)
        and record["stamp"] == task["stamp"]
        and all((output_dir / "aligned" / f"{face['name']}.png").is_file() for face in record["faces"])
    )


def _read_records(output_dir, settings) -> dict[str, dict]:
    """{photo: record} of earlier runs with these settings: alignment.json, and the journals of a killed run."""
    records: dict[str, dict] = {}
    final = output_dir / "alignment.json"
    if final.is_file():
        try:
            state = json.loads(final.read_text(encoding="utf-8"))
            if state["version"] == VERSION and state["settings"] == asdict(settings):
                faces = {face["name"]: face for face in state["faces"]}
                for row in state["photos"]:
                    records[row["photo"]] = {**row, "faces": [faces[name] for name in row["faces"]]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{final} is damaged ({type(error).__name__}): delete it, or use --overwrite") from error
    for journal in sorted(output_dir.glob(".alignment-*.jsonl")):
        same = False
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a kill tore, or an empty one
            if "settings" in entry:
                same = entry == {"settings": asdict(settings), "version": VERSION}
            elif same:
                records[entry["photo"]] = entry
    return records


def _write_results(output_dir, settings, records):
    faces = [face for record in records for face in record["faces"]]
    photos = [{**record, "faces": [face["name"] for face in record["faces"]]} for record in records]
    write_json(
        output_dir / "alignment.json",
        {"version": VERSION, "settings": asdict(settings), "faces": faces, "photos": photos},
    )
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(REPORT)
    for record in records:
        named = record["faces"]
        scores, yaws = ([face[key] for face in named if face[key] is not None] for key in ("score", "yaw"))
        writer.writerow(
            [
                record["photo"],
                record["outcome"],
                record["faces_found"],
                len(named),
                " | ".join(face["name"] for face in named),
                " ".join(f"{v:.2f}" for v in scores),
                " ".join(f"{v:.0f}" for v in yaws),
                record["note"],
            ]
        )
    with atomic_write(output_dir / "report.csv") as file:
        file.write(buffer.getvalue().encode("utf-8-sig"))  # the mark that spreadsheets need to read UTF-8
    listed = {face["name"] for face in faces}
    others = sorted(path.name for path in (output_dir / "aligned").glob("*.png") if path.stem not in listed)
    if others:
        print(
            f"note: {len(others)} pictures in {output_dir / 'aligned'} are of no photo of this run, the first is "
            f"{others[0]}; they are not in alignment.json",
            file=sys.stderr,
        )
    for journal in output_dir.glob(".alignment-*.jsonl"):
        journal.unlink()
