"""What the inverting scripts read: faces as they are, or with `--align auto` photos, which are aligned first.

    pictures = open_faces(["photos/"], 256, Path("inverted"), align="auto", dist=setup())

Used by projector.py, pSp/scripts/inference.py and edit_conditional.py. An encoder or generator of aligned faces makes
little of a face that lies elsewhere in the picture, so that raw photos without the flag are worth a warning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common.distributed import Distributed
from common.images import image_size
from faces.folder import AlignSettings, align_folder, list_photos, looks_aligned, require_faces
from inversion.inputs import Pictures, StoredPictures, open_pictures

LOOKED_AT = 64  # pictures, for the warning: enough to know a folder by


def add_align_flag(parser) -> None:
    parser.add_argument(
        "--align",
        choices=("auto", "off"),
        default="off",
        help="auto: pictures that align_faces.py has not aligned yet are aligned first, into "
        "OUTPUT_DIR/aligned; off: all are taken as they are",
    )


def open_faces(
    sources,
    size: int,
    folder: Path,
    *,
    align: str,
    dist: Distributed,
    fit: str = "crop",
    weights_dir: Path | None = None,
    limit: int | None = None,
) -> Pictures | StoredPictures:
    """`open_pictures` of the sources; align "auto": of their faces, the largest of each photo, which `align_folder`
    puts into folder/aligned with folder/alignment.json, in the order of the photos. Left as they are: an LMDB, and
    crops of align_faces.py. limit: only the first pictures are looked at and aligned.

    `left_out` of the result: {photo: why it gave no face}. All ranks must call it. Raises as `open_pictures`;
    FileNotFoundError without the detector's weights, UserError when no photo gives a face.
    """
    pictures = open_pictures(sources, size, fit=fit)
    if isinstance(pictures, StoredPictures):
        return pictures
    known = list(zip(pictures.paths, pictures.alignment(), strict=True))[:limit]
    if align == "off":
        if dist.is_main:
            warn_of_photos(known[:LOOKED_AT], size)
        return pictures
    source_of = {path: source for source, path in list_photos(sources, folder).items()}
    known = [(path, is_crop(path, record)) for path, record in known if path in source_of]
    raw = {source_of[path]: path for path, aligned in known if not aligned}
    if not raw:
        return pictures
    n_worker = max(1, (os.cpu_count() or 1) // dist.world_size)
    records = align_folder(
        dict(sorted(raw.items())),
        folder,
        AlignSettings(size=size),
        dist=dist,
        n_worker=n_worker,
        weights_dir=weights_dir,
    )
    crops = {record.photo: [folder / "aligned" / f"{face.name}.png" for face in record.faces] for record in records}
    faces = [face for path, aligned in known for face in ([path] if aligned else crops[source_of[path]])]
    if not faces:
        require_faces(records, folder)
    pictures = open_pictures(faces, size, fit=fit)
    pictures.left_out = {
        record.photo: ": ".join(filter(None, (record.outcome, record.note))) for record in records if not record.faces
    }
    return pictures


def is_crop(path: Path, record: dict | None) -> bool:
    """Whether a picture is the crop that alignment.json tells of; the photo itself may have the same name."""
    return record is not None and image_size(path) == (record["size"], record["size"])


def warn_of_photos(known: list[tuple[Path, dict | None]], size: int) -> None:
    """One line on stderr if a picture looks like a photo: not square, or far larger than the generator's pictures."""
    for path, record in known:
        width, height = image_size(path) or (size, size)
        suspicious = (width != height or width > 2 * size) and not is_crop(path, record)
        if suspicious and looks_aligned(path) is not True:
            print(
                f"warning: {path} has {width}x{height} pixels and seems not to be aligned, as faces must be: --align "
                "auto, or align_faces.py before",
                file=sys.stderr,
            )
            return
