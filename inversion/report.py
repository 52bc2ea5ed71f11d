"""Results of inversions on disk: one file per image while a run is under way, tables, grids and curves at its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.files import atomic_write
from common.grids import comparison_grid, plot_curves
from common.images import read_image
from common.latents import save_latents
from common.runs import write_json
from common.tables import write_skipped
from inversion.projector import CURVE_EVERY, CURVES
from perceptual.image_metrics import image_digest, mean_and_std, summary, write_measures
from sampling.render import CONDITION, file_names

RESULTS, ORIGINALS, PROJECTED = "inversions", "origin", "project"  # folders of the finished images
PER_GRID = 8  # columns

# -- one image -----------------------------------------------------------------------------------------------------


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
        with np.load(path, allow_pickle=False) as arrays:
            noise = [arrays[name] for name in sorted(arrays.files) if name.startswith("noise_")]
            curves = {name: arrays[f"curve_{name}"] for name in CURVES}
            return {"latents": arrays["latents"], "noise": noise, "curves": curves} | json.loads(
                str(arrays["metadata"])
            )
    except Exception:  # a damaged archive can raise anything
        return None


# -- all of them ---------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    images,
    failures: dict[int, str],
    *,
    config: dict,
    attributes: Sequence[str] | None = None,
    published_names: bool = False,
) -> None:
    """Write the files of a whole run, and one line of results on stdout; on rank 0, when all images are finished.

    failures: position -> why an image was left out. config: settings and names of the networks. attributes: names of
    each image's condition. published_names: also origin_I.png and project_I.png. ValueError when there is no result.
    """
    done, stems = [i for i in range(len(images)) if i not in failures], file_names(images.names)
    results = {i: load_result(folder / RESULTS / f"{stems[i]}.npz") for i in done}
    failures |= {i: "its result is damaged: run the same command again" for i in done if results[i] is None}
    write_skipped(folder, images.left_out | {images.names[i]: failures[i] for i in sorted(failures)})
    done = [i for i in done if i not in failures]
    if not done:
        first = next(iter(failures.values()))
        raise UserError(f"none of the {len(images)} images could be inverted; the first: {first}")
    names, results, stems = [images.names[i] for i in done], [results[i] for i in done], [stems[i] for i in done]
    alignment = images.alignment()
    alignment = [alignment[i] for i in done]
    extra = {"method": "projector", "settings": config}
    if attributes:
        extra[CONDITION] = {"attributes": attributes, "values": [result["condition"] for result in results]}
    measures = {name: [result["measures"][name] for result in results] for name in results[0]["measures"]}
    save_latents(
        folder,
        np.stack([result["latents"] for result in results]),
        names=names,
        space=config["space"],
        size=config["size"],
        fingerprint=config["generator"],
        losses=measures,
        alignment=alignment if any(alignment) else None,
        noise=[np.stack(layer) for layer in zip(*(result["noise"] for result in results), strict=True)],
        extra=extra,
    )
    steps = [result["steps"] for result in results]
    by = {"perceptual": config["perceptual"], "identity": config["identity"]}
    originals = [image_digest(np.asarray(read_image(folder / ORIGINALS / f"{stem}.png"))) for stem in stems]
    write_measures(folder / "reconstruction.csv", names, measures, steps=steps, originals=originals, **by)
    write_summary(
        folder, "projector", measures, space=config["space"], settings=config, mean_steps=np.mean(steps), **by
    )
    write_curves(folder, {name: np.stack([result["curves"][name] for result in results]) for name in CURVES}, names)
    write_grids(folder, stems, names, measures)
    for i, stem in enumerate(stems if published_names else ()):
        shutil.copyfile(folder / ORIGINALS / f"{stem}.png", folder / f"origin_{i}.png")
        shutil.copyfile(folder / PROJECTED / f"{stem}.png", folder / f"project_{i}.png")
    print(f"{folder}: {len(done)} images in {config['space'].upper()}: {summary(measures, **by)}")


def write_summary(folder: Path, method: str, measures: dict, *, space, settings, perceptual, identity, **more) -> None:
    """reconstruction.json: means and deviations of the measures, {name: N numbers}, and what they belong to."""
    statistics = {name: dict(zip(("mean", "std"), mean_and_std(v), strict=True)) for name, v in measures.items()}
    content = {"method": method, "space": space, "count": len(measures["mse"]), "perceptual_by": perceptual}
    content |= {"identity_by": identity, "measures": statistics, "settings": settings, **more}
    write_json(folder / "reconstruction.json", content)


# -- curves --------------------------------------------------------------------------------------------------------


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


# -- grids ---------------------------------------------------------------------------------------------------------


def write_grids(folder: Path, stems: Sequence[str], names: Sequence[str], measures: dict) -> None:
    """grid_K.png: PER_GRID images each, from the folders of originals and reconstructions."""
    for start in range(0, len(stems), PER_GRID):
        block = range(start, min(start + PER_GRID, len(stems)))
        files = ([folder / kind / f"{stems[i]}.png" for i in block] for kind in (ORIGINALS, PROJECTED))
        pairs = [[np.asarray(read_image(file)) for file in column] for column in files]
        captions = [f"{names[i]}: {measures['perceptual'][i]:.3f}, mse {measures['mse'][i]:.4f}" for i in block]
        with atomic_write(folder / f"grid_{start // PER_GRID:03d}.png") as file:
            comparison_grid(*pairs, captions).save(file, "PNG")
    remove_numbered(folder, ("grid_*.png",), -(-len(stems) // PER_GRID))


def remove_numbered(folder: Path, patterns: Iterable[str], n: int) -> None:
    """Remove files such as grid_012.png of an earlier, longer run: those whose number is n or more."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) >= n:
            path.unlink()
