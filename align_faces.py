"""Stage 0: photos become aligned square faces, framed as FFHQ frames them, and edited faces go back into their photos.

    python3 align_faces.py --photos photos/ --output_dir my-faces/
    python3 align_faces.py --paste_back older/edited --unedited older/unedited --alignment my-faces/alignment.json \\
        --photos photos/ --output_dir pasted/

Writes OUT/aligned/NAME.png, OUT/alignment.json (per face where it lies in its photo: all that pasting back needs) and
OUT/report.csv (what became of every photo). A photo without a face, a profile beyond --max_yaw or a damaged file is
reported and left out; the exit status is 0 unless no photo at all gave a face. Photos that are aligned already are
taken as they are. A run that was killed continues where it stopped; a finished one only does what is new or changed.
Faces that the detector misses can be given by hand: PHOTO.json beside the photo, or all in one file (--landmarks), as
{"landmarks": [[x, y] x 5]}: right eye, left eye, nose, right and left mouth corner, in pixels of the upright photo.

Edited faces are found by the NAME of the crop; they may have any size. With the same faces before the edit (--unedited)
only what the edit changed goes into the photo, which so keeps its sharpness and all that the inversion had missed.
Pasting keeps the photo's size, file format where it can hold a photo, alpha and EXIF; colours are sRGB. Of an animation
or several pages the first is pasted into, of 16 bits per channel 8 are kept: it is said.
"""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, add_rank_flags, positive_int, run_script
from common.distributed import setup, shutdown
from common.images import list_images, read_image, reading_losses
from common.lock import lock_folder
from common.workers import n_cores
from faces.align import DETAILS, FRAMINGS, paste_back, read_alignment
from faces.folder import TIGHT_NOTE, AlignSettings, align_folder, count_outcomes, list_photos, require_faces
from faces.photo_file import save_like


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos, of any depth, or one photo")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", type=int, default=256, help="side of the aligned faces in pixels")
    parser.add_argument("--faces", default="largest", help="largest | all | INDEX; 0 is the largest face of a photo")
    parser.add_argument("--landmarks", type=Path, help="JSON file {photo: landmarks} of faces given by hand")
    parser.add_argument(
        "--framing",
        default="ffhq",
        choices=FRAMINGS,
        help="the formula of FFHQ, or the best fit of eyes and mouth to the mean face",
    )
    parser.add_argument(
        "--aligned_tolerance",
        type=float,
        default=4.0,
        help="a square photo whose eyes and mouth lie within this many %% of its side from their "
        "places in an FFHQ frame is taken as it is; 0: never",
    )
    parser.add_argument(
        "--max_yaw",
        type=float,
        default=90.0,
        help="leave out heads that are turned further, in degrees (an estimate); 90: none",
    )
    parser.add_argument("--score_threshold", type=float, default=0.6, help="certainty from which a detection counts")
    parser.add_argument("--n_worker", type=positive_int, default=n_cores(), help="processes")
    parser.add_argument("--overwrite", action="store_true", help="do all photos again")
    parser.add_argument("--weights_dir", type=Path, help="folder with the detector's weights, looked into first")
    add_rank_flags(parser)
    paste = parser.add_argument_group("pasting back")
    paste.add_argument("--paste_back", type=Path, metavar="DIR", help="folder of edited faces: paste instead of align")
    paste.add_argument(
        "--unedited",
        type=Path,
        metavar="DIR",
        help="folder of the same faces before the edit: only what it changed is added",
    )
    paste.add_argument("--alignment", type=Path, help="alignment.json that was written with the crops")
    paste.add_argument("--feather", type=float, default=0.1, help="width of the soft border, of the face's side")
    paste.add_argument(
        "--detail",
        default="auto",
        choices=DETAILS,
        help="detail of the photo that is finer than the crop: keep it where the edit left the "
        "structure alone (auto), everywhere, nowhere",
    )
    return parser


def main(args) -> None:
    if args.size < 8 or args.aligned_tolerance < 0:
        raise UsageError("--size takes 8 or more, --aligned_tolerance 0 or more")
    if not 0 <= args.feather <= 0.5 or not 0 < args.score_threshold < 1:
        raise UsageError("--feather takes 0 to 0.5, --score_threshold above 0 and below 1")
    if not re.fullmatch(r"largest|all|\d+", args.faces):
        raise UsageError(f"--faces {args.faces}: expected largest, all or a number from 0")
    if bool(args.paste_back) != bool(args.alignment):
        raise UsageError("--paste_back and --alignment go together")
    if args.unedited and not args.paste_back:
        raise UsageError("--unedited goes with --paste_back")
    if args.paste_back:
        paste_folder(
            args.photos,
            args.paste_back,
            args.alignment,
            args.output_dir,
            unedited=args.unedited,
            feather=args.feather,
            detail=args.detail,
        )
        return
    settings = AlignSettings(**{field.name: getattr(args, field.name) for field in fields(AlignSettings)})
    dist = setup("cpu", timeout=args.dist_timeout)
    try:
        with lock_folder(args.output_dir, "align_faces.py") if dist.is_main else contextlib.nullcontext():
            records = align_folder(
                list_photos([args.photos], args.output_dir),
                args.output_dir,
                settings,
                dist=dist,
                landmarks=args.landmarks,
                n_worker=args.n_worker,
                overwrite=args.overwrite,
                weights_dir=args.weights_dir,
            )
            require_faces(records, args.output_dir)
    finally:
        shutdown()
    if dist.is_main:
        report(records, args.output_dir)


def report(records, output_dir) -> None:
    """Summary on stdout; on stderr each photo that was cut so tightly that most of its frame is made up."""
    for record in records:
        if TIGHT_NOTE in record.note:
            print(f"note: {record.photo}: {record.note}", file=sys.stderr)
    n_faces = sum(len(record.faces) for record in records)
    print(
        f"{n_faces} faces of {len(records)} photos ({count_outcomes(records)}): {output_dir / 'aligned'}, "
        f"{output_dir / 'report.csv'}"
    )


# -- pasting back --------------------------------------------------------------------------------------------------


def paste_folder(photos, edited, alignment_file, output_dir, *, unedited=None, **options):
    """Pastes every edited face NAME.* into its photo; the results keep the photos' relative paths. unedited: a folder
    with the same faces before the edit, under the same names.

    Prints what was pasted and, one line each, what could not be. Raises ValueError when nothing could.
    """
    alignments = read_alignment(alignment_file)
    root = photos if photos.is_dir() else photos.parent
    by_photo: dict[str, list] = {}
    problems = []
    for path in list_images(edited):
        if path.stem in alignments:
            by_photo.setdefault(alignments[path.stem].source, []).append((path, alignments[path.stem]))
        else:
            problems.append(f"{path}: no face called {path.stem} in {alignment_file}")
    pasted, n_faces, notes = 0, 0, []
    for source, faces in tqdm(sorted(by_photo.items()), desc="pasting", unit="photo", disable=None):
        try:
            result = read_image(root / source)
            for path, alignment in faces:
                before = read_image(unedited / path.relative_to(edited)) if unedited else None
                result = paste_back(result, read_image(path), alignment, unedited=before, **options)
            saved = save_like(result, root / source, output_dir / source)
            notes += [f"{saved} has {loss} of {root / source}" for loss in reading_losses(root / source)]
            pasted, n_faces = pasted + 1, n_faces + len(faces)
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"{root / source}: {error}")
    for line in [f"left out: {problem}" for problem in problems] + [f"note: {note}" for note in notes]:
        print(line, file=sys.stderr)
    if pasted == 0:
        raise UserError(f"no face of {edited} could be pasted into a photo of {photos} ({len(problems)} left out)")
    print(f"{n_faces} faces pasted into {pasted} photos, {len(problems)} left out: {output_dir}")


if __name__ == "__main__":
    run_script(main, build_parser())
