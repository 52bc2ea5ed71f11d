"""Edits of inverted faces measured: curves and a table over spaces, against distance.

Every face is moved along a boundary in equal steps to both sides of its inversion, in standard deviations of the
samples that the boundary was fitted on, with the noise it was inverted with. A scorer that took no part in the fit
(face-scorer-eval) says how far the attribute and all the others changed; identity network and perceptual distance say
what was kept. One row per latents folder, so W, W+ and W++ stand side by side, and at *equal* attribute change.

    python metrics/editing.py --ckpt w.pt w.pt wpp.pt --latent inv/w inv/wplus inv/wpp \\
        --boundary w/boundary-age.npz w/boundary-age.npz wpp/boundary-age.npz --output_dir age/

Writes editing.json (everything measured), table.csv, faces.csv (a line per face), curves.png. Several processes under
torchrun share the faces among them. Measures:

    rise      Spearman correlation of distance and attribute over the sweep of a face, median over faces
    change    attribute at the far end less attribute at the near end, mean over faces
    crossed   share of the faces whose probability crosses 0.5 to the other side inside the sweep (probabilities only)
    reached   share of the faces whose attribute changes by --at inside the sweep
    identity, perceptual, others: where the attribute has changed by --at, over the faces that reach it in every row:
              cosine similarity, distance, and mean absolute change of the other attributes (age in years / 100)
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __package__ in (None, ""):  # started by path: the root stands in for this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, run_script
from common.distributed import gather_list, setup, shard, shutdown
from common.files import atomic_write
from common.latents import parse_layers
from common.runs import write_json
from common.tables import text_table, write_table
from editing.boundary import Boundary, load_boundary
from editing.edit import edit_face, face_at
from editing.evaluate import evaluate
from editing.samples import Samples
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import perceptual_or_none
from sampling.render import latents_source
from scorer.network import load_scorer

DEFAULT_AT = {"years": 15.0, "probability": 0.5}
FACE_COLUMNS = ("origin", "first", "last", "rise")
N_MEASURED = 10_000  # samples over which the deviation along a bare direction is taken


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
    def others(self) -> np.ndarray:
        """[N, K]: mean absolute change of the other attributes; age counts in years / 100."""
        scale = np.array([0.01 if kind == "years" else 1.0 for kind in self.kinds])
        change = np.abs(self.scores - self.scores[:, [self.origin]]) * scale  # [N, K, A]
        return np.delete(change, self.column, 2).mean(2)

    def kept(self) -> dict[str, np.ndarray | None]:
        return {"identity": self.identity, "perceptual": self.perceptual, "others": self.others}


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def rise(sweep: Sweep) -> np.ndarray:
    """Spearman correlation of distance and attribute per face, [N]; 0 where the attribute stays the same."""
    from scipy.stats import spearmanr

    return np.nan_to_num([spearmanr(sweep.distances, face).statistic for face in sweep.attribute])


def crossed(sweep: Sweep) -> np.ndarray:
    """bool [N]: some frame lies on the other side of 0.5 than the inversion."""
    above = sweep.attribute > 0.5  # [N, K]
    return (above != above[:, [sweep.origin]]).any(1)


def position_of_change(sweep: Sweep, amount: float) -> np.ndarray:
    """[N]: fractional position among the distances where the attribute first differs by `amount` from the inversion,
    outwards to the side on which it changes more in the end; NaN where it never does."""
    origin, found = sweep.origin, []
    for face in np.abs(sweep.attribute - sweep.attribute[:, [sweep.origin]]):
        side = 1 if face[-1] >= face[0] else -1
        change = face[origin:] if side > 0 else face[origin::-1]
        beyond = np.flatnonzero(change >= amount)
        k = beyond[0] if len(beyond) else 0
        part = (amount - change[k - 1]) / (change[k] - change[k - 1]) if k else np.nan
        found.append(origin + side * (k - 1 + part))
    return np.array(found)


def at_position(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """values [N, K] at fractional positions [N], linear between them."""
    return np.array([np.interp(p, np.arange(len(row)), row) for p, row in zip(positions, values, strict=True)])


def summarise(sweeps: list[Sweep], amount: float) -> list[dict]:
    """A row of the table per sweep; see the module's docstring for the measures."""
    positions = [position_of_change(sweep, amount) for sweep in sweeps]
    shared = np.isfinite(positions).all(0)

    def mean_at(values, position):
        return None if values is None or not shared.any() else float(at_position(values, position)[shared].mean())

    rows = []
    for sweep, position in zip(sweeps, positions, strict=True):
        change = sweep.attribute[:, -1] - sweep.attribute[:, 0]
        distances = np.broadcast_to(np.abs(sweep.distances), sweep.attribute.shape)
        rows.append(
            {
                "name": sweep.name,
                "faces": len(sweep.faces),
                "rise": float(np.median(rise(sweep))),
                "change": float(change.mean()),
                "change_std": float(change.std()),
                "crossed": float(crossed(sweep).mean()) if sweep.kinds[sweep.column] == "probability" else None,
                "reached": float(np.isfinite(position).mean()),
                "compared": int(shared.sum()),
                "distance": mean_at(distances, position),
                **{what: mean_at(values, position) for what, values in sweep.kept().items()},
            }
        )
    return rows


def curves(sweep: Sweep) -> dict:
    """Means over faces at every distance: change of the attribute, identity, perceptual, others; each [K] or None."""
    means = {"change": sweep.attribute - sweep.attribute[:, [sweep.origin]], **sweep.kept()}
    means = {what: None if values is None else values.mean(0).tolist() for what, values in means.items()}
    return {"distance": sweep.distances.tolist(), **means}


# ---------------------------------------------------------------------------------------------------------------------
# Results


def sweep_faces(name, generator, source, boundary: Boundary, networks, distances, *, dist, layers=None) -> Sweep:
    """Every face of `source` at `distances` [K] standard deviations from its inversion, on every rank.
    networks: scorer, identity, perceptual."""
    local, hidden = shard(len(source.names), dist.rank, dist.world_size), None if dist.is_main else True
    found = []
    for i in tqdm(local, desc=name, unit="face", disable=hidden):
        frames = edit_face(generator, face_at(source, i), [boundary], distances * boundary.std, layers=layers)
        found.append(evaluate(frames, *networks))
    found = sum(gather_list(found), [])  # contiguous: the order of the faces
    kept = {what: [getattr(face, what) for face in found] for what in ("scores", "identity", "perceptual")}
    # without the inversion, with which all are compared
    kept = {what: None if values[0] is None else np.stack(values)[:, 1:] for what, values in kept.items()}
    kinds = [attribute.kind for attribute in networks[0].attributes]
    return Sweep(name, source.names, distances, **kept, column=networks[0].column(boundary.attribute), kinds=kinds)


def face_rows(sweep: Sweep) -> list[dict]:
    """Rows of faces.csv."""
    columns = (sweep.attribute[:, [sweep.origin, 0, -1]].T, rise(sweep)[None])
    rows = zip(sweep.faces, np.concatenate(columns).T.round(4).tolist(), crossed(sweep), strict=True)
    return [
        {"name": sweep.name, "face": face, **dict(zip(FACE_COLUMNS, row, strict=True)), "crossed": int(cross)}
        for face, row, cross in rows
    ]


def format_rows(rows: list[dict]) -> str:
    """The rows as a text table, without the measures that this attribute does not have."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return text_table(names, [[row[name] for name in names] for row in rows])


def draw(path, attribute: str, unit: str, all_curves: dict[str, dict]) -> None:
    """Attribute, identity and others against distance, and identity against attribute change; a line per row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    labels = {
        "distance": "distance (standard deviations)",
        "change": f"change of {attribute} ({unit})",
        "others": "change of other attributes",
        "identity": "identity similarity",
    }
    panels = [("distance", "change"), ("distance", "others"), ("distance", "identity"), ("change", "identity")]
    panels = [panel for panel in panels if all(c[panel[1]] is not None for c in all_curves.values())]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, values in all_curves.items():
            axes.plot(values[x], values[y], marker="o", markersize=3, linewidth=1.4, label=name)
        axes.set(xlabel=labels[x], ylabel=labels[y])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", help="generator of each row (one for all rows will do)")
    parser.add_argument("--latent", required=True, nargs="+", help="inverted faces of each row: folders of latents")
    parser.add_argument("--boundary", required=True, nargs="+", help="boundary of each row, all of one attribute")
    parser.add_argument("--names", nargs="+", help="names of the rows (default: the spaces of the latents)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the results")
    parser.add_argument("--scorer", default="face-scorer-eval", help="evaluates the edits; not that of the boundary")
    parser.add_argument("--reach", type=positive, default=4, help="end of the sweep to both sides, standard deviations")
    parser.add_argument("--steps", type=int, default=17, help="distances, an odd number: the middle is the inversion")
    parser.add_argument("--at", type=float, help="change at which rows are compared (default: 15 years, 0.5)")
    parser.add_argument("--layers", default="", help="layers that move, such as 0-7 (default: all)")
    parser.add_argument("--faces", type=int, default=0, help="only the first so many faces; 0: all")
    parser.add_argument("--identity", choices=("auto", "none", *WEIGHTS), default="auto", help="identity network")
    parser.add_argument("--perceptual", default="auto-up64", help="perceptual distance: auto-up64, vgg ... or none")
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    return parser


def one_each(values: list | None, flag: str, n: int) -> list:
    """A value per row: one serves all. Raises UsageError."""
    if values and len(values) not in (1, n):
        raise UsageError(f"--{flag} has {len(values)} entries for {n} of --latent")
    return values * n if values and len(values) == 1 else values or [None] * n


def main(args) -> None:
    n = len(args.latent)
    if args.steps < 3 or args.steps % 2 == 0:
        raise UsageError(f"--steps {args.steps}: expected an odd number from 3 on")
    if args.names and len(args.names) != n:
        raise UsageError(f"--names has {len(args.names)} entries for {n} of --latent")
    ckpts, paths = one_each(args.ckpt, "ckpt", n), one_each(args.boundary, "boundary", n)
    distances = np.linspace(-args.reach, args.reach, args.steps)
    distances[args.steps // 2] = 0  # the inversion itself, whatever was rounded
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        networks = (
            load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir),
            identity_or_none(args.identity, dist.device, args.weights_dir),
            perceptual_or_none(args.perceptual, dist.device, args.weights_dir),
        )
        sweeps, inputs, attribute = [], [], None
        for k, (ckpt, latent, path) in enumerate(zip(ckpts, args.latent, paths, strict=True)):
            generator = load_generator(ckpt, dist.device)
            boundary = load_boundary(path, fingerprint=generator.fingerprint)
            if not boundary.std:
                boundary = boundary.measured_on(Samples(generator, range(N_MEASURED)))
            if attribute not in (None, boundary.attribute):
                raise UserError(f"{path} is a boundary of {boundary.attribute}, {paths[0]} of {attribute}")
            attribute = boundary.attribute
            source = latents_source(generator, latent, truncation=1, mean=None, noise=None, noise_seed=None)
            source = replace(source, names=source.names[: args.faces or None])
            layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
            name = args.names[k] if args.names else (source.origin["space"] or generator.config.space).upper()
            sweep = sweep_faces(name, generator, source, boundary, networks, distances, layers=layers, dist=dist)
            if sweeps and sweep.faces != sweeps[0].faces:
                raise UserError(f"{args.latent[0]} and {latent} hold different faces: they cannot be compared")
            sweeps.append(sweep)
            files = {"ckpt": str(ckpt), "latent": str(latent), "boundary": str(path)}
            inputs.append(
                files | {"fit": boundary.fit, "n_samples": boundary.n_samples, "fingerprint": generator.fingerprint}
            )
        if dist.is_main:
            default = DEFAULT_AT.get(sweeps[0].kinds[sweeps[0].column], sweeps[0].attribute[:, sweeps[0].origin].std())
            info = {
                "attribute": attribute,
                "unit": networks[0].units[attribute],
                "at": args.at or float(default),
                "scorer": args.scorer,
                "identity": getattr(networks[1], "name", None),
                "perceptual": getattr(networks[2], "name", None),
            }
            write_results(args.output_dir, sweeps, inputs, info)
    finally:
        shutdown()


def write_results(folder: Path, sweeps: list[Sweep], inputs: list[dict], info: dict) -> None:
    """Files of the folder, and the table on stdout; its last line is JSON."""
    rows = summarise(sweeps, info["at"])
    all_curves = {sweep.name: curves(sweep) for sweep in sweeps}
    write_json(folder / "editing.json", {**info, "rows": rows, "inputs": inputs, "curves": all_curves})
    write_table(folder / "table.csv", rows)
    write_table(folder / "faces.csv", [row for sweep in sweeps for row in face_rows(sweep)])
    draw(folder / "curves.png", info["attribute"], info["unit"], all_curves)
    print(format_rows(rows))
    print(
        f"{info['attribute']} ({info['unit']}), compared where it has changed by {info['at']:g}; evaluated by "
        f"{info['scorer']}, identity: {info['identity']}, perceptual: {info['perceptual']}; {folder}"
    )
    print(json.dumps({**info, "rows": rows}))


if __name__ == "__main__":
    run_script(main, build_parser())
