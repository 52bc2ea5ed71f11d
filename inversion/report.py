"""Results of inversions on disk: one file per image while a run is under way, tables, grids and curves at its end."""

import json
import shutil
from collections.abc import Iterable, Sequence
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
from common.workers import blocks
from inversion.projector import CURVE_EVERY, CURVES
from perceptual.image_metrics import image_digest, mean_and_std, summary, write_measures
from sampling.render import CONDITION, file_names

RESULTS, ORIGINALS, PROJECTED = "inversions", "origin", "project"  # folders of the finished images
PER_GRID = 8  # columns
MEASURES = {"perceptual": float, "mse": float, "psnr": float, "ssim": float, "identity?": float}
METADATA = {"measures": MEASURES, "steps": int, "condition": ([float], None), "digest": str}


def save_result(path: Path, result: dict) -> None:
    """Write what `load_result` reads. OSError naming the file when the disk is full; nothing half-written is left."""
    arrays = {"latents": result["latents"]} | {f"noise_{i:02d}": layer for i, layer in enumerate(result["noise"])}
    arrays |= {f"curve_{name}": curve for name, curve in result["curves"].items()}
    metadata = {name: result[name] for name in METADATA}
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


def write_report(folder: Path, images, failures: dict[int, str], config: dict, published_names: bool) -> None:
    """Write the files of a whole run, and one line of results on stdout; on rank 0, when all images are finished.
    failures: position -> why an image was left out. config: settings.json. published_names: also origin_I.png and
    project_I.png. UserError without any result."""
    stems = file_names(images.names)
    results = {i: load_result(folder / RESULTS / f"{stems[i]}.npz") for i in range(len(images)) if i not in failures}
    failures |= {i: "its result is damaged: run the same command again" for i in results if results[i] is None}
    results = {i: result for i, result in results.items() if result}

    def read(kind, i):
        return np.asarray(read_image(folder / kind / f"{stems[i]}.png"))

    for i, result in results.items():
        result["original"] = image_digest(read(ORIGINALS, i))
    pairs = ((read(ORIGINALS, i), read(PROJECTED, i)) for i in results)
    line = write_results(folder, images, results, failures, pairs, config, method="projector")
    curves = {name: np.stack([result["curves"][name] for result in results.values()]) for name in CURVES}
    write_curves(folder, curves, [images.names[i] for i in results])
    for row, i in enumerate(results if published_names else ()):
        for kind in (ORIGINALS, PROJECTED):
            with atomic_path(folder / f"{kind}_{row}.png") as copy:
                shutil.copyfile(folder / kind / f"{stems[i]}.png", copy)
    print(f"{folder}: {len(results)} images in {config['space'].upper()}: {line}")


def write_results(
    folder: Path,
    images,  # all of them, of inversion/inputs.py
    results: dict[int, dict],  # by position: latents, measures, original (image_digest); steps, noise, condition if any
    failures: dict[int, str],  # by position: why there is none
    pairs: Iterable[tuple],  # originals and reconstructions of the first results, uint8 [S, S, 3], for the grids
    config: dict,  # settings; generator (fingerprint), size, space; perceptual, identity: names of the networks
    **info,  # for reconstruction.json: method ...
) -> str:
    """Write latents.npy and .json, reconstruction.csv and .json, grid_K.png, skipped.csv; returns a line of measures.
    UserError without any result."""
    write_skipped(folder, images.left_out | {images.names[i]: failures[i] for i in sorted(failures)})
    if not results:
        first = next(iter(failures.values()))
        raise UserError(f"none of the {len(images)} images could be inverted; the first: {first}")
    names, alignment, every = [images.names[i] for i in results], images.alignment(), list(results.values())
    alignment = [alignment[i] for i in results]
    common = set.intersection(*(set(result["measures"]) for result in every))
    measures = {name: [result["measures"][name] for result in every] for name in every[0]["measures"] if name in common}
    by = {name: config[name] for name in ("perceptual", "identity")}
    saved = {"names": names, "losses": measures, "alignment": alignment if any(alignment) else None}
    saved |= {"space": config["space"], "size": config["size"], "fingerprint": config["generator"]}
    saved |= {"extra": {"method": info["method"], "settings": config}}
    if "attributes" in config:
        values = [result["condition"] for result in every]
        saved["extra"][CONDITION] = {"attributes": config["attributes"], "values": values}
    if "noise" in every[0]:
        saved["noise"] = [np.stack(layer) for layer in zip(*(result["noise"] for result in every), strict=True)]
    save_latents(folder, np.stack([result["latents"] for result in every]), **saved)
    originals, steps = [result["original"] for result in every], [result.get("steps") for result in every]
    write_measures(folder / "reconstruction.csv", names, measures, **by, steps=steps, originals=originals)
    statistics = {name: dict(zip(("mean", "std"), mean_and_std(v), strict=True)) for name, v in measures.items()}
    info |= {"space": config["space"], "count": len(names), "measures": statistics, "settings": config}
    info |= {"mean_steps": np.mean(steps)} if "steps" in every[0] else {}
    write_json(folder / "reconstruction.json", info | {f"{name}_by": network for name, network in by.items()})
    for grid in folder.glob("grid_[0-9]*.png"):  # an earlier run may have made more of them
        grid.unlink()
    numbers = zip(names, measures["perceptual"], measures["mse"], strict=True)
    captions = (f"{name}: {distance:.3f}, mse {mse:.4f}" for name, distance, mse in numbers)
    for k, block in enumerate(blocks(zip(pairs, captions, strict=False), PER_GRID)):
        shown, labels = zip(*block, strict=True)
        save_image(comparison_grid(*zip(*shown, strict=True), labels), folder / f"grid_{k:03d}.png")
    return summary(measures, **by)


def write_curves(folder: Path, curves: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Write curves.npz and .png of losses [N, T], and the three arrays of the published program, float64 [T]."""
    for name, values in curves.items():
        filled = values.astype(np.float64)
        for t in range(1, values.shape[1]):  # an image that stopped early keeps its last value
            filled[:, t] = np.where(np.isnan(filled[:, t]), filled[:, t - 1], filled[:, t])
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, filled.sum(0) if name == "perceptual" else filled.mean(0))
    with atomic_write(folder / "curves.npz") as file:
        np.savez(file, steps=np.arange(curves["mse"].shape[1]) * CURVE_EVERY, names=np.array(names), **curves)
    plot_curves(curves, CURVE_EVERY, folder / "curves.png")
