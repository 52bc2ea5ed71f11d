"""Edit the faces in photos: make them older or younger, let them smile, and put them back where they were.

    python edit_photos.py photos/ --age +15 --smile 1 --output_dir edited/
    python edit_photos.py alice.jpg bob.png --age 60 --quality best
    python edit_photos.py alice.jpg --like grinning.jpg

Writes every photo under its own name and format into --output_dir, before_after/NAME.jpg, overview.jpg with all faces,
and report.csv: each attribute as it was, as asked, in the drawn face and in the photo. Attributes are read by a scorer
that took no part in finding the edits. Inversions are kept in OUTPUT_DIR/inversions: another edit of the same photos
takes about a second each. A photo without a face is reported and passed over; the exit status is 1 if none was edited.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, run_script
from common.distributed import resolve_device
from common.grids import make_strip
from common.images import ImageError, read_image, reading_losses, save_image
from common.lock import lock_folder
from common.tables import write_table
from demo_app.editor import Edited, PhotoEditor
from demo_app.inversions import inversion_file, load_faces, save_faces
from demo_app.models import Models, load_models
from demo_app.targets import Target
from faces.align import AlignError, crop_aligned, outside_share
from faces.folder import list_photos
from faces.photo_file import save_like

QUALITY = {"fast": 0, "good": 40, "best": 160}  # steps of refinement after the encoder
FLAGS = {"age": "age", "gender": "gender", "smile": "smile", "glasses": "eyeglasses", "mouth_open": "mouth_open"}
EXPRESSION = ("smile", "mouth_open", "eyes_open")  # taken over from --like
SIDE = 900  # pixels of the longer side of a photo in before_after/
TIGHT = 0.4  # share of a face's frame outside the photo from which it is said
OVERHEAD = 15  # detection, edit and files, in steps of refinement: for the progress bar
OWN_FILES = ("overview.jpg", "report.csv")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, nargs="+", help="photos, or folders of photos")
    parser.add_argument("--age", type=parse_target, help="years: 60, or a change as +15 or -10")
    parser.add_argument("--gender", type=parse_gender, help="female, male, or a number from 0 (female) to 1 (male)")
    parser.add_argument("--smile", type=parse_target, help="0 none, 1 broad, or a change as +0.5")
    parser.add_argument("--glasses", type=parse_target, help="0 none, 1 glasses; needs a boundary for them")
    parser.add_argument("--mouth_open", type=parse_target, help="0 closed, 1 open, or a change")
    parser.add_argument("--like", type=Path, help="photo of a face whose expression is taken over")
    parser.add_argument("--strength", type=positive, default=1.0, help="factor on the edit; 1: what the photo needs")
    parser.add_argument("--quality", choices=QUALITY, default="good", help="how long each face is refined")
    parser.add_argument("--faces", choices=("largest", "all"), default="largest", help="which of a photo's faces")
    parser.add_argument("--output_dir", type=Path, default=Path("edited"), help="folder for the results")
    parser.add_argument("--ckpt", type=Path, help="generator (default: the largest checkpoints/face-wpp-SIZE)")
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    return parser


def parse_target(text: str) -> Target:
    """'60' -> a goal; '+15', '-10' -> a change."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) <= 200:
        raise argparse.ArgumentTypeError(f"expected a number such as 60, +15 or -10, not {text!r}")
    return Target(value, relative=text.strip()[0] in "+-")


def parse_gender(text: str) -> Target:
    return Target({"female": 0.0, "male": 1.0}[text]) if text in ("female", "male") else parse_target(text)


def main(args) -> None:
    targets = {name: target for flag, name in FLAGS.items() if (target := getattr(args, flag)) is not None}
    if not targets and args.like is None:
        raise UsageError("say what to change: --age, --gender, --smile, --glasses, --mouth_open or --like")
    photos = list_photos(args.photos, args.output_dir)
    models = load_models(resolve_device(args.device, ops=args.ops), ckpt=args.ckpt, weights_dir=args.weights_dir)
    print(f"note: {models.describe()}", file=sys.stderr)
    targets = expression_of(args.like, models) | targets if args.like else targets
    targets = possible(targets, models)
    batch = PhotoBatch(
        models, args.output_dir, targets, steps=QUALITY[args.quality], faces=args.faces, strength=args.strength
    )
    with lock_folder(args.output_dir, "edit_photos.py"):
        batch.run(photos)


def possible(targets: dict[str, Target], models: Models) -> dict[str, Target]:
    """Targets that the models can edit; the others are named on stderr. Raises UserError when none is left."""
    missing = [name for name in targets if name not in models.attributes]
    if missing:
        message = (
            f"there is no boundary of {', '.join(missing)} for {models.generator.path.name}: "
            f"it can edit {', '.join(models.attributes) or 'nothing'} (edit_attribute.py fits others)"
        )
        if len(missing) == len(targets):
            raise UserError(message)
        print(f"note: {message}", file=sys.stderr)
    return {name: target for name, target in targets.items() if name not in missing}


def expression_of(photo: Path, models: Models) -> dict[str, Target]:
    """The expression of the largest face of a photo as targets."""
    editor = PhotoEditor(models)
    editor.set_photo(read_image(photo))
    (scores,) = editor.read([editor.faces[0].crop])
    names = [name for name in EXPRESSION if name in models.attributes]
    return {name: Target(float(scores[models.reader.column(name)])) for name in names}


@dataclass
class PhotoBatch:
    """One edit of many photos. tiles: face before and after, and its caption, for the overview."""

    models: Models
    folder: Path
    targets: dict[str, Target]
    steps: int
    faces: str = "largest"
    strength: float = 1.0
    tiles: list[tuple[Image.Image, Image.Image, str]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)

    def run(self, photos: dict[str, Path]) -> None:
        """photos: {name relative to their folder: path}. Raises UserError when none could be edited."""
        failed = []
        with tqdm(total=len(photos) * (self.steps + OVERHEAD), unit="step", disable=None) as bar:
            for i, (name, path) in enumerate(photos.items()):
                bar.set_description(Path(name).name[:24])
                try:
                    self.edit(name, path, bar)
                except (ImageError, AlignError, UserError) as error:
                    failed.append(name)
                    bar.write(f"left out: {name}: {str(error).removeprefix(f'{path} ')}", file=sys.stderr)
                bar.update((i + 1) * (self.steps + OVERHEAD) - bar.n)
        if len(failed) == len(photos):
            raise UserError(f"none of {len(photos)} photos could be edited")
        crops = [crop for before, after, _ in self.tiles for crop in (before, after)]
        captions = [text for *_, caption in self.tiles for text in ("before", caption)]
        save_image(make_strip(crops, captions, nrow=min(6, len(crops))), self.folder / "overview.jpg", quality=90)
        write_table(self.folder / "report.csv", self.rows)
        left_out = f", {len(failed)} left out" if failed else ""
        print(f"{len(photos) - len(failed)} photos edited{left_out}: {self.folder / 'overview.jpg'}")

    def edit(self, name: str, path: Path, bar: tqdm) -> None:
        """One photo: its results appear at once."""
        photo, editor = read_image(path), PhotoEditor(self.models)
        file = inversion_file(self.folder / "inversions", path, self.models, steps=self.steps, faces=self.faces)
        kept = load_faces(file, photo, self.models)
        if kept:
            editor.set_faces(photo, kept)
        else:
            editor.set_photo(photo, steps=self.steps, faces=self.faces, callback=lambda: bar.update())
        has_expression = [face.expression is not None for face in editor.faces]
        result = editor.edit(self.targets, strength=self.strength)
        if not kept or [face.expression is not None for face in editor.faces] != has_expression:
            save_faces(file, editor.faces)
        target = self.folder / (f"{Path(name).stem}-photo{Path(name).suffix}" if name in OWN_FILES else name)
        saved = save_like(result.photo, path, target)
        pair = [fit_within(image, SIDE) for image in (photo, result.photo)]
        save_image(side_by_side(pair), (self.folder / "before_after" / name).with_suffix(".jpg"), quality=90)
        self.report(name, photo, result, bar)
        for loss in reading_losses(path):
            bar.write(f"note: {saved} has {loss} of {path}", file=sys.stderr)

    def report(self, name: str, photo: Image.Image, result: Edited, bar: tqdm) -> None:
        """A line on stdout per face, and what overview.jpg and report.csv say of it."""
        for i, face_edit in enumerate(result.faces):
            alignment = face_edit.face.alignment
            label = name if len(result.faces) == 1 else f"{name}, face {i + 1}"
            words = describe(face_edit.readings)
            bar.write(f"{label}: {'; '.join(words)}", file=sys.stdout)
            if (share := outside_share(alignment)) > TIGHT:
                bar.write(f"note: {label}: {share:.0%} of the face's frame lies outside the photo", file=sys.stderr)
            crops = [crop_aligned(image, alignment) for image in (photo, result.photo)]
            self.tiles.append((*crops, words[0].split(",")[0]))
            for attribute, reading in face_edit.readings.items():
                values = {k: round(getattr(reading, k), 3) for k in ("before", "goal", "drawn", "photo")}
                position = round(face_edit.positions.get(attribute, 0.0), 3)
                row = {"photo": name, "face": i, "attribute": attribute, **values, "position": position}
                self.rows.append(row | {"visible": int(reading.visible)})


def describe(readings) -> list[str]:
    """'age 31 -> 46, asked 46', per attribute; what did not arrive is said."""
    lines = []
    for name, reading in readings.items():
        digits = 0 if reading.kind == "years" else 2
        text = f"{name} {reading.before:.{digits}f} -> {reading.photo:.{digits}f}, asked {reading.goal:.{digits}f}"
        text += f" ({reading.drawn:.{digits}f} in the drawn face)"
        lines.append(text + ("" if reading.visible else ": no visible effect"))
    return lines


def fit_within(image: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels on the longer side."""
    scale = min(1.0, side / max(image.size))
    size = [max(1, round(scale * value)) for value in image.size]
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else image


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a row."""
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * width + 8 * (len(images) - 1), height), (255, 255, 255))
    for i, image in enumerate(images):
        row.paste(image, (i * (width + 8), 0))
    return row


if __name__ == "__main__":
    run_script(main, build_parser())
