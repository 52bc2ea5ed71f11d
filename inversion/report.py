"""Results of inversions on disk: one file per image while a run is under way, tables, grids and curves at its end."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.arrays import read_npz, require_floats
from common.cli import UserError
from common.files import atomic_path, atomic_write, parse_json
from common.grids import comparison_grid, plot_curves
from common.images import read_image, save_image
from common.latents import save_latents
from common.runs import write_json
from common.tables import write_skipped
from inversion.projector import CURVE_EVERY, CURVES
from perceptual.image_metrics import image_digest, mean_and_std, summary, write_measures
from sampling.render import CONDITION, blocks, file_names

RESULTS, ORIGINALS, PROJECTED = "inversions", "origin", "project"  # folders of the finished images
PER_GRID = 8  # columns
METADATA = {"measures": {str: float}, "steps": int, "condition": ([float], None), "digest": str}


@dataclass
class InversionResults:
    """Results of images, in order: lists of equal length, but for `pairs`."""

    positions: list[int] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # float32 [L, D]
    measures: dict[str, list[float]] = field(default_factory=dict)  # of perceptual/image_metrics.py
    originals: list[str] = field(default_factory=list)  # image_digest of each original as it was measured
    pairs: Iterable[tuple] = field(default_factory=list)  # original and output of the first few, uint8 [S, S, 3]
    steps: list[int] | None = None
    noise: list[np.ndarray] | None = None  # per layer [N, 1, r, r]


def save_result(path: Path, result: dict) -> None:
    """Write what `load_result` reads. OSError naming the file when the disk is full; nothing half-written is left."""
    arrays = {"latents": result["latents"]} | {f"noise_{i:02d}": layer for i, layer in enumerate(result["noise"])}
    arrays |= {f"curve_{name}": curve for name, curve in result["curves"].items()}
    metadata = {name: value for name, value in result.items() if name not in ("latents", "noise", "curves")}
    with atomic_write(path) as file:
        np.savez(file, **arrays, metadata=np.array(json.dumps(metadata)))


def load_result(path: Path) -> dict | None:
    """A finished image: latents [L, D], noise: per layer [1, r, r], curves: {name: [T]}, measures: {name: number},
    steps, condition (None or d numbers), digest (of pixels and settings). None for a file that is absent or damaged."""
    try:
        arrays = read_npz(path, "result of an inversion")
        metadata = parse_json(str(arrays.pop("metadata")), METADATA, source=path, what="result of an inversion")
        noise = [require_floats(arrays[name], path) for name in sorted(arrays) if name.startswith("noise_")]
        curves = {name: arrays[f"curve_{name}"] for name in CURVES}  # NaN after an early stop
        if any(curve.dtype.kind != "f" or curve.ndim != 1 for curve in curves.values()):
            raise ValueError("curves are numbers [T]")
        return {"latents": require_floats(arrays["latents"], path), "noise": noise, "curves": curves} | metadata
    except (FileNotFoundError, ValueError, KeyError):
        return None


def write_report(folder: Path, images, failures: dict[int, str], *, config: dict, attributes, published_names) -> None:
    """Write the files of a whole run, and one line of results on stdout; on rank 0, when all images are finished.
    failures: position -> why an image was left out. config: settings and names of the networks. attributes: names of
    each image's condition, or None. published_names: also origin_I.png and project_I.png. UserError without any
    result."""
    stems = file_names(images.names)
    results = {i: load_result(folder / RESULTS / f"{stems[i]}.npz") for i in range(len(images)) if i not in failures}
    failures |= {i: "its result is damaged: run the same command again" for i in results if results[i] is None}
    done = [i for i in results if i not in failures]
    require_results(folder, images, failures, done)
    results, stems = [results[i] for i in done], [stems[i] for i in done]

    def read(kind, stem):
        return np.asarray(read_image(folder / kind / f"{stem}.png"))

    inversion = InversionResults(
        positions=done,
        latents=[result["latents"] for result in results],
        measures={name: [result["measures"][name] for result in results] for name in results[0]["measures"]},
        originals=[image_digest(read(ORIGINALS, stem)) for stem in stems],
        pairs=((read(ORIGINALS, stem), read(PROJECTED, stem)) for stem in stems),
        steps=[result["steps"] for result in results],
        noise=[np.stack(layer) for layer in zip(*(result["noise"] for result in results), strict=True)],
    )
    extra = {"settings": config}
    if attributes:
        extra[CONDITION] = {"attributes": attributes, "values": [result["condition"] for result in results]}
    generator = {"space": config["space"], "size": config["size"], "fingerprint": config["generator"]}
    by = {"perceptual": config["perceptual"], "identity": config["identity"]}
    source = {"method": "projector", "generator": generator, "by": by}
    line = write_results(folder, images, inversion, **source, settings=config, extra=extra)
    curves = {name: np.stack([result["curves"][name] for result in results]) for name in CURVES}
    write_curves(folder, curves, [images.names[i] for i in done])
    for i, stem in enumerate(stems if published_names else ()):
        for kind in (ORIGINALS, PROJECTED):
            with atomic_path(folder / f"{kind}_{i}.png") as copy:
                shutil.copyfile(folder / kind / f"{stem}.png", copy)
    print(f"{folder}: {len(done)} images in {config['space'].upper()}: {line}")


def require_results(folder: Path, images, failures: dict[int, str], done: Sequence[int]) -> None:
    """Write skipped.csv; UserError when nothing is left."""
    write_skipped(folder, images.left_out | {images.names[i]: failures[i] for i in sorted(failures)})
    if not done:
        first = next(iter(failures.values()))
        raise UserError(f"none of the {len(images)} images could be inverted; the first: {first}")


def write_results(
    folder: Path,
    images,  # all of them, of inversion/inputs.py
    inversion: InversionResults,  # of those that have results
    *,
    method: str,
    generator: dict,  # its space, size and fingerprint
    by: dict,  # names of the networks that compared
    settings: dict,
    extra: dict,  # for latents.json
    **more,  # for reconstruction.json
) -> str:
    """latents.npy and .json, reconstruction.csv and .json, grid_K.png; returns a line on the measures."""
    measures, steps = inversion.measures, inversion.steps
    alignment = images.alignment()
    alignment = [alignment[i] for i in inversion.positions]
    names = [images.names[i] for i in inversion.positions]
    saved = {"names": names, "losses": measures, "alignment": alignment if any(alignment) else None}
    saved |= {"noise": inversion.noise, "extra": {"method": method} | extra}
    save_latents(folder, np.stack(inversion.latents), **saved, **generator)
    write_measures(folder / "reconstruction.csv", names, measures, steps=steps, originals=inversion.originals, **by)
    statistics = {name: dict(zip(("mean", "std"), mean_and_std(v), strict=True)) for name, v in measures.items()}
    content = {"method": method, "space": generator["space"], "count": len(names), "perceptual_by": by["perceptual"]}
    content |= {"identity_by": by["identity"], "measures": statistics, "settings": settings, **more}
    content |= {"mean_steps": np.mean(steps)} if steps else {}
    write_json(folder / "reconstruction.json", content)
    numbers, n_grids = zip(names, measures["perceptual"], measures["mse"], strict=True), 0
    captions = (f"{name}: {distance:.3f}, mse {mse:.4f}" for name, distance, mse in numbers)
    for n_grids, block in enumerate(blocks(zip(inversion.pairs, captions, strict=False), PER_GRID), 1):
        pairs, labels = zip(*block, strict=True)
        save_image(comparison_grid(*zip(*pairs, strict=True), labels), folder / f"grid_{n_grids - 1:03d}.png")
    remove_grids(folder, n_grids)
    return summary(measures, **by)


def write_curves(folder: Path, curves: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """curves.npz and .png of losses [N, T], and the three arrays of the published program, float64 [T]."""
    for name, values in curves.items():
        filled = values.astype(np.float64)
        for t in range(1, values.shape[1]):  # an image that stopped early keeps its last value
            filled[:, t] = np.where(np.isnan(filled[:, t]), filled[:, t - 1], filled[:, t])
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, filled.sum(0) if name == "perceptual" else filled.mean(0))
    with atomic_write(folder / "curves.npz") as file:
        np.savez(file, steps=np.arange(curves["mse"].shape[1]) * CURVE_EVERY, names=np.array(names), **curves)
    plot_curves(curves, CURVE_EVERY, folder / "curves.png")


def remove_grids(folder: Path, first: int) -> None:
    """Remove the grids of an earlier, longer run: grid_K.png with K of `first` or more."""
    for path in folder.glob("grid_*.png"):
        number = path.stem.removeprefix("grid_")
        if number.isdigit() and int(number) >= first:
            path.unlink()
