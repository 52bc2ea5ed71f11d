"""Edit the faces in photos: make them older or younger, let them smile, and put them back where they were.

    python edit_photos.py photos/ --age +15 --smile 1 --output_dir edited/
    python edit_photos.py alice.jpg bob.png --age 60 --quality best
    python edit_photos.py alice.jpg --like grinning.jpg
    python edit_photos.py photos/ --age +15 --ckpt faces.safetensors --encoder encoder.safetensors --boundaries fitted/

Writes every photo under its own name and format into --output_dir, before_after/NAME.jpg, overview.jpg with up to 300
faces, and report.csv: each attribute as it was, its target, in the drawn face and in the photo. Attributes are read by
a scorer that took no part in finding the edits; a change of age of which the photo shows nothing is left out, unless
--strength names a factor. Inversions are kept in OUTPUT_DIR/inversions: another edit of the same photos takes less
than two seconds each. A photo without a face is reported and skipped; the exit status is 1 if none was edited. Of
folders within a folder of photos, those that this script wrote are left out.
"""

import sys
from pathlib import Path

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, run_script
from demo_app.flags import QUALITY, add_model_flags, model_flags
from demo_app.targets import FLAGS, parse_gender, parse_share, parse_years


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("photos", type=Path, nargs="+", help="photos, or folders of photos")
    add("--age", type=parse_years, help="years: 60, or a change as +15 or -10")
    add("--gender", type=parse_gender, help="female, male, or a number from 0 (female) to 1 (male)")
    add("--smile", type=parse_share, help="0 none, 1 broad, or a change as +0.5")
    add("--glasses", type=parse_share, help="0 none, 1 glasses; age and the rest are read without them")
    add("--mouth_open", type=parse_share, help="0 closed, 1 open, or a change")
    add("--like", type=Path, help="photo of a face whose expression is taken over")
    add("--strength", type=positive, default=1.0, help="factor on the edit, uncorrected; 1: what the photo needs")
    add("--quality", choices=QUALITY, default="good", help="how long each face is refined")
    add("--faces", choices=("largest", "all"), default="largest", help="which of a photo's faces")
    add("--output_dir", type=Path, default=Path("edited"), help="folder for the results")
    add_model_flags(parser)
    add_device_flags(parser, distributed=False)
    return parser


def main(args) -> None:
    targets = {name: target for name, flag in FLAGS.items() if (target := getattr(args, flag)) is not None}
    if not targets and args.like is None:
        raise UsageError("say what to change: --age, --gender, --smile, --glasses, --mouth_open or --like")
    from common.distributed import resolve_device
    from common.lock import lock_folder
    from demo_app.batch import INVERSIONS, OWN_FILES, PhotoBatch, select_targets
    from demo_app.editor import PhotoError, expression_of
    from demo_app.models import load_models
    from faces.folder import list_photos, require_elsewhere

    photos = list_photos(args.photos, args.output_dir)
    require_elsewhere(photos, args.output_dir, INVERSIONS, OWN_FILES)
    models = load_models(resolve_device(args.device, ops=args.ops), **model_flags(args))
    print(f"note: {models.describe()}", file=sys.stderr)
    try:
        targets = expression_of(args.like, models) | targets if args.like else targets
    except PhotoError as error:
        raise UserError(f"--like {args.like}: {error}") from None
    targets = select_targets(targets, models)
    settings = {"steps": QUALITY[args.quality], "faces": args.faces, "strength": args.strength}
    with lock_folder(args.output_dir, "edit_photos.py"):
        PhotoBatch(models, args.output_dir, targets, **settings).run(photos)


if __name__ == "__main__":
    run_script(main, build_parser())
