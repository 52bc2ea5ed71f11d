"""How well attributes of inverted faces can be edited: curves and a table over spaces, against distance.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __package__ in (None, ""):  # started by path: the root stands in for this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import Distributed, add_device_flags, gather_list, setup, shard, shutdown
from common.files import atomic_write
from common.latents import parse_layers
from common.runs import write_json
from common.tables import text_table, write_table
from editing.boundary import Boundary, load_boundary
from editing.edit import edit_codes, render_codes
from editing.evaluate import Judges, judge
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import perceptual_or_none
from sampling.render import latents_source, select_condition, select_noise
from scorer.network import load_scorer

DEFAULT_AT = {"years": 15.0, "probability": 0.5}
KEPT = ("identity", "perceptual", "others")


@dataclass(frozen=True)
class Sweep:
    """Of N faces at K distances: scores [N, K, A], identity and perceptual [N, K] or None. distances: [K] in standard
    deviations, 0 among them."""

    name: str
    faces: list[str]
    distances: np.ndarray
    scores: np.ndarray
    identity: np.ndarray | None
    perceptual: np.ndarray | None

    @property
    def origin(self) -> int:
        """Column of the unedited inversion."""
        return int(np.argmin(np.abs(self.distances)))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", help="generator of each row (one for all rows will do)")
    parser.add_argument("--latent", required=True, nargs="+", help="inverted faces of each row: folders of latents")
    parser.add_argument("--boundary", required=True, nargs="+", help="boundary of each row, all of one attribute")
    parser.add_argument("--names", nargs="+", help="names of the rows (default: the spaces of the latents)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the results")
    parser.add_argument("--scorer", default="face-scorer-eval", help="judges the edits; not the one of the boundary")
    parser.add_argument("--reach", type=float, default=4, help="end of the sweep to both sides, standard deviations")
    parser.add_argument("--steps", type=int, default=17, help="distances, an odd number: the middle is the inversion")
    parser.add_argument("--at", type=float, help="change at which rows are compared (default: 15 years, 0.5)")
    parser.add_argument("--layers", default="", help="layers that move, such as 0-7 (default: all)")
    parser.add_argument("--faces", type=int, default=0, help="only the first so many faces; 0: all")
    parser.add_argument("--identity", choices=("auto", "none", *WEIGHTS), default="auto", help="identity network")
    parser.add_argument("--perceptual", default="auto-up64", help="perceptual distance: auto-up64, vgg ... or none")
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def sweep_faces(
    name, generator, source, boundary: Boundary, judges: Judges, distances, *, dist: Distributed, layers=None, n=0
) -> Sweep:
    """Every face of `source` (the first n) at `distances` [K] standard deviations from its inversion, on every rank."""
    count = min(n, len(source.names)) if n else len(source.names)
    kept = {"scores": [], "identity": [], "perceptual": []}
    mine = shard(count, dist.rank, dist.world_size)
    for i in tqdm(mine, desc=name, unit="face", disable=None if dist.is_main else True):
        (code,) = source.codes([i])
        codes = edit_codes(code.numpy(), [boundary], distances * boundary.std, layers=layers)
        codes = np.concatenate((code.numpy()[None], codes))  # the inversion first: what all are compared with
        frames = render_codes(
            generator, codes, select_noise(source.noise, [i]), condition=select_condition(source.condition, [i])
        )
        found = judge(judges, list(frames))
        for what, values in kept.items():
            measured = getattr(found, what)
            if measured is not None:
                values.append(measured[1:])
    shares = gather_list(kept)  # contiguous: the order of the faces
    arrays = {what: sum((share[what] for share in shares), []) for what in kept}
    stacked = {what: np.stack(values) if values else None for what, values in arrays.items()}
    return Sweep(name, source.names[:count], distances, **stacked)


def rise(sweep: Sweep, column: int) -> np.ndarray:
    """Spearman correlation of distance and attribute per face, [N]; 0 where the attribute stays the same."""
    from scipy.stats import spearmanr

    values = [spearmanr(sweep.distances, face[:, column]).statistic for face in sweep.scores]
    return np.nan_to_num(np.array(values))


def crossed(sweep: Sweep, column: int) -> np.ndarray:
    """bool [N]: some frame lies on the other side of 0.5 than the inversion."""
    above = sweep.scores[:, :, column] > 0.5  # [N, K]
    return (above != above[:, [sweep.origin]]).any(1)


def others_change(sweep: Sweep, column: int, kinds) -> np.ndarray:
    """[N, K]: mean absolute change of the attributes other than `column`; age counts in years / 100."""
    scale = np.array([0.01 if kind == "years" else 1.0 for kind in kinds])
    change = np.abs(sweep.scores - sweep.scores[:, [sweep.origin]]) * scale  # [N, K, A]
    return np.delete(change, column, 2).mean(2)


def position_of_change(sweep: Sweep, column: int, amount: float) -> np.ndarray:
    """[N]: fractional column where the attribute first differs by `amount` from the inversion, walking outwards to the
    side with the larger room (towards the farther end of the attribute's change); NaN where it never does."""
    origin, found = sweep.origin, []
    for face in sweep.scores[:, :, column]:
        ends = np.abs(face[[0, -1]] - face[origin])
        path = range(origin, len(face)) if ends[1] >= ends[0] else range(origin, -1, -1)
        change = np.abs(face[list(path)] - face[origin])
        beyond = np.flatnonzero(change >= amount)
        if not len(beyond):
            found.append(np.nan)
            continue
        k = beyond[0]
        part = (amount - change[k - 1]) / (change[k] - change[k - 1])
        found.append(path[k - 1] + (path[k] - path[k - 1]) * part)
    return np.array(found)


def at_position(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """values [N, K] at fractional columns [N], linear between the columns."""
    columns = np.arange(values.shape[1])
    return np.array([np.interp(p, columns, row) for p, row in zip(positions, values, strict=True)])


def summarise(sweeps: list[Sweep], column: int, kinds, amount: float) -> list[dict]:
    """A row of the table per sweep; see the module's docstring for the measures."""
    positions = [position_of_change(sweep, column, amount) for sweep in sweeps]
    shared = np.isfinite(positions).all(0)
    rows = []
    for sweep, position in zip(sweeps, positions, strict=True):
        change = sweep.scores[:, -1, column] - sweep.scores[:, 0, column]
        kept = {
            "identity": sweep.identity,
            "perceptual": sweep.perceptual,
            "others": others_change(sweep, column, kinds),
        }
        at = {
            what: None
            if values is None or not shared.any()
            else float(at_position(values[shared], position[shared]).mean())
            for what, values in kept.items()
        }
        distance = np.abs(np.interp(position[shared], np.arange(len(sweep.distances)), sweep.distances))
        rows.append(
            {
                "name": sweep.name,
                "faces": len(sweep.faces),
                "rise": float(np.median(rise(sweep, column))),
                "change": float(change.mean()),
                "change_std": float(change.std()),
                "crossed": float(crossed(sweep, column).mean()) if kinds[column] == "probability" else None,
                "reached": float(np.isfinite(position).mean()),
                "compared": int(shared.sum()),
                "distance": float(distance.mean()) if shared.any() else None,
                **at,
            }
        )
    return rows


def curves(sweep: Sweep, column: int, kinds) -> dict:
    """Means over faces at every distance: attribute, others, identity, perceptual; each [K] or None."""
    change = sweep.scores[:, :, column] - sweep.scores[:, [sweep.origin], column]
    mean = {
        "change": change,
        "others": others_change(sweep, column, kinds),
        "identity": sweep.identity,
        "perceptual": sweep.perceptual,
    }
    mean = {what: None if values is None else values.mean(0).tolist() for what, values in mean.items()}
    return {"distance": sweep.distances.tolist(), **mean}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def format_rows(rows: list[dict]) -> str:
    """The rows as a text table, without the measures that this attribute does not have."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return text_table(names, [[row[name] for name in names] for row in rows])


def draw(path, attribute: str, unit: str, all_curves: dict[str, dict]) -> None:
    """Attribute, identity and others against distance, and identity against attribute change; a line per row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    panels = [
        ("distance", "change", "distance (standard deviations)", f"change of {attribute} ({unit})"),
        ("distance", "others", "distance (standard deviations)", "change of other attributes"),
        ("distance", "identity", "distance (standard deviations)", "identity similarity"),
        ("change", "identity", f"change of {attribute} ({unit})", "identity similarity"),
    ]
    panels = [panel for panel in panels if all(c[panel[1]] is not None for c in all_curves.values())]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, values in all_curves.items():
            axes.plot(values[x], values[y], marker="o", markersize=3, linewidth=1.4, label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(args) -> int:
    ckpts, boundaries, names = read_rows(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        measure(args, ckpts, boundaries, names, dist)
    finally:
        shutdown()
    return 0


def measure(args, ckpts, boundaries, names, dist: Distributed) -> None:
    """Every row, its faces shared among the ranks; rank 0 writes."""
    distances = np.linspace(-args.reach, args.reach, args.steps)
    distances[args.steps // 2] = 0  # the inversion itself, whatever was rounded
    judges = Judges(
        load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir),
        identity_or_none(args.identity, dist.device, args.weights_dir),
        perceptual_or_none(args.perceptual, dist.device, args.weights_dir),
    )
    attribute, column, kinds = None, None, [a.kind for a in judges.scorer.attributes]
    sweeps, facts = [], []
    for k, (ckpt, latent, path) in enumerate(zip(ckpts, args.latent, boundaries, strict=True)):
        generator = load_generator(ckpt, dist.device)
        boundary = load_boundary(path, fingerprint=generator.fingerprint)
        if attribute not in (None, boundary.attribute):
            raise UserError(f"{path} is a boundary of {boundary.attribute}, {boundaries[0]} of {attribute}")
        attribute, column = boundary.attribute, judges.scorer.column(boundary.attribute)
        source = latents_source(generator, latent, truncation=1, mean=None, noise=None, noise_seed=None)
        layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
        name = names[k] if names else (source.about["space"] or generator.config.space).upper()
        sweep = sweep_faces(
            name, generator, source, boundary, judges, distances, layers=layers, n=args.faces, dist=dist
        )
        if sweeps and sweep.faces != sweeps[0].faces:
            raise UserError(f"{args.latent[0]} and {latent} hold different faces: they cannot be compared")
        sweeps.append(sweep)
        facts.append(
            {
                "ckpt": str(ckpt),
                "latent": str(latent),
                "boundary": str(path),
                "fit": boundary.fit,
                "n_samples": boundary.n_samples,
                "fingerprint": generator.fingerprint,
            }
        )
    if not dist.is_main:
        return
    amount = args.at or DEFAULT_AT.get(kinds[column], float(np.std(sweeps[0].scores[:, sweeps[0].origin, column])))
    rows = summarise(sweeps, column, kinds, amount)
    write_results(args, attribute, judges, rows, sweeps, column, kinds, amount, facts)


def read_rows(args):
    """(ckpts, boundaries, names or None), as many as latents. Raises UsageError."""
    n = len(args.latent)
    if args.steps < 3 or args.steps % 2 == 0 or args.reach <= 0:
        raise UsageError(f"--steps {args.steps} --reach {args.reach:g}: expected an odd number from 3 on, and above 0")
    for flag in ("ckpt", "boundary", "names"):
        given = getattr(args, flag)
        if given and len(given) not in ((1, n) if flag != "names" else (n,)):
            raise UsageError(f"--{flag} has {len(given)} entries for {n} of --latent")
    ckpts, boundaries = (given * n if len(given) == 1 else given for given in (args.ckpt, args.boundary))
    return ckpts, boundaries, args.names


def write_results(args, attribute, judges, rows, sweeps, column, kinds, amount, facts) -> None:
    unit = judges.scorer.units[attribute]
    all_curves = {sweep.name: curves(sweep, column, kinds) for sweep in sweeps}
    about = {
        "attribute": attribute,
        "unit": unit,
        "at": amount,
        "scorer": args.scorer,
        "identity": getattr(judges.identity, "name", None),
        "perceptual": getattr(judges.perceptual, "name", None),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "editing.json", {**about, "rows": rows, "inputs": facts, "curves": all_curves})
    write_table(args.output_dir / "table.csv", rows)
    per_face = []
    for sweep in sweeps:
        for face, scores, spearman, cross in zip(
            sweep.faces, sweep.scores[:, :, column], rise(sweep, column), crossed(sweep, column), strict=True
        ):
            per_face.append(
                {
                    "name": sweep.name,
                    "face": face,
                    "origin": round(float(scores[sweep.origin]), 4),
                    "first": round(float(scores[0]), 4),
                    "last": round(float(scores[-1]), 4),
                    "rise": round(float(spearman), 4),
                    "crossed": int(cross),
                }
            )
    write_table(args.output_dir / "faces.csv", per_face)
    draw(args.output_dir / "curves.png", attribute, unit, all_curves)
    print(format_rows(rows))
    print(
        f"{attribute} ({unit}), compared where it has changed by {amount:g}; judged by {args.scorer}, identity: "
        f"{about['identity']}, perceptual: {about['perceptual']}; {args.output_dir}"
    )
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    run_script(main, build_parser())
