"""Quality of scores, and how honest they are: errors, ranking, calibration. closed forms in tests/scorer.

Labels here may be soft (another network's probabilities): above 0.5 counts as yes for ranking and accuracy, and
calibration compares mean prediction with mean label.
"""

from __future__ import annotations

import numpy as np

from scorer.labels import Attribute, LabelTable

AGE_BANDS = ((0, 10), (10, 20), (20, 40), (40, 60), (60, 101))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties half. NaN without both."""
    from sklearn.metrics import roc_auc_score  # a second to import

    positive = np.asarray(positive, bool)
    return float(roc_auc_score(positive, scores)) if positive.any() and not positive.all() else float("nan")


def balanced_accuracy(predicted: np.ndarray, positive: np.ndarray) -> float:
    """Mean of the hit rates on positives and on negatives. NaN without both."""
    predicted, positive = np.asarray(predicted, bool), np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return float("nan")
    return float((predicted[positive].mean() + (~predicted[~positive]).mean()) / 2)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over equal bins of [0, 1]: sum of n_b/n |mean prediction - mean label|."""
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(index, probabilities - labels, bins)  # sum of differences per bin
    return float(np.abs(gaps).sum() / len(labels))


def measure(attribute: Attribute, scores: np.ndarray, labels: np.ndarray) -> dict:
    """Plain numbers for one attribute; scores and labels [n], all known, n > 0.

    Years and values: mae, bias (score minus label), correlation, slope of the score over the label (below 1: drawn to
    the mean); years also within_5 and mae per band. Probability: balanced_accuracy, auc, ece, mae, positives.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    error = scores - labels
    found = {"n": len(labels), "mae": float(np.abs(error).mean())}
    if attribute.kind == "probability":
        positive = labels > 0.5
        return found | {
            "positives": int(positive.sum()),
            "balanced_accuracy": balanced_accuracy(scores > 0.5, positive),
            "auc": auc(scores, positive),
            "ece": calibration_error(scores, labels),
        }
    found["bias"] = float(error.mean())
    if len(labels) > 1 and labels.std() > 0 and scores.std() > 0:
        found["correlation"] = float(np.corrcoef(scores, labels)[0, 1])
        found["slope"] = found["correlation"] * float(scores.std() / labels.std())
    if attribute.kind == "years":
        found["within_5"] = float((np.abs(error) <= 5).mean())
        for low, high in AGE_BANDS:
            band = (labels >= low) & (labels < high)
            if band.any():
                found[f"mae_{low}_{high - 1}"] = float(np.abs(error[band]).mean())
    return found


def accuracy_report(scores: np.ndarray, table: LabelTable) -> dict:
    """scores [N, A] of the faces of `table` -> {attribute: measure(...), plus `by_source` where makers differ}."""
    report = {}
    for column, attribute in enumerate(table.attributes):
        labels, makers = table.values[:, column], table.sources[:, column]
        known = np.isfinite(labels)
        if not known.any():
            continue
        report[attribute.name] = measure(attribute, scores[known, column], labels[known])
        groups = sorted(set(makers[known]) - {""})
        if len(groups) > 1:
            report[attribute.name]["by_source"] = {
                maker: measure(attribute, scores[rows, column], labels[rows])
                for maker in groups
                for rows in [known & (makers == maker)]
            }
    return report


def format_report(report: dict) -> str:
    """The report as a table for people."""
    lines = [f"{'attribute':14}{'labels by':16}{'n':>6}  numbers"]
    for name, numbers in report.items():
        rows = [("all", numbers), *numbers.get("by_source", {}).items()]
        for maker, values in rows:
            cells = [f"{key} {value:.3f}" for key, value in values.items() if isinstance(value, float)]
            lines.append(f"{name:14}{maker:16}{values['n']:6}  {'  '.join(cells)}")
    return "\n".join(lines)
