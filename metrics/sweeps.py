"""Edits of inverted faces measured along a boundary: the functions behind editing.py, which names the measures."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from common.distributed import gather_list, shard
from common.files import atomic_write
from common.runs import write_json
from common.tables import text_table, write_table
from editing.boundary import Boundary
from editing.edit import edit_face, face_at
from editing.evaluate import evaluate


@dataclass(frozen=True)
class Sweep:
    """Scores [N, K, A], identity and perceptual [N, K] or None, of N faces at K distances: [K] in standard deviations,
    0 among them. column: of the attribute that is edited; kinds: of the attributes."""

    name: str
    faces: list[str]
    distances: np.ndarray
    scores: np.ndarray
    identity: np.ndarray | None
    perceptual: np.ndarray | None
    column: int
    kinds: list[str]

    @property
    def origin(self) -> int:
        """Position of the unedited inversion among the distances."""
        return int(np.argmin(np.abs(self.distances)))

    @property
    def attribute(self) -> np.ndarray:
        return self.scores[:, :, self.column]  # [N, K]

    @property
    def change(self) -> np.ndarray:
        return self.attribute - self.attribute[:, [self.origin]]  # [N, K]

    @property
    def others(self) -> np.ndarray:
        """Mean absolute change of the other attributes, [N, K]; age counts in years / 100."""
        scale = np.array([0.01 if kind == "years" else 1.0 for kind in self.kinds])
        change = np.abs(self.scores - self.scores[:, [self.origin]]) * scale  # [N, K, A]
        return np.delete(change, self.column, 2).mean(2)

    def kept(self) -> dict[str, np.ndarray | None]:
        return {"identity": self.identity, "perceptual": self.perceptual, "others": self.others}


def rise(sweep: Sweep) -> np.ndarray:
    """Spearman correlation of distance and attribute per face, [N]; 0 where the attribute stays the same."""
    return np.nan_to_num([spearmanr(sweep.distances, face).statistic for face in sweep.attribute])


def crossed(sweep: Sweep) -> np.ndarray:
    """Whether some frame lies on the other side of 0.5 than the inversion, bool [N]."""
    above = sweep.attribute > 0.5  # [N, K]
    return (above != above[:, [sweep.origin]]).any(1)


def position_of_change(sweep: Sweep, amount: float) -> np.ndarray:
    """Position [N], a fraction of an index, where the attribute first differs by `amount` from the inversion,
    outwards to the side on which it changes more in the end; NaN where it never does."""
    origin, positions = sweep.origin, []
    for face in np.abs(sweep.change):
        side = 1 if face[-1] >= face[0] else -1
        change = face[origin:] if side > 0 else face[origin::-1]
        k = int(np.argmax(change >= amount))  # 0: nowhere
        part = (amount - change[k - 1]) / (change[k] - change[k - 1]) if k else np.nan
        positions.append(origin + side * (k - 1 + part))
    return np.array(positions)


def at_position(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """values [N, K] at fractional positions [N], linear between them."""
    return np.array([np.interp(p, np.arange(len(row)), row) for p, row in zip(positions, values, strict=True)])


def summarise(sweeps: list[Sweep], amount: float) -> list[dict]:
    """A row of the table per sweep, compared where the attribute has changed by `amount`."""
    positions = [position_of_change(sweep, amount) for sweep in sweeps]
    shared, rows = np.isfinite(positions).all(0), []
    for sweep, position in zip(sweeps, positions, strict=True):
        change = sweep.attribute[:, -1] - sweep.attribute[:, 0]
        row = {"name": sweep.name, "faces": len(sweep.faces), "rise": float(np.median(rise(sweep)))}
        row |= {"change": float(change.mean()), "change_std": float(change.std())}
        row["crossed"] = float(crossed(sweep).mean()) if sweep.kinds[sweep.column] == "probability" else None
        row |= {"reached": float(np.isfinite(position).mean()), "compared": int(shared.sum())}
        distances = np.broadcast_to(np.abs(sweep.distances), sweep.attribute.shape)
        for name, values in {"distance": distances, **sweep.kept()}.items():
            known = values is not None and shared.any()
            row[name] = float(at_position(values, position)[shared].mean()) if known else None
        rows.append(row)
    return rows


def curves(sweep: Sweep) -> dict:
    """Means over faces at every distance: change of the attribute, identity, perceptual, others; each [K] or None."""
    means = {"change": sweep.change, **sweep.kept()}
    means = {name: None if values is None else values.mean(0).tolist() for name, values in means.items()}
    return {"distance": sweep.distances.tolist(), **means}


def sweep_faces(name, generator, source, boundary: Boundary, networks, distances, *, dist, layers=None) -> Sweep:
    """Every face of `source` at `distances` [K] standard deviations; networks: scorer, identity, perceptual."""
    results, scorer = [], networks[0]
    local = shard(len(source.names), dist.rank, dist.world_size)
    for i in tqdm(local, desc=name, unit="face", disable=None if dist.is_main else True):
        frames = edit_face(generator, face_at(source, i), [boundary], distances * boundary.std, layers=layers)
        results.append(evaluate(frames, *networks))
    results = sum(gather_list(results), [])  # contiguous: the order of the faces
    measures = [[getattr(face, measure) for face in results] for measure in ("scores", "identity", "perceptual")]
    # without the inversion, with which all are compared
    measures = [None if values[0] is None else np.stack(values)[:, 1:] for values in measures]
    kinds = [attribute.kind for attribute in scorer.attributes]
    return Sweep(name, source.names, distances, *measures, scorer.column(boundary.attribute), kinds)


def face_rows(sweep: Sweep) -> list[dict]:
    """Rows of faces.csv."""
    origin, first, last = sweep.attribute[:, [sweep.origin, 0, -1]].T
    columns = {"origin": origin, "first": first, "last": last, "rise": rise(sweep)}
    columns = {name: values.round(4).tolist() for name, values in columns.items()}
    columns = {"face": sweep.faces, **columns, "crossed": crossed(sweep).astype(int).tolist()}
    return [{"name": sweep.name, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def format_rows(rows: list[dict]) -> str:
    """The rows as a text table, without the measures that this attribute does not have."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return text_table(names, [[row[name] for name in names] for row in rows])


def draw(path, attribute: str, unit: str, all_curves: dict[str, dict]) -> None:
    """Attribute, identity and others against distance, and identity against attribute change; a line per row."""
    from matplotlib.figure import Figure

    labels = {"distance": "distance (standard deviations)", "change": f"change of {attribute} ({unit})"}
    labels |= {"others": "change of other attributes", "identity": "identity similarity"}
    panels = [("distance", "change"), ("distance", "others"), ("distance", "identity"), ("change", "identity")]
    panels = [panel for panel in panels if all(c[panel[1]] is not None for c in all_curves.values())]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, values in all_curves.items():
            axes.plot(values[x], values[y], marker="o", markersize=3, linewidth=1.4, label=name)
        axes.set(xlabel=labels[x], ylabel=labels[y])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_results(folder: Path, sweeps: list[Sweep], inputs: list[dict], info: dict) -> None:
    """Files of the folder, and the table on stdout; its last line is JSON."""
    rows = summarise(sweeps, info["at"])
    all_curves = {sweep.name: curves(sweep) for sweep in sweeps}
    write_json(folder / "editing.json", {**info, "rows": rows, "inputs": inputs, "curves": all_curves})
    write_table(folder / "table.csv", rows)
    write_table(folder / "faces.csv", [row for sweep in sweeps for row in face_rows(sweep)])
    draw(folder / "curves.png", info["attribute"], info["unit"], all_curves)
    print(format_rows(rows))
    changed = f"{info['attribute']} ({info['unit']}), compared where it has changed by {info['at']:g}"
    networks = f"evaluated by {info['scorer']}, identity: {info['identity']}, perceptual: {info['perceptual']}"
    print(f"{changed}; {networks}; {folder}")
    print(json.dumps({**info, "rows": rows}))
