"""One edit of many photos: edit_photos.py."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.cli import UserError
from common.grids import make_grid, make_strip
from common.images import ImageError, read_image, reading_losses, save_image
from common.tables import write_table
from demo_app.editor import Edited, Face, PhotoEditor, shrink
from demo_app.inversions import inversion_file, load_faces, own_conditional, save_faces
from demo_app.models import Models
from demo_app.targets import Target
from faces.align import outside_share
from faces.detect import DetectorError
from faces.folder import INVERSIONS, OVERVIEW, PAIRS, TIGHT
from faces.paste import save_like
from sampling.render import file_names

SIDE = 900  # pixels of the longer side of a photo in before_after/
SHOWN = 300  # faces in overview.jpg: a JPEG ends at 65,500 pixels
OVERHEAD = 15  # detection, edit and files, in steps of refinement: for the progress bar
OWN_FILES = (OVERVIEW, "report.csv")


def select_targets(targets: dict[str, Target], models: Models) -> dict[str, Target]:
    """Targets that the models can edit; the others are named on stderr. Raises UserError when none is left."""
    if missing := [name for name in targets if name not in models.attributes]:
        known = f"only {', '.join(models.attributes) or 'nothing'} can be edited"
        message = f"there is no boundary of {', '.join(missing)} for {models.generator.path.name}: {known}"
        message += " (edit_attribute.py fits boundaries, --boundaries names their folder)"
        if len(missing) == len(targets):
            raise UserError(message)
        print(f"note: {message}", file=sys.stderr)
    return {name: target for name, target in targets.items() if name not in missing}


@dataclass
class PhotoBatch:
    """One edit of many photos; files are read and written beside the edits. tiles: of overview.jpg, face before, after,
    and caption."""

    models: Models
    folder: Path
    targets: dict[str, Target]
    steps: int
    faces: str = "largest"
    strength: float = 1.0
    tiles: list[tuple[Image.Image, Image.Image, str]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)

    def run(self, photos: dict[str, Path]) -> None:
        """Edit photos {name relative to their folder: path}. Raises UserError when none could be edited."""
        failed, saves, total = set(), {}, len(photos) * (self.steps + OVERHEAD)
        stems = dict(zip(photos, file_names(list(photos)), strict=True))
        with tqdm(total=total, unit="step", disable=None) as bar, ThreadPoolExecutor(2) as pool:

            def attempt(name, path, work):
                try:
                    return work()
                except (ImageError, DetectorError, UserError, FileNotFoundError) as error:
                    failed.add(name)
                    bar.write(f"left out: {name}: {str(error).removeprefix(f'{path} ')}", file=sys.stderr)

            paths = [*photos.values(), None]
            following = pool.submit(self.load, paths[0])
            for i, (name, path) in enumerate(photos.items()):
                for done in [other for other, save in saves.items() if save.done()]:  # a full disk ends the run here
                    attempt(done, photos[done], saves.pop(done).result)
                loading, following = following, paths[i + 1] and pool.submit(self.load, paths[i + 1])
                bar.set_description(Path(name).name[:24])
                if images := attempt(name, path, lambda name=name, one=loading: self.edit(name, *one.result(), bar)):
                    saves[name] = pool.submit(self.save, name, stems[name], path, *images, bar)
                bar.update((i + 1) * (self.steps + OVERHEAD) - bar.n)
            for name, save in saves.items():
                attempt(name, photos[name], save.result)
        if len(failed) == len(photos):
            raise UserError(f"none of {len(photos)} photos could be edited")
        write_table(self.folder / "report.csv", self.rows)
        crops = [crop for before, after, _ in self.tiles for crop in (before, after)]
        captions = [text for *_, caption in self.tiles for text in ("before", caption)]
        save_image(make_strip(crops, captions, nrow=min(6, len(crops))), self.folder / OVERVIEW, quality=90)
        left_out = f", {len(failed)} left out" if failed else ""
        if "age" in self.targets and (error := self.models.scorer.errors.get("age")):
            print(f"ages are read to ±{error:.0f} years, the scorer's mean error on faces that it did not learn from")
        print(f"{len(photos) - len(failed)} photos edited{left_out}: {self.folder / OVERVIEW}")

    def load(self, path: Path) -> tuple[Image.Image, Path, list[Face] | None]:
        """A photo, the file of its inversions, and the faces that the file holds, if it is there."""
        photo = read_image(path)
        file = inversion_file(self.folder / INVERSIONS, path, self.models, steps=self.steps, faces=self.faces)
        return photo, file, load_faces(file, photo, self.models)

    def edit(self, name: str, photo: Image.Image, file: Path, kept: list[Face] | None, bar: tqdm) -> tuple:
        """The photo before and after, PIL images; file, kept: of `load`."""
        editor = PhotoEditor(self.models)
        if kept:
            editor.photo, editor.faces = photo, kept
        else:
            editor.set_photo(photo, steps=self.steps, faces=self.faces, callback=bar.update)
            if n := editor.left_out:
                small = f"{n} {'face' if n == 1 else 'faces'} of fewer than {self.models.size} pixels stay as they are"
                bar.write(f"note: {name}: {small}", file=sys.stderr)
        before = [own_conditional(face) for face in kept or []]
        result = editor.edit(self.targets, strength=self.strength)
        if not kept or before != [own_conditional(face) for face in editor.faces]:
            save_faces(file, editor.faces)
        self.report(name, result, bar)
        return photo, result.photo

    def save(self, name: str, stem: str, path: Path, photo: Image.Image, edited: Image.Image, bar: tqdm) -> None:
        """The edited photo and before_after/STEM.jpg."""
        target = self.folder / (f"{Path(name).stem}-photo{Path(name).suffix}" if name in OWN_FILES else name)
        saved = save_like(edited, path, target)
        pair = make_grid([shrink(image, SIDE) for image in (photo, edited)], 2, padding=8)
        save_image(pair, self.folder / PAIRS / f"{stem}.jpg", quality=90)
        for loss in reading_losses(path):
            bar.write(f"note: {saved} has {loss} of {path}", file=sys.stderr)

    def report(self, name: str, result: Edited, bar: tqdm) -> None:
        """Print a line per face; add it to overview.jpg and report.csv."""
        for i, face_edit in enumerate(result.faces):
            label = name if len(result.faces) == 1 else f"{name}, face {i + 1}"
            words = [f"{attribute} {reading.describe()}" for attribute, reading in face_edit.readings.items()]
            bar.write(f"{label}: {'; '.join(words)}", file=sys.stdout)
            if (share := outside_share(face_edit.face.alignment)) > TIGHT:
                bar.write(f"note: {label}: {share:.0%} of the face's frame lies outside the photo", file=sys.stderr)
            if len(self.tiles) < SHOWN:
                self.tiles.append((face_edit.face.crop, face_edit.crop, words[0].split(",")[0]))
            for attribute, reading in face_edit.readings.items():
                values = {k: getattr(reading, k) for k in ("before", "goal", "drawn", "photo")}
                values["position"] = face_edit.positions.get(attribute, 0.0)
                row = {"file": name, "face": i, "attribute": attribute, "visible": int(reading.visible)}
                self.rows.append(row | {k: round(value, 3) for k, value in values.items()})
