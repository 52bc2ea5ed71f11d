"""Quality of scores: errors, ranking, calibration.

Labels may be soft (another network's probabilities): above 0.5 counts as yes for ranking and accuracy.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from common.cli import UserError
from common.files import write_text
from common.images import list_images
from common.runs import to_plain
from common.tables import csv_text
from scorer.labels import Attribute, LabelTable, present_faces, read_labels
from scorer.network import load_scorer, score_files

AGE_BANDS = ((0, 10), (10, 20), (20, 40), (40, 60), (60, 101))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over ten equal bins of [0, 1]: sum of n_b/n |mean prediction - mean label|."""
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    index = np.minimum((probabilities * 10).astype(int), 9)
    gaps = np.bincount(index, probabilities - labels, 10)  # sum of differences per bin
    return float(np.abs(gaps).sum() / len(labels))


def measure(attribute: Attribute, scores: np.ndarray, labels: np.ndarray) -> dict:
    """Plain numbers for one attribute; scores and labels [n], all known, n > 0. Years and values: mae, bias (of score),
    correlation, slope of the score over the label; years also within_5 and mae per band. Probability:
    balanced_accuracy and auc (NaN unless there are both positives and negatives), ece, mae, positives."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    error = scores - labels
    numbers = {"n": len(labels), "mae": float(np.abs(error).mean())}
    if attribute.kind == "probability":
        positive = labels > 0.5
        both = 0 < positive.sum() < len(positive)
        numbers["positives"] = int(positive.sum())
        numbers["balanced_accuracy"] = float(balanced_accuracy_score(positive, scores > 0.5) if both else "nan")
        numbers["auc"] = float(roc_auc_score(positive, scores) if both else "nan")
        return numbers | {"ece": calibration_error(scores, labels)}
    numbers["bias"] = float(error.mean())
    if len(labels) > 1 and labels.std() > 0 and scores.std() > 0:
        numbers["correlation"] = float(np.corrcoef(scores, labels)[0, 1])
        numbers["slope"] = numbers["correlation"] * float(scores.std() / labels.std())
    if attribute.kind == "years":
        numbers["within_5"] = float((np.abs(error) <= 5).mean())
        for low, high in AGE_BANDS:
            band = (labels >= low) & (labels < high)
            if band.any():
                numbers[f"mae_{low}_{high - 1}"] = float(np.abs(error[band]).mean())
    return numbers


def accuracy_report(scores: np.ndarray, table: LabelTable) -> dict:
    """scores [N, A] of the faces of `table` -> {attribute: measure(...)}, without attributes that have no label."""
    known = np.isfinite(table.values)  # [N, A]
    columns = zip(table.attributes, scores.T, table.values.T, known.T, strict=True)
    return {a.name: measure(a, column[rows], labels[rows]) for a, column, labels, rows in columns if rows.any()}


def format_report(report: dict) -> str:
    """The report as a table for people."""
    lines = [f"{'attribute':14}{'n':>6}  numbers"]
    for name, numbers in report.items():
        cells = [f"{key} {value:.3f}" for key, value in numbers.items() if isinstance(value, float)]
        lines.append(f"{name:14}{numbers['n']:6}  {'  '.join(cells)}")
    return "\n".join(lines)


def evaluate_folder(folder: Path, name: str, *, labels, sizes: list[int], scores, device, **loading) -> None:
    """Print how good the scorer `name` is on the faces of a folder, shown at each size; the last line is JSON. labels:
    CSV; None: labels.csv of the folder. scores: CSV for the score of every face at the first size, or None. loading: of
    `load_scorer`."""
    scorer = load_scorer(name, device, **loading)
    names, table = read_evaluation(folder, labels, scorer)
    if table is None and not scores:
        raise UserError(f"{folder} has no labels.csv: pass --labels CSV, or --scores FILE.csv to score without labels")
    reports = {}
    for k, size in enumerate(sizes):
        at_size = score_files(scorer, [folder / image for image in names], size=size, device=device)
        if k == 0 and scores:
            rows = ([image, *(f"{value:.6g}" for value in row)] for image, row in zip(names, at_size, strict=True))
            write_text(scores, csv_text([["file", *scorer.names], *rows]))
        if table is not None:
            columns = [scorer.column(attribute.name) for attribute in table.attributes]
            reports[str(size)] = accuracy_report(at_size[:, columns], table)
            print(f"{name} on {len(names)} faces of {folder}, {f'{size} px' if size else 'as they are'}")
            print(format_report(reports[str(size)]), end="\n\n")
    print(json.dumps(to_plain({"scorer": name, "faces": len(names), "sizes": reports})))  # NaN is no JSON


def read_evaluation(folder: Path, labels: str | None, scorer) -> tuple[list[str], LabelTable | None]:
    """Names of the images of a folder, and their labels in the scorer's columns; None where there is no CSV."""
    path = Path(labels) if labels else folder / "labels.csv"
    if not labels and not path.is_file():
        names = [image.relative_to(folder).as_posix() for image in list_images(folder)]
        if not names:
            raise UserError(f"{folder} holds no images")
        return names, None
    table = read_labels(path, "all")
    known = [attribute.name for attribute in table.attributes]
    columns = [known.index(name) for name in scorer.names if name in known]
    if not columns:
        raise UserError(f"{path} has labels for {', '.join(known)}; the scorer predicts {', '.join(scorer.names)}")
    attributes = tuple(table.attributes[i] for i in columns)
    shared = replace(table, attributes=attributes, values=table.values[:, columns], weights=table.weights[:, columns])
    table = present_faces(shared, folder)
    return list(table.names), table
