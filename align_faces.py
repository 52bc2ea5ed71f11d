"""Stage 0: photos become aligned square faces, framed as FFHQ frames them, and edited faces go back into their photos.

    python3 align_faces.py --photos photos/ --output_dir my-faces/
    python3 align_faces.py --paste_back older/edited --unedited older/unedited --alignment my-faces/alignment.json \\
        --photos photos/ --output_dir pasted/

Writes OUT/aligned/NAME.png, OUT/alignment.json (where each face lies in its photo) and OUT/report.csv (what became of
every photo). Photos without a face are reported and left out; the exit status is 0 unless none gave a face. Photos that
are aligned already are taken as they are. A run that was killed continues; a finished one does what is new or changed.
Faces that the detector misses can be given by hand: PHOTO.json beside the photo, or all in one file (--landmarks), as
{"landmarks": [[x, y] x 5]}: right eye, left eye, nose, right and left mouth corner, in pixels of the upright photo.

Edited faces, of any size, are found by the NAME of the crop. With the same faces before the edit (--unedited) only what
the edit changed goes into the photo. Pasting keeps the photo's size, format, alpha and EXIF; colours are sRGB.
"""

import re
import sys
from pathlib import Path

from common.cli import ArgumentParser, UsageError, positive_int, run_script
from common.flags import add_fields, read_fields
from common.workers import n_cores
from faces.settings import AlignSettings


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--photos", type=Path, required=True, help="folder of photos, of any depth, or one photo")
    add("--output_dir", type=Path, required=True, help="folder of the results")
    add_fields(parser, AlignSettings)
    add("--landmarks", type=Path, help="JSON file {photo: landmarks} of faces given by hand")
    add("--n_worker", type=positive_int, default=n_cores(), help="processes")
    add("--overwrite", action="store_true", help="do all photos again")
    add("--weights_dir", type=Path, help="folder with the detector's weights, looked into first")
    add = parser.add_argument_group("pasting back").add_argument
    add("--paste_back", type=Path, metavar="DIR", help="folder of edited faces: paste instead of align")
    add("--unedited", type=Path, metavar="DIR", help="the same faces before the edit: only what it changed is added")
    add("--alignment", type=Path, help="alignment.json that was written with the crops")
    return parser


def main(args) -> None:
    from common.lock import lock_folder
    from faces.align import MAX_SIZE
    from faces.folder import TIGHT_NOTE, align_folder, count_outcomes, list_photos, require_faces
    from faces.paste import paste_folder

    if not 8 <= args.size <= MAX_SIZE or args.aligned_tolerance < 0 or args.max_yaw < 0:
        raise UsageError(f"--size takes 8 to {MAX_SIZE}, --aligned_tolerance and --max_yaw 0 or more")
    if not re.fullmatch(r"largest|all|\d+", args.faces):
        raise UsageError(f"--faces {args.faces}: expected largest, all or a number from 0")
    if bool(args.paste_back) != bool(args.alignment):
        raise UsageError("--paste_back and --alignment go together")
    if args.unedited and not args.paste_back:
        raise UsageError("--unedited goes with --paste_back")
    out = args.output_dir
    settings = read_fields(AlignSettings, vars(args))
    options = {name: getattr(args, name) for name in ("landmarks", "n_worker", "overwrite", "weights_dir")}
    with lock_folder(out, "align_faces.py"):
        if args.paste_back:
            return paste_folder(args.photos, args.paste_back, args.alignment, out, unedited=args.unedited)
        records = align_folder(list_photos([args.photos], out), out, settings, **options)
    require_faces(records, out)
    for record in records:
        if TIGHT_NOTE in record.note:  # most of its frame is made up
            print(f"note: {record.photo}: {record.note}", file=sys.stderr)
    n_faces, outcomes = sum(len(record.faces) for record in records), count_outcomes(records)
    print(f"{n_faces} faces of {len(records)} photos ({outcomes}): {out / 'aligned'}, {out / 'report.csv'}")


if __name__ == "__main__":
    run_script(main, build_parser())
