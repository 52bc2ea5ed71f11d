"""Inversions on disk while a run is under way: one file per image, so that a killed run loses only what was in work.

A folder of results has `parts/KEY.npz`, one per finished image, whole or absent (atomic writes). At the end they are
merged, one image at a time, into what is documented: memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.checkpoint import load_safetensors, save_safetensors
from common.cli import UserError
from common.files import atomic_write
from common.latents import save_latents
from common.runs import to_plain, write_json
from model import Generator

PARTS = "parts"
SETTINGS = "settings.json"
RENAMED = {"steps": "step"}  # settings whose flag has another name


@dataclass
class Part:
    """One finished image; or, with `reason`, one that could not be done."""

    latents: np.ndarray  # float32 [L, D]
    noise: list[np.ndarray]  # per layer, float32 [1, r, r]
    curves: dict[str, np.ndarray]  # {name: [T]}
    values: dict[str, float]  # of measures.py
    steps: int
    original: np.ndarray  # uint8 [S, S, 3]
    picture: np.ndarray  # uint8 [S, S, 3]


class Store:
    """The parts of one folder of results. Raises ValueError when it holds results of other settings."""

    def __init__(self, folder: str | Path, settings: dict, *, overwrite: bool = False, main: bool = True):
        """settings: plain values on which the results depend; compared with those of an earlier run."""
        self.folder, self.parts = Path(folder), Path(folder) / PARTS
        self.settings = json.loads(json.dumps(to_plain(settings)))
        if not main:
            return
        if overwrite and self.parts.exists():
            shutil.rmtree(self.parts)
        if self.parts.exists():
            self._require_same()
        self.parts.mkdir(parents=True, exist_ok=True)
        write_json(self.parts / SETTINGS, self.settings)

    def _require_same(self) -> None:
        try:
            earlier = json.loads((self.parts / SETTINGS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            earlier = None if next(self.parts.glob("*.npz"), None) else self.settings
        if earlier == self.settings:
            return
        if earlier is None:
            raise UserError(f"{self.folder} holds parts of a run whose settings are lost; --overwrite begins anew")
        names = [name for name in {**earlier, **self.settings} if earlier.get(name) != self.settings.get(name)]
        said = "; ".join(
            f"{RENAMED.get(name, name)} {earlier.get(name)}, now {self.settings.get(name)}" for name in names[:3]
        )
        raise UserError(
            f"{self.folder} holds results made with other settings ({said}): choose another --output_dir, "
            "or begin anew with --overwrite"
        )

    def key(self, name: str, image: torch.Tensor) -> str:
        """Of a picture: its name and its pixels, so that a changed file under an old name is done again."""
        return hashlib.sha256(name.encode() + b"\0" + image.numpy().tobytes()).hexdigest()[:24]

    def path(self, key: str) -> Path:
        return self.parts / f"{key}.npz"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def write(self, key: str, part: Part) -> None:
        """OSError naming the file when the disk is full; nothing half-written is left."""
        arrays = {"latents": part.latents, **{f"noise_{i:02d}": layer for i, layer in enumerate(part.noise)}}
        arrays |= {f"curve_{name}": curve for name, curve in part.curves.items()}
        arrays |= {name: np.frombuffer(_png(getattr(part, name)), np.uint8) for name in ("original", "picture")}
        arrays["about"] = np.array(json.dumps({"values": part.values, "steps": part.steps}))
        data = io.BytesIO()
        np.savez(data, **arrays)
        with atomic_write(self.path(key)) as file:
            file.write(data.getbuffer())

    def read(self, key: str) -> Part:
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                noise = [arrays[name] for name in sorted(arrays.files) if name.startswith("noise_")]
                curves = {name.removeprefix("curve_"): arrays[name] for name in arrays.files if name[:6] == "curve_"}
                pictures = (np.asarray(Image.open(io.BytesIO(arrays[n].tobytes()))) for n in ("original", "picture"))
                return Part(arrays["latents"], noise, curves, about["values"], about["steps"], *pictures)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise UserError(
                f"{path} is damaged ({type(error).__name__}): remove it and run the same command again, "
                "which makes it anew"
            ) from error

    def statistics(self, generator: Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """generator.latent_statistics(n) on the CPU, computed once per folder."""
        path = self.parts / "statistics.safetensors"
        if path.exists():
            tensors, _ = load_safetensors(path)
        else:
            tensors = dict(zip(("mean", "std"), generator.latent_statistics(n), strict=True))
            save_safetensors(path, tensors, {})
        return tensors["mean"].cpu(), tensors["std"].cpu()


def _png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


# -- merging -------------------------------------------------------------------------------------------------------


class DiskRows:
    """An array [N, ...] that grows on disk row by row and is then read in place: N may be larger than the memory."""

    def __init__(self, path: Path):
        self.path, self.shape, self.n = path, None, 0
        self.file = open(path, "wb")  # noqa: SIM115 - closed by `array`

    def append(self, row: np.ndarray) -> None:
        row = np.ascontiguousarray(row, np.float32)
        self.shape, self.n = row.shape, self.n + 1
        self.file.write(row.data)

    def array(self) -> np.ndarray:
        self.file.close()
        return np.memmap(self.path, np.float32, "r", shape=(self.n, *self.shape))


def merge(
    store: Store,
    keys: Sequence[str],
    names: Sequence[str],
    *,
    space: str,
    size: int,
    fingerprint: str | None,
    alignment=None,
    extra: dict | None = None,
) -> Iterator[Part]:
    """Write latents.npy, latents.json and noise.npz of the parts `keys`; yields each part on the way, for the rest.

    Uses a folder of its own inside the store until the files are in place.
    """
    losses: dict[str, list[float]] = {}
    with _scratch(store.folder) as folder:
        rows: list[DiskRows] = []
        for key in keys:
            part = store.read(key)
            if not rows:
                rows = [DiskRows(folder / f"{i}.raw") for i in range(1 + len(part.noise))]
            for row, value in zip(rows, (part.latents, *part.noise), strict=True):
                row.append(value)
            for name, value in part.values.items():
                losses.setdefault(name, []).append(value)
            yield part
        latents, *noise = (row.array() for row in rows)
        save_latents(
            store.folder,
            latents,
            names=names,
            space=space,
            size=size,
            fingerprint=fingerprint,
            losses=losses,
            alignment=alignment,
            noise=noise,
            extra=extra,
        )


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / ".merging"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_numbered(folder: Path, patterns: Iterable[str], n: int) -> None:
    """Files such as origin_12.png of an earlier, longer run: those whose number is n or more."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            number = path.stem.rpartition("_")[2]
            if number.isdigit() and int(number) >= n:
                path.unlink()
