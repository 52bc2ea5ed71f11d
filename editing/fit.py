"""Fits of a boundary to scored samples: the published SVM, and ridge regression given the other attributes.

InterFaceGAN (Shen et al. 2020, arXiv 2005.09635, section 3.1) separates the highest and the lowest scores by a linear
SVM. Ridge regression uses every sample, through sums, so that no latents are kept, and can hold other attributes fixed:
the plain direction also moves attributes that correlate in the data (older faces wear glasses).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.cli import UsageError
from common.distributed import broadcast_object
from common.files import safe_name
from editing.boundary import Boundary, BoundaryError, orthogonalise, project_all
from editing.realism import edit_range
from editing.samples import Samples, score_samples
from perceptual.identity import build_identity

FIT_METHODS = ("ridge", "svm", "svc")
SPLIT = 0.7  # of the extremes: fitted on; the rest validates (published)
RIDGE = 1.0  # strength of the penalty, in units of the mean variance of a latent's coordinates times the samples
BLOCK = 512  # rows in memory at a time
N_MEASURED = 10_000  # samples, at most, over which the statistics of a given direction are taken


def pick_extremes(scores, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `ratio` lowest and highest of scores [N], each sorted by score: (low, high). Raises BoundaryError
    when fewer than two samples per end remain, or the ends do not differ."""
    scores = np.asarray(scores, np.float64)
    if not 0 < ratio <= 0.5:
        raise BoundaryError(f"--ratio {ratio}: expected above 0, at most 0.5")
    n, count = len(scores), int(len(scores) * ratio)
    order = np.argsort(scores, kind="stable")
    low, high = order[:count], order[n - count :]
    if count < 2:
        raise BoundaryError(f"{n} samples at --ratio {ratio:g} leave {count} extremes per end; at least 2 are needed")
    if scores[low[-1]] >= scores[high[0]]:
        raise BoundaryError(f"the scores do not tell the extremes apart: both ends reach {scores[high[0]]:g}")
    return low, high


def fit_svm(latents, side, *, kernel: bool = False) -> tuple[np.ndarray, float]:
    """Unit normal [D] (float64) and intercept of the hyperplane between latents [N, D] of side 0 and side 1. kernel:
    scikit-learn's SVC, as published; else liblinear, which solves the same problem much faster."""
    from sklearn import svm  # a second to import

    if kernel:
        machine = svm.SVC(kernel="linear")
    else:
        machine = svm.LinearSVC(dual=True, loss="hinge", max_iter=20_000, random_state=0)
    machine.fit(latents, side)
    return _unit(machine.coef_[0], machine.intercept_[0], "the latents of the two ends do not differ")


def fit_ridge(latents, scores, *, others=None, rows=None) -> tuple[np.ndarray, float]:
    """Unit normal [D] (float64) and intercept of the ridge regression of scores [N] on latents [N, D].

    others: [N, K], scores that are held fixed: regressors beside the latent, without penalty (Frisch and Waugh 1933).
    rows: those that are used (default all), read BLOCK at a time; memory is [D, D] in float64. The hyperplane goes
    through their mean. Raises BoundaryError for fewer than two rows, or latents or scores that do not differ.
    """
    from scipy import linalg

    rows = np.arange(len(latents)) if rows is None else rows
    n, width = len(rows), latents.shape[1]
    if n < 2:
        raise BoundaryError(f"{n} samples are too few for a regression")
    targets = np.asarray(scores, np.float64)[:, None]
    targets = targets if others is None else np.concatenate((targets, np.asarray(others, np.float64)), 1)
    y = targets[rows] - targets[rows].mean(0)  # [n, 1 + K]
    gram, sum_x, sum_xy, shift = torch.zeros(width, width, dtype=torch.float64), 0, 0, None
    for start in range(0, n, BLOCK):
        block = np.asarray(latents[rows[start : start + BLOCK]])
        shift = np.mean(block, 0, dtype=np.float64) if shift is None else shift  # sums about it keep their digits
        x = torch.from_numpy(block - shift)
        gram.addmm_(x.t(), x)  # in place: a product of its own would double the memory
        sum_x, sum_xy = sum_x + x.sum(0).numpy(), sum_xy + x.numpy().T @ y[start : start + BLOCK]
    mean = torch.from_numpy(sum_x / n)
    covariance = gram.addr_(mean, mean, alpha=-n).numpy().T  # times n; in place, symmetric
    strength = RIDGE * np.trace(covariance) / width
    if not strength > 0:
        raise BoundaryError("the latents of the samples do not differ")
    score, sums = y[:, 0], sum_xy[:, 0]
    if others is not None:  # the others leave latents and scores alike
        inverse = np.linalg.pinv(y[:, 1:].T @ y[:, 1:], hermitian=True)  # [K, K]
        sums = sums - sum_xy[:, 1:] @ (inverse @ (y[:, 1:].T @ score))
        for start in range(0, width, BLOCK):  # a [D, D] product of its own would double the memory
            covariance[start : start + BLOCK] -= (sum_xy[start : start + BLOCK, 1:] @ inverse) @ sum_xy[:, 1:].T
    covariance[np.diag_indices(width)] += strength
    weights = linalg.solve(covariance, sums, assume_a="pos", overwrite_a=True)
    return _unit(weights, -weights @ (shift + mean.numpy()), "the scores of the samples do not differ")


def _unit(weights, intercept, complaint):
    length = np.linalg.norm(weights)
    if not length > 0:
        raise BoundaryError(complaint)
    return np.asarray(weights, np.float64) / length, float(intercept) / length


def fit_boundary(
    latents,  # [N, D]: an array, or what gives rows when indexed by an array of them (editing/samples.py)
    scores,  # [N]
    *,
    fit: str = "ridge",  # ridge | svm | svc (published)
    ratio: float = 0.02,  # share of the samples at either end: svm and svc are fitted on them, ridge is validated
    others=None,  # [N, K]: scores of attributes to hold fixed (ridge)
    seed: int = 0,  # of the split into training and validation
    **info,  # further fields of the Boundary: attribute, space, fingerprint, size ...
) -> Boundary:
    """The boundary of an attribute; the normal points to higher scores.

    svm, svc: fitted on the extremes, split 70/30 into training and validation. ridge: on all samples but the validation
    extremes and a tenth of those between. Accuracies are those of the extremes and of the remaining samples against
    their median score. Raises BoundaryError for too few samples or scores that are not finite.
    """
    scores = np.asarray(scores, np.float64)
    if fit not in FIT_METHODS:
        raise BoundaryError(f"--fit {fit}: expected one of {', '.join(FIT_METHODS)}")
    if len(latents) != len(scores):
        raise BoundaryError(f"{len(latents)} latents, but {len(scores)} scores")
    if not np.isfinite(scores).all():
        worst = int(np.argmin(np.isfinite(scores)))
        raise BoundaryError(f"score {worst} of {info.get('attribute') or 'the attribute'} is not finite")
    extremes = pick_extremes(scores, ratio)
    draw, every = np.random.default_rng(seed), np.arange(len(scores))
    ends = [np.split(draw.permutation(end), [max(1, int(len(end) * SPLIT))]) for end in extremes]
    (low, held_low), (high, held_high) = ends
    rest = np.setdiff1d(every, np.concatenate(extremes))
    if fit == "ridge":
        rest = draw.permutation(rest)[: len(rest) // 10]
        used = np.setdiff1d(every, np.concatenate((rest, held_low, held_high)))
        normal, intercept = fit_ridge(latents, scores, others=others, rows=used)
    else:
        rows, side = np.concatenate((low, high)), np.repeat([0, 1], [len(low), len(high)])
        order = np.argsort(rows)  # ascending: a memory-mapped file is read once through
        normal, intercept = fit_svm(np.asarray(latents[rows[order]]), side[order], kernel=fit == "svc")
    along = project_all(latents, normal)
    above, median = along + intercept > 0, np.median(scores)
    sides = {"train": (low, high), "validation": (held_low, held_high)}
    sides["remaining"] = (rest[scores[rest] <= median], rest[scores[rest] > median])
    statistics = {"mean": float(along.mean()), "std": float(along.std()), "n_samples": len(scores)}
    statistics["accuracies"] = {name: _accuracy(above, *ends) for name, ends in sides.items()}
    info = {"attribute": "", "space": None, "fit": fit, "ratio": float(ratio)} | statistics | info
    return Boundary(normal[None].astype(np.float32), intercept, **info)


def _accuracy(above, low, high) -> float | None:
    hits = np.concatenate((~above[low], above[high]))
    return float(hits.mean()) if len(hits) else None


def fit_attribute(
    samples: Samples,
    scorer,
    attribute: str,
    *,
    conditional: str = "auto",  # attributes to hold fixed: auto (all others with ridge), none, or names with commas
    free_of: Sequence[Boundary] = (),  # boundaries that are projected out
    scoring: dict,  # folder, batch, dist of `score_samples`
    folder: Path,  # where the boundary is saved
    weights_dir: Path | None = None,  # of third-party weights, looked into first
    **settings,  # fit, ratio, seed of `fit_boundary`
) -> Boundary:
    """Score samples, fit, project out, measure the range, save; the ranks share the scoring, all return the boundary.
    Raises ValueError for an attribute that the scorer does not know."""
    every = scorer.names if settings["fit"] == "ridge" else ()
    names = {"auto": every, "none": ()}.get(conditional, conditional.split(","))
    given = [name.strip() for name in names if name.strip() != attribute]
    if given and not every:
        raise UsageError(f"--conditional_fit {conditional} is for --fit ridge, not {settings['fit']}")
    columns = [scorer.column(name) for name in (attribute, *given)]  # known, before the hours of scoring
    identity = build_identity("auto", samples.generator.token.device, weights_dir)
    table = score_samples(samples, scorer, **scoring)[:, columns]
    if not scoring["dist"].is_main:
        return broadcast_object(None)
    config = samples.generator.config
    info = {"space": config.space, "size": config.size, "fingerprint": samples.generator.fingerprint, "given": given}
    info |= {"attribute": attribute, "truncation": samples.truncation}
    boundary = fit_boundary(samples, table[:, 0], others=table[:, 1:] if given else None, **settings, **info)
    shown = ", ".join(f"{part} {value:.1%}" for part, value in boundary.accuracies.items() if value is not None)
    if free_of:
        boundary, shown = orthogonalise(boundary, free_of, samples), f"{shown} before the projection"
    text = f" given {', '.join(given)}" if given else ""
    print(f"{attribute}: {boundary.fit} on {len(samples)} samples{text}, accuracy {shown}")
    if bounds := edit_range(samples, boundary, identity):
        print(f"{attribute}: edits stay faces from {bounds[0]:+g} to {bounds[1]:+g} standard deviations")
    else:
        print(f"{attribute}: no range was found: too few samples, no faces among them, or none that stay faces")
    boundary = replace(boundary, range=bounds)
    path = boundary.save(folder / f"boundary-{safe_name(attribute)}.npz")
    print(f"{path}: one standard deviation is {boundary.std:.3g}")
    return broadcast_object(boundary)


def measure_boundary(boundary: Boundary, free_of, samples: Samples) -> Boundary:
    """A given boundary with the directions `free_of` projected out, and its standard deviation over the samples."""
    samples = Samples(samples.generator, samples.seeds[:N_MEASURED], truncation=samples.truncation)
    boundary = boundary if boundary.std else boundary.measured_on(samples)
    return orthogonalise(boundary, free_of, samples) if free_of else boundary
