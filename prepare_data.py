"""Stage 1: a folder of images becomes an LMDB with every image at one or more sizes.

    python3 prepare_data.py --out faces.lmdb --size 128,256 photos/

The folder may be of any depth. Files that cannot be read are left out and listed in OUT/skipped.csv, without a hole in
the numbering. The result depends on the files and the flags alone. A run that was killed leaves nothing that could be
taken for an LMDB; one whose result is up to date ends at once. Keys and manifest: common/lmdb_store.py. Lossless by
default: JPEG at quality 100 still halves the colour resolution in Pillow's 4:2:0 (ADA#222), as --compat does.
"""

import sys
import time
from pathlib import Path

from common.cli import FILTERS, FITS, ArgumentParser, UsageError, positive_int, run_script, several, whole
from common.workers import n_cores

SETTINGS_VERSION = 1
MAX_SIZE = 1 << 14  # pixels


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("path", help="folder of images, of any depth")
    add("--out", required=True, help="folder of the LMDB to write")
    add("--size", type=several(whole(1, MAX_SIZE)), default="128,256,512,1024", help="pixels, with commas between")
    add("--n_worker", type=positive_int, default=n_cores(), help="processes that read and encode")
    add("--resample", default="lanczos", choices=FILTERS, help="filter of the resizing")
    add("--fit", default="crop", choices=FITS, help="images that are not square: the centre, filled up, distorted")
    colour = several(whole(0, 255))
    add("--background", type=colour, default="255,255,255", help="R,G,B below transparent parts and in padding")
    add("--format", default="png", choices=("png", "jpeg", "webp"), help="how images are stored")
    add("--quality", type=int, help="1..100 of jpeg (4:4:4; default 95) or webp (default: lossless)")
    add("--compat", action="store_true", help="the bytes of rosinality's tool: plain RGB, JPEG quality 100 with 4:2:0")
    add("--max_bad", default="0.05", help="unreadable files that are tolerated: a count (20), or a fraction (0.05)")
    add("--overwrite", action="store_true", help="replace a finished LMDB made with other settings")
    return parser


def main(args) -> None:
    from common.lmdb_build import build_lmdb
    from common.lmdb_store import DATA_FILE

    start = time.monotonic()
    settings = read_settings(
        args.size, args.background, args.format, args.quality, args.fit, args.resample, args.compat
    )
    options = {"n_worker": args.n_worker, "max_bad": parse_max_bad(args.max_bad), "overwrite": args.overwrite}
    manifest = build_lmdb(args.path, args.out, settings=settings, **options)
    if n_enlarged := sum(min(size) < max(manifest["sizes"]) for size in manifest["source_sizes"]):
        print(f"note: {n_enlarged} images are smaller than {max(manifest['sizes'])} px: enlarged", file=sys.stderr)
    out, n_skipped, sizes = Path(args.out), len(manifest["skipped"]), ", ".join(map(str, manifest["sizes"]))
    skipped = f", {n_skipped} skipped ({out / 'skipped.csv'})" if n_skipped else ""
    form = f"({', '.join(manifest[name] for name in ('format', 'resample', 'fit'))}){skipped}"
    megabytes, seconds = (out / DATA_FILE).stat().st_size / 1e6, time.monotonic() - start
    print(f"{out}: {manifest['length']} images at {sizes} px {form}, {megabytes:.1f} MB, {seconds:.1f} s")


def read_settings(size, background, codec, quality, fit, resample, compat) -> dict:
    """The options that decide the bytes; stored in the manifest, compared with those of a finished LMDB."""
    if len(background) != 3:
        raise UsageError(f"--background is R,G,B, three numbers, not {len(background)}")
    subsampling = "4:4:4" if codec == "jpeg" else None
    if compat:
        if (codec, fit, quality, background) != ("png", "crop", None, (255, 255, 255)):
            raise UsageError("--compat fixes --format, --quality, --fit and --background: leave them out")
        codec, quality, subsampling = "jpeg", 100, "4:2:0"
    elif quality is not None and (codec == "png" or not 1 <= quality <= 100):
        raise UsageError("--quality is 1..100, with --format jpeg or webp; png is lossless")
    elif codec == "jpeg":
        quality = quality or 95
    settings = {"version": SETTINGS_VERSION, "sizes": sorted(set(size)), "resample": resample, "fit": fit}
    settings |= {"format": codec, "quality": quality, "subsampling": subsampling}
    return settings | {"background": list(background), "compat": compat}


def parse_max_bad(text: str) -> int | float:
    """A count (int), or a fraction (float) where there is a point. Raises UsageError."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and value > 1):
        raise UsageError(f"--max_bad is a count such as 20 or a fraction such as 0.05, not {text}")
    return value


if __name__ == "__main__":
    run_script(main, build_parser())
