"""Stage 1: a folder of images becomes an LMDB with every image at one or more sizes.

    python3 prepare_data.py --out faces.lmdb --size 128,256 photos/

The folder may be of any depth, with any file names and image kinds (common/images.py). Files that cannot be read are
left out and listed in OUT/skipped.csv, without a hole in the numbering. The result depends on the files and the flags
alone, not on the number of workers. A run that was killed leaves nothing that could be taken for an LMDB; one whose
result is up to date ends at once. Keys and manifest: common/lmdb_store.py.

Lossless by default: JPEG at quality 100 still halves the colour resolution in Pillow's default 4:2:0 (ADA#222).
--compat gives the bytes of rosinality's tool, that loss included.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import PIL
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, positive_int, run_script
from common.files import atomic_write
from common.images import FITS, RESAMPLE, ImageError, fit_image, list_images, open_image, read_image
from common.lmdb_store import DATA_FILE, DatasetError, StoreWriter, open_store, read_manifest, reading, sources_digest
from common.lock import lock_folder
from common.workers import map_ordered, n_cores

SETTINGS_VERSION = 1
CHUNK = 16  # files per task of a worker
MAX_SIZE = 1 << 14  # pixels
COMPAT_ASPECT = 64  # --compat scales the whole image before it takes the centre
BATCH_BYTES, BATCH_FILES = 32 << 20, 256  # a transaction closes at either


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", help="folder of images, of any depth")
    parser.add_argument("--path", dest="path_flag", metavar="PATH", help="the same, as a flag")
    parser.add_argument("--out", required=True, help="folder of the LMDB to write")
    parser.add_argument("--size", default="128,256,512,1024", help="sizes in pixels, separated by commas")
    parser.add_argument("--n_worker", type=positive_int, default=n_cores(), help="processes that read and encode")
    parser.add_argument("--resample", default="lanczos", choices=list(RESAMPLE), help="filter of the resizing")
    parser.add_argument(
        "--fit",
        default="crop",
        choices=FITS,
        help="what to do with images that are not square: keep the centre, fill up with the background, distort",
    )
    parser.add_argument("--background", default="255,255,255", help="R,G,B below transparent parts and in padding")
    parser.add_argument("--format", default="png", choices=("png", "jpeg", "webp"), help="how images are stored")
    parser.add_argument(
        "--quality", type=int, help="1..100 of jpeg (4:4:4; 95 when not given) or webp (lossless when not given)"
    )
    parser.add_argument(
        "--compat", action="store_true", help="the bytes of rosinality's tool: plain RGB, JPEG quality 100 with 4:2:0"
    )
    parser.add_argument(
        "--max_bad", default="0.05", help="unreadable files that are tolerated: a count (20), or a fraction (0.05)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished LMDB made with other settings")
    return parser


def main(args: argparse.Namespace) -> None:
    path = _choose_path(args)
    settings = _settings(args)
    max_bad = _parse_max_bad(args.max_bad)
    start = time.monotonic()
    manifest = prepare(
        path, args.out, settings=settings, n_worker=args.n_worker, max_bad=max_bad, overwrite=args.overwrite
    )
    n_enlarged = sum(min(size) < max(manifest["sizes"]) for size in manifest["source_sizes"])
    if n_enlarged:
        print(f"note: {n_enlarged} images are smaller than {max(manifest['sizes'])} px: enlarged", file=sys.stderr)
    n_skipped, megabytes = len(manifest["skipped"]), (Path(args.out) / DATA_FILE).stat().st_size / 1e6
    skipped = f", {n_skipped} skipped ({Path(args.out) / 'skipped.csv'})" if n_skipped else ""
    sizes = ", ".join(map(str, manifest["sizes"]))
    print(
        f"{args.out}: {manifest['length']} images at {sizes} px ({manifest['format']}, {manifest['resample']},"
        f" {manifest['fit']}){skipped}, {megabytes:.1f} MB, {time.monotonic() - start:.1f} s"
    )


def _choose_path(args: argparse.Namespace) -> str:
    if (args.path is None) == (args.path_flag is None):
        raise UsageError("give the folder of images once: as PATH or as --path PATH")
    return args.path or args.path_flag


def _settings(args: argparse.Namespace) -> dict:
    """The options that decide the bytes; stored in the manifest, compared with those of a finished LMDB."""
    try:
        sizes = sorted({int(size) for size in args.size.split(",")})
        background = [int(value) for value in args.background.split(",")]
    except ValueError as error:
        raise UsageError(f"--size and --background are whole numbers separated by commas: {error}") from error
    if not 1 <= sizes[0] <= sizes[-1] <= MAX_SIZE:
        raise UsageError(f"--size takes sizes of 1 to {MAX_SIZE} pixels, not {args.size}")
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise UsageError(f"--background is R,G,B with values 0..255, not {args.background}")
    codec, quality, subsampling = args.format, args.quality, "4:4:4" if args.format == "jpeg" else None
    if args.compat:
        if (codec, args.fit, quality, args.background) != ("png", "crop", None, "255,255,255"):
            raise UsageError("--compat fixes --format, --quality, --fit and --background: leave them out")
        codec, quality, subsampling = "jpeg", 100, "4:2:0"
    elif quality is not None and (codec == "png" or not 1 <= quality <= 100):
        raise UsageError("--quality is 1..100, with --format jpeg or webp; png is lossless")
    elif codec == "jpeg":
        quality = quality or 95
    settings = {"version": SETTINGS_VERSION, "sizes": sizes, "resample": args.resample, "fit": args.fit}
    settings |= {"format": codec, "quality": quality, "subsampling": subsampling}
    return settings | {"background": background, "compat": args.compat}


def _parse_max_bad(text: str) -> int | float:
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and value > 1):
        raise UsageError(f"--max_bad is a count such as 20 or a fraction such as 0.05, not {text}")
    return value


# -- one image -----------------------------------------------------------------------------------------------------


def encode_file(path: Path, settings: dict) -> tuple[list[bytes], tuple[int, int]]:
    """Reads one file. Returns its encoding at each size, and the (width, height) it had."""
    if settings["compat"]:
        return _encode_compat(path, settings)
    image = read_image(path, background=settings["background"])
    encoded = []
    for size in settings["sizes"]:
        fitted = fit_image(
            image, size, fit=settings["fit"], resample=settings["resample"], background=settings["background"]
        )
        buffer = io.BytesIO()
        fitted.save(buffer, settings["format"], **_codec_options(settings))
        encoded.append(buffer.getvalue())
    return encoded, image.size


def _codec_options(settings: dict) -> dict:
    if settings["format"] == "png":
        return {"compress_level": 3}  # a third of the time of the default 6, for 5 % more bytes (256 px faces)
    if settings["format"] == "jpeg":
        return {"quality": settings["quality"], "subsampling": settings["subsampling"]}
    if settings["quality"] is None:
        return {"lossless": True, "quality": 0, "method": 1}  # here effort, not loss: 6 times faster, 5 % more bytes
    return {"quality": settings["quality"]}


def _encode_compat(path: Path, settings: dict) -> tuple[list[bytes], tuple[int, int]]:
    """rosinality's prepare_data.py: short side to size, then the centre, by torchvision's rounding; orientation,
    profile and alpha are not looked at. The same Pillow gives the same bytes."""
    with open_image(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    if max(width, height) > COMPAT_ASPECT * min(width, height):
        raise ImageError(f"{path} cannot be read as an image: {width}x{height} pixels are too long for --compat")
    encoded = []
    for size in settings["sizes"]:
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        resized = image if scaled == image.size else image.resize(scaled, RESAMPLE[settings["resample"]])
        left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        buffer = io.BytesIO()
        resized.crop((left, top, left + size, top + size)).save(buffer, format="jpeg", quality=settings["quality"])
        encoded.append(buffer.getvalue())
    return encoded, (width, height)


# -- workers -------------------------------------------------------------------------------------------------------


def _encode_chunk(paths: list[Path], settings: dict) -> list[tuple]:
    """For each path the result of encode_file, or (the reason why the file is left out, None)."""
    results = []
    for path in paths:
        try:
            results.append(encode_file(path, settings))
        except (ImageError, OSError, MemoryError) as error:
            reason = str(error).removeprefix(f"{path} ").removeprefix("cannot be read as an image: ")
            results.append((" ".join(reason.split()) or "there is not enough memory for it", None))
    return results


def encode_all(paths: list[Path], settings: dict, n_worker: int) -> Iterator:
    """Results of _encode_chunk in the order of `paths`; a bounded number of chunks is in flight."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    encode = functools.partial(_encode_chunk, settings=settings)
    with contextlib.closing(map_ordered(encode, chunks, min(n_worker, len(chunks)), 4 * n_worker)) as results:
        for result in results:
            yield from result


# -- the stage -----------------------------------------------------------------------------------------------------


def prepare(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    settings: dict,
    n_worker: int = 1,
    max_bad: int | float = 0.05,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Makes the LMDB `out` from the images below `path`. Returns its manifest; at once if it is up to date.

    Raises FileNotFoundError or ValueError: no folder, no images, more unreadable files than `max_bad` (a count, or a
    fraction of all), a full disk, or a finished LMDB of other settings or files without `overwrite`.
    """
    path, out = Path(path), Path(out)
    files = list_images(path)
    if not files:
        raise UserError(f"{path} holds no images: a folder of .jpg, .png, ... files is expected")
    sources = [_identify(file, path) for file in files]
    if not overwrite and (finished := _finished(out, settings, sources)):
        print(f"{out} is up to date", file=sys.stderr)
        return finished
    with lock_folder(out, what="prepare_data.py"), StoreWriter(out, settings, sources) as writer:
        _fill(writer, files, settings, n_worker, progress)
        _write_skipped(out, writer.skipped)
        _refuse_bad(path, out, writer, max_bad)
        return writer.finish(pillow=PIL.__version__)


def _identify(file: Path, root: Path) -> list:
    """[name, bytes, seconds since 1970]: a file that has changed is told by these."""
    try:
        status = file.stat()
    except OSError:  # a link to nothing
        status = file.lstat()
    return [file.relative_to(root).as_posix(), status.st_size, int(status.st_mtime)]


def _finished(out: Path, settings: dict, sources: list[list]) -> dict | None:
    """The manifest of `out` if it is what these settings would make of these files; None if there is none yet.

    Raises UserError if it is a finished store of something else.
    """
    try:
        store = open_store(out)
    except DatasetError:
        return None  # nothing there, unfinished, or damaged: to be made
    with reading(store) as transaction:
        length = transaction.get(b"length")
    if length is None:
        return None
    manifest = read_manifest(store) or {}
    if manifest.get("sources_digest") == sources_digest(sources):
        differing = [name for name, value in settings.items() if manifest.get(name) != value]
        if not differing:
            return manifest
        change = f"with other settings ({', '.join(f'{n} {manifest.get(n)}, now {settings[n]}' for n in differing)})"
    else:
        change = "from other files" if manifest else "by another tool"
    raise UserError(f"{out} is a finished LMDB made {change}: choose another --out, or replace it with --overwrite")


def _fill(writer: StoreWriter, files: list[Path], settings: dict, n_worker: int, progress: bool) -> None:
    """Encode all files, a transaction per batch."""
    results = encode_all(files, settings, n_worker)
    batch, n_bytes = [], 0
    with contextlib.closing(results):
        for item in tqdm(results, total=len(files), unit="img", mininterval=1, disable=not progress):
            batch.append(item)
            n_bytes += sum(map(len, item[0]))
            if n_bytes >= BATCH_BYTES or len(batch) >= BATCH_FILES:
                writer.write(batch)
                batch, n_bytes = [], 0
        if batch:
            writer.write(batch)


def _write_skipped(out: Path, skipped: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "reason"), *skipped])
    with atomic_write(out / "skipped.csv") as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _refuse_bad(path: Path, out: Path, writer: StoreWriter, max_bad: int | float) -> None:
    n_bad, n_all = len(writer.skipped), len(writer.sources)
    listed = f"they are listed in {out / 'skipped.csv'}"
    if n_bad == n_all:
        raise UserError(f"none of the {n_all} image files in {path} can be read: {listed}")
    if n_bad > (max_bad * n_all if isinstance(max_bad, float) else max_bad):
        raise UserError(
            f"{n_bad} of {n_all} image files in {path} cannot be read, more than --max_bad {max_bad} allows: {listed};"
            " repair or remove them, or allow more"
        )


if __name__ == "__main__":
    run_script(main, build_parser())
