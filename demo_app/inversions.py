"""Inversions of a photo's faces kept in a file, so that a second edit of the same photo starts at once."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.arrays import read_npz
from common.files import atomic_write
from demo_app.editor import Face, face_in
from demo_app.models import Models
from editing.edit import InvertedFace
from faces.align import alignment_of, crop_aligned
from inversion.tuning import tunable, tuned_generator

VERSION = 2  # of what set_photo makes of a photo


def inversion_file(folder: Path, photo: Path, models: Models, **settings) -> Path:
    """The file's name tells the content of the photo, the networks and the settings of `set_photo`."""
    key = hashlib.sha256(json.dumps([VERSION, models.inverted_by, settings], sort_keys=True).encode())
    key.update(photo.read_bytes())
    return Path(folder) / f"{key.hexdigest()[:24]}.npz"


def own_conditional(face: Face) -> InvertedFace | None:
    """The face's inversion in the conditional generator, where it is more than its w in another generator."""
    return face.conditional if face.conditional and face.conditional.w is not face.inversion.w else None


def save_faces(file: Path, faces: list[Face]) -> None:
    """Write what `load_faces` reads, tuned weights in half precision."""
    arrays: dict[str, np.ndarray] = {}
    for i, face in enumerate(faces):
        for name, inversion in ((f"w_{i}", face.inversion), (f"conditional_{i}", own_conditional(face))):
            if inversion is not None:
                arrays[name] = inversion.w
                weights = tunable(inversion.generator) if face.steps or inversion is face.conditional else {}
                arrays |= {f"{name}.{k}": weight.detach().half().cpu().numpy() for k, weight in weights.items()}
            if inversion is not None and inversion.condition is not None:
                arrays[f"{name}_condition"] = inversion.condition.cpu().numpy()
    info = [{"alignment": asdict(face.alignment), "steps": face.steps} for face in faces]
    with atomic_write(file) as out:
        np.savez(out, info=np.frombuffer(json.dumps(info).encode(), np.uint8), **arrays)


def load_faces(file: Path, photo: Image.Image, models: Models) -> list[Face] | None:
    """The faces of a photo that `save_faces` wrote; None where there is no such file, or it is damaged."""
    try:
        arrays, faces = read_npz(file), []
        for i, entry in enumerate(json.loads(arrays["info"].tobytes())):
            alignment = alignment_of(entry["alignment"])
            source = _inversion(arrays, f"w_{i}", models.generator)
            conditional = models.conditional and _inversion(arrays, f"conditional_{i}", models.conditional.generator)
            faces.append(Face(alignment, crop_aligned(photo, alignment), source, conditional, entry["steps"]))
        return faces or None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _inversion(arrays, name: str, generator) -> InvertedFace | None:
    if name not in arrays:
        return None
    start = f"{name}."
    weights = {k.removeprefix(start): torch.from_numpy(value) for k, value in arrays.items() if k.startswith(start)}
    condition = arrays.get(f"{name}_condition")
    condition = None if condition is None else torch.from_numpy(condition)
    return face_in(tuned_generator(generator, weights) if weights else generator, arrays[name], condition)
