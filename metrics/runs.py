"""Results of runs (metrics.jsonl) as the table and the curve of report.py."""

from pathlib import Path

from common.cli import UserError
from common.files import atomic_write
from common.tables import cell
from metrics.protocol import read_records, require_alike

BEST = {"fid": min, "kid": min, "ppl": min}  # of the others max
ORDER = ("fid", "kid", "precision", "recall", "density", "coverage", "ppl")  # of the paper's table
AXES = {"images": "training images (thousands)", "step": "training steps", "truncation": "truncation psi"}


def family(metric: str) -> str:
    """`fid-squeeze` -> `fid`."""
    return metric.partition("-")[0]


def read_runs(arguments: list[str]) -> dict[str, list[dict]]:
    """{name: records} of NAME=PATH or PATH arguments; the last result where one was computed twice."""
    runs: dict[str, list[dict]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = Path(argument).name.removesuffix(".jsonl"), argument
        file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist: metrics/ and train.py --eval_every write it")
        if name in runs:
            raise UserError(f"two runs are called {name}: name them as in A={path}")
        latest = {}
        for record in read_records(file):
            real = (record.get("real") or {}).get("digest")  # another real set or protocol is another result
            key = (record["metric"], _subject(record), record["n_fake"], str(record.get("protocol")), real)
            latest[key] = record
        runs[name] = list(latest.values())
        if not latest:
            raise UserError(f"{file} holds no results")
    return runs


def _subject(record: dict) -> tuple:
    """The generator or images and the truncation: the same for all metrics of one checkpoint, or of some latents."""
    fake = record["fake"]
    generator = fake.get("fingerprint") if fake.get("kind") != "latents" else None
    return generator or fake.get("digest"), fake.get("truncation")


def metric_names(runs: dict[str, list[dict]]) -> list[str]:
    """Names of the metrics, those of ORDER first."""
    names = {record["metric"] for records in runs.values() for record in records}
    return sorted(names, key=lambda name: ((*ORDER, family(name)).index(family(name)), name))


def build_table(runs: dict[str, list[dict]]) -> tuple[list[str], list[list]]:
    """Header and rows [name, step, thousand images, value per metric or None] of the checkpoint with the best FID."""
    metrics, rows = metric_names(runs), []
    for name, records in runs.items():
        candidates = [r for r in records if r["metric"] == metrics[0]] or records
        finite = [r for r in candidates if r["value"] is not None]
        best = BEST.get(family(candidates[0]["metric"]), max)
        chosen = best(finite, key=lambda r: r["value"]) if finite else candidates[-1]
        values = {r["metric"]: r["value"] for r in records if _subject(r) == _subject(chosen)}
        images = chosen["fake"].get("images")
        thousands = None if images is None else images / 1000
        rows.append([name, chosen.get("step"), thousands, *map(values.get, metrics)])
    return ["", "step", "k images", *metrics], rows


def by_truncation(runs: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs of a sweep, each truncation as a run of its own: 'W++, psi 0.7'."""
    parts: dict[str, list[dict]] = {}
    for name, records in runs.items():
        for record in sorted(records, key=lambda r: r["fake"].get("truncation") or 0):
            psi = record["fake"].get("truncation")
            parts.setdefault(name if psi is None else f"{name}, psi {psi:g}", []).append(record)
    return parts


def build_curve(records: list[dict], metric: str, against: str) -> list[tuple[float, float]]:
    """(x, value) of a metric, where both are known, in order of x: images (thousands), step or truncation."""
    points = []
    for record in records:
        x = record.get("step") if against == "step" else record["fake"].get(against)
        if record["metric"] == metric and None not in (x, record["value"]):
            points.append((x / 1000 if against == "images" else x, record["value"]))
    return sorted(points)


def check(runs: dict[str, list[dict]], against: str, allow: bool) -> list[str]:
    """Differences in protocol among the results of each metric; ValueError unless allowed."""
    differences = []
    vary = ("fake.truncation", "fake.truncation_mean") if against == "truncation" else ()
    for metric in metric_names(runs):
        same = [record for records in runs.values() for record in records if record["metric"] == metric]
        differences += [f"{metric}: {line}" for line in require_alike(same, vary=vary, allow=allow)]
    return differences


def draw_curve(curves: dict[str, list[tuple[float, float]]], metric: str, against: str, path: Path) -> None:
    """One line per run, marked at each result, the best one ringed and named in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=AXES[against], ylabel=metric)
    for name, points in curves.items():
        best = BEST.get(family(metric), max)(points, key=lambda point: point[1])
        label = f"{name}: {cell(float(best[1]))}"
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=label)
        axes.plot(*best, marker="o", markersize=9, fillstyle="none", color=line.get_color())
    values = [value for points in curves.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
