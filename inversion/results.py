"""The folder of results of the projector, written once all parts are done, whichever process made them."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.files import atomic_write
from common.images import save_image
from common.runs import write_json
from inversion.sheets import PER_SHEET, comparison_sheet, curve_plot
from inversion.state import CURVE_EVERY, CURVES
from inversion.store import Store, merge, remove_numbered
from perceptual.image_metrics import mean_and_std, picture_digest, summary, write_measures


def conclude(store: Store, pictures, reports, *, space: str, fingerprint: str | None, by: dict, about=None) -> None:
    """Rank 0, when all are done: the files of the whole run, and one line of results on stdout.

    reports: per rank {position: key}, {position: reason why it was left out}, names that were enlarged. by: names of
    the networks that compared. about(positions): what else latents.json shall say of these pictures, a dict of JSON
    values. ValueError when there is no result at all.
    """
    names = pictures.names
    keys, skipped, enlarged = {}, {}, []
    for report in reports:
        keys |= report[0]
        skipped |= report[1]
        enlarged += report[2]
    done = [position for position in sorted(keys) if position not in skipped]
    unread = {names[position]: skipped[position] for position in sorted(skipped)}
    write_skipped(store.folder, pictures.left_out | unread)
    if not done:
        first = next(iter(skipped.values()))
        raise UserError(f"none of the {len(names)} pictures could be projected; the first: {first}")
    if enlarged:
        print(
            f"note: {len(enlarged)} pictures are smaller than {pictures.size} px and were enlarged; the first: "
            f"{enlarged[0]}",
            file=sys.stderr,
        )
    alignment = pictures.alignment()
    alignment = [alignment[position] for position in done]
    extra = {"method": "projector", "settings": store.settings, **(about(done) if about else {})}
    line = write_results(
        store,
        [names[position] for position in done],
        [keys[position] for position in done],
        **by,
        space=space,
        size=pictures.size,
        fingerprint=fingerprint,
        alignment=alignment if any(alignment) else None,
        extra=extra,
    )
    print(f"{store.folder}: {len(done)} images in {space.upper()}: {line}")


def write_results(
    store: Store, names: list[str], keys: list[str], *, perceptual: str, identity: str | None, **described
) -> str:
    """Merge the parts and write everything that is derived from them; returns the summary line.

    described: what `merge` says of the latents (space, size, fingerprint, alignment, extra).
    """
    values: dict[str, list[float]] = {}
    curves: dict[str, list[np.ndarray]] = {name: [] for name in CURVES}
    steps, originals, columns = [], [], []
    for i, part in enumerate(merge(store, keys, names, **described)):
        save_image(part.original, store.folder / f"origin_{i}.png")
        save_image(part.picture, store.folder / f"project_{i}.png")
        steps.append(part.steps)
        originals.append(picture_digest(part.original))
        for name, value in part.values.items():
            values.setdefault(name, []).append(value)
        for name, curve in part.curves.items():
            curves[name].append(curve)
        caption = f"{names[i]}: {part.values['perceptual']:.3f}, mse {part.values['mse']:.4f}"
        columns.append((part.original, part.picture, caption))
        if len(columns) == PER_SHEET or i + 1 == len(keys):
            save_image(comparison_sheet(*zip(*columns, strict=True)), store.folder / f"sheet_{i // PER_SHEET:03d}.png")
            columns = []
    remove_numbered(store.folder, ("origin_*.png", "project_*.png"), len(keys))
    remove_numbered(store.folder, ("sheet_*.png",), -(-len(keys) // PER_SHEET))
    write_measures(
        store.folder / "reconstruction.csv",
        names,
        values,
        perceptual=perceptual,
        identity=identity,
        steps=steps,
        originals=originals,
    )
    write_curves(store.folder, {name: np.stack(rows) for name, rows in curves.items()}, names)
    statistics = {name: dict(zip(("mean", "std"), mean_and_std(v), strict=True)) for name, v in values.items()}
    write_json(
        store.folder / "reconstruction.json",
        {
            "method": "projector",
            "space": described["space"],
            "count": len(keys),
            "perceptual_by": perceptual,
            "identity_by": identity,
            "measures": statistics,
            "mean_steps": float(np.mean(steps)),
            "settings": store.settings,
        },
    )
    return summary(values, perceptual=perceptual, identity=identity)


def write_curves(folder: Path, curves: dict[str, np.ndarray], names: list[str]) -> None:
    """curves.npz, curves.png, and the three arrays of the published program, float64 [T]."""
    n_points = next(iter(curves.values())).shape[1]
    data = io.BytesIO()
    np.savez(data, steps=np.arange(n_points) * CURVE_EVERY, names=np.array(names), **curves)
    for name, values in curves.items():
        filled = values.astype(np.float64)
        for t in range(1, n_points):  # an image that stopped early keeps its last value
            filled[:, t] = np.where(np.isnan(filled[:, t]), filled[:, t - 1], filled[:, t])
        total = filled.sum(0) if name == "perceptual" else filled.mean(0)
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, total)
    with atomic_write(folder / "curves.npz") as file:
        file.write(data.getbuffer())
    save_image(curve_plot(curves, CURVE_EVERY), folder / "curves.png")


def write_skipped(folder: Path, skipped: dict[str, str]) -> None:
    """skipped.csv: path, reason; absent when nothing was skipped."""
    path = folder / "skipped.csv"
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *skipped.items()])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    print(
        f"note: {len(skipped)} pictures were left out ({path}); the first: {next(iter(skipped.items()))}",
        file=sys.stderr,
    )
