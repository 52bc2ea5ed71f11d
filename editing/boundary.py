"""Boundaries in latent space: fit the direction along which an attribute grows, keep it in a file, walk along it.

InterFaceGAN (Shen et al. 2020, arXiv 2005.09635): score random samples, take the highest and lowest, separate them by a
hyperplane, and move codes along its normal. Three ways to fit: `svc` (the published kernel SVM with a linear kernel),
`svm` (the same problem by liblinear, much faster) and `ridge` (regression of the score on every sample through sums
that are updated batch by batch, so that no latents are kept).

    boundary = fit_boundary(latents, scores, ratio=0.02, fit="svm", space="w++", attribute="age")
    boundary.save("age.npz")
    frames = walk(latent, boundary, np.linspace(-3, 3, 61))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import require_file
from common.files import atomic_write

FITS = ("svc", "svm", "ridge")
SPLIT = 0.7  # of the extremes: fitted on; the rest validates (published)
RIDGE = 1.0  # strength of the penalty, in units of the mean variance of a latent's coordinates times the samples


class BoundaryError(ValueError):
    """A boundary cannot be fitted, read or applied; the message is one sentence."""


@dataclass(frozen=True)
class Boundary:
    """A unit normal in a latent space and what is known of it.

    normal: float32 [1, D], D = 512 for w (and w+, layer by layer) or L * 512 for w++; intercept: the hyperplane is
    normal . x + intercept = 0. mean, std: of normal . x over the samples it was fitted on, so that distances can be
    given in standard deviations. accuracies: train, validation and remaining, each 0..1 or None. orthogonal_to: the
    attributes whose directions were projected out.
    """

    normal: np.ndarray
    intercept: float
    attribute: str
    space: str
    mean: float
    std: float
    fit: str = "svm"
    ratio: float = 0.02
    n_samples: int = 0
    accuracies: dict = field(default_factory=dict)
    orthogonal_to: list = field(default_factory=list)
    fingerprint: str | None = None
    size: int | None = None

    def project(self, codes: np.ndarray) -> np.ndarray:
        """Signed length of codes [N, D] along the normal, [N]; without the intercept, as published."""
        return codes @ self.normal[0]

    def save(self, path) -> Path:
        """Write `.npz`. Raises OSError naming the file."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "normal"}
        with atomic_write(path) as file:
            np.savez(file, normal=self.normal, boundary=json.dumps(facts, ensure_ascii=False))
        return Path(path)


def load_boundary(path, *, space=None, width=None, fingerprint=None) -> Boundary:
    """Read a boundary; space, width (of its normal) and fingerprint (of the generator) are checked where given.

    Raises FileNotFoundError, or BoundaryError when it is another file or belongs elsewhere.
    """
    require_file(path, "boundary")
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["boundary"]))
            known = {f.name for f in fields(Boundary)}
            boundary = Boundary(normal=file["normal"], **{k: v for k, v in facts.items() if k in known})
        normal = boundary.normal
        if normal.ndim != 2 or len(normal) != 1 or not abs(np.linalg.norm(normal) - 1) < 1e-3:
            raise ValueError(f"its normal has shape {list(normal.shape)} or is not of length 1")
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise BoundaryError(f"{path} is no boundary of edit_attribute.py: {error}") from error
    for what, found, expected in (
        ("space", boundary.space, space),
        ("generator", boundary.fingerprint, fingerprint),
        ("width", normal.shape[1], width),
    ):
        if expected is not None and found is not None and found != expected:
            raise BoundaryError(f"{path} is a boundary of {what} {found}, expected {expected}")
    return boundary


# ---------------------------------------------------------------------------------------------------------------------
# Picking extremes


def pick_extremes(scores, ratio: float, *, others=None, n_bins: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `ratio` lowest and highest of scores [N], each sorted by score: (low, high).

    others: [N, K] scores of attributes to balance: both ends get the same number of samples from every cell of their
    joint quantiles (`n_bins` each), so that what the two ends differ in is this attribute alone. Raises BoundaryError
    when fewer than two samples per end remain.
    """
    scores = np.asarray(scores, np.float64)
    if not 0 < ratio <= 0.5:
        raise BoundaryError(f"--ratio {ratio}: expected above 0, at most 0.5")
    count = int(len(scores) * ratio)
    order = np.argsort(scores, kind="stable")
    if others is None:
        low, high = order[:count], order[len(order) - count :]
    else:
        low, high = _balanced(order, _cells(np.asarray(others, np.float64), n_bins), count)
    if min(len(low), len(high)) < 2:
        raise BoundaryError(
            f"{len(scores)} samples at --ratio {ratio:g} leave {len(low)} and {len(high)} extremes; "
            "at least 2 and 2 are needed"
        )
    if scores[low[-1]] >= scores[high[0]]:
        raise BoundaryError(f"the scores do not tell the extremes apart: both ends reach {scores[high[0]]:g}")
    return low, high


def _cells(others, n_bins) -> np.ndarray:
    """[N, K] -> [N]: the cell of joint quantiles that each sample lies in."""
    cell = np.zeros(len(others), np.int64)
    for column in others.T:
        edges = np.quantile(column, np.arange(1, n_bins) / n_bins)
        cell = cell * n_bins + np.searchsorted(edges, column)
    return cell


def _balanced(order, cells, count):
    """Up to `count` from either end of `order`, as many from each cell at one end as at the other."""
    middle = len(order) // 2
    low, high = [], []
    for cell in np.unique(cells):
        members = order[cells[order] == cell]
        share = min(max(1, round(count * len(members) / len(order))), len(members) // 2)
        low += members[:share].tolist()
        high += members[len(members) - share :].tolist()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    low, high = sorted(low, key=rank.__getitem__), sorted(high, key=rank.__getitem__)
    keep_low, keep_high = [i for i in low if rank[i] < middle], [i for i in high if rank[i] >= middle]
    return np.array(keep_low, np.int64), np.array(keep_high, np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def fit_boundary(
    latents,
    scores,
    *,
    ratio=0.02,
    fit="svm",
    seed=0,
    others=None,
    space="w++",
    attribute="",
    fingerprint=None,
    size=None,
    C=1.0,
    ridge=RIDGE,
) -> Boundary:
    """The boundary of an attribute from latents [N, D] (float array, may be memory-mapped) and their scores [N].

    fit: svc | svm: the extreme `ratio` at either end, split 70/30 by `seed` into training and validation (published);
    only these rows are read into memory. ridge: all samples but the validation extremes and a tenth of the others,
    streamed. The normal points to higher scores. Accuracies are reported on the training and validation extremes and on
    the remaining samples (of ridge: those it did not see) against their median score.
    Raises BoundaryError for too few samples, scores that are not finite, or an unknown `fit`.
    """
    scores = np.asarray(scores, np.float64)
    if fit not in FITS:
        raise BoundaryError(f"--fit {fit}: expected one of {', '.join(FITS)}")
    if len(latents) != len(scores):
        raise BoundaryError(f"{len(latents)} latents, but {len(scores)} scores")
    if not np.isfinite(scores).all():
        worst = int(np.argmin(np.isfinite(scores)))
        raise BoundaryError(f"score {worst} of {attribute or 'the attribute'} is not finite")
    low, high = pick_extremes(scores, ratio, others=others)
    draw = np.random.default_rng(seed)
    low, high = draw.permutation(low), draw.permutation(high)
    n_low, n_high = (max(1, int(len(end) * SPLIT)) for end in (low, high))
    train, train_side = np.concatenate((low[:n_low], high[:n_high])), np.repeat([0, 1], (n_low, n_high))
    held = np.concatenate((low[n_low:], high[n_high:]))
    held_side = np.repeat([0, 1], (len(low) - n_low, len(high) - n_high))

    rest = np.setdiff1d(np.arange(len(scores)), np.concatenate((low, high)))
    if fit == "ridge":
        sums = RidgeSums(latents.shape[1])
        keep = np.ones(len(scores), bool)
        keep[held] = False  # they validate
        rest = draw.permutation(rest)[: len(rest) // 10]  # so do these
        keep[rest] = False
        for rows in _batches(np.flatnonzero(keep)):
            sums.add(np.asarray(latents[rows]), scores[rows])
        normal = sums.solve(ridge)
    else:
        order = np.argsort(train)  # ascending rows: a memory-mapped file is read once through
        normal, intercept = separate(np.asarray(latents[train[order]]), train_side[order], fit, C)

    along = _project_all(latents, normal)
    if fit == "ridge":
        intercept = -np.median(along)  # as many samples on either side
    rest_side = scores[rest] > np.median(scores)
    accuracies = {
        name: _accuracy(along[rows] + intercept, side)
        for name, rows, side in (
            ("train", train, train_side),
            ("validation", held, held_side),
            ("remaining", rest, rest_side),
        )
    }
    return Boundary(
        normal=normal[None].astype(np.float32),
        intercept=float(intercept),
        attribute=attribute,
        space=space,
        mean=float(along.mean()),
        std=float(along.std()),
        fit=fit,
        ratio=float(ratio),
        n_samples=len(scores),
        accuracies=accuracies,
        fingerprint=fingerprint,
        size=size,
    )


def separate(latents, side, fit="svm", C=1.0) -> tuple[np.ndarray, float]:
    """Unit normal [D] (float64) and intercept of the hyperplane between latents [N, D] of side 0 and side 1."""
    from sklearn import svm  # a second to import

    if fit == "svc":
        machine = svm.SVC(kernel="linear", C=C)
        machine.fit(latents, side)
    else:
        machine = svm.LinearSVC(C=C, dual=True, loss="hinge", max_iter=20_000, random_state=0)
        machine.fit(latents, side)
    normal = np.asarray(machine.coef_, np.float64)[0]
    length = np.linalg.norm(normal)
    if length == 0:
        raise BoundaryError("the latents of the two ends do not differ")
    return normal / length, float(machine.intercept_[0]) / length


class RidgeSums:
    """Ridge regression of a score on latents, from sums: add() batches in any sizes, solve() at the end.

    Holds [D, D] in float64 (411 MB at D = 7,168), however many samples go through.
    """

    def __init__(self, width: int):
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.sum_x, self.sum_xy = np.zeros(width), np.zeros(width)
        self.n, self.sum_y, self.shift = 0, 0.0, None

    def add(self, latents, scores):
        """latents [N, D], scores [N]."""
        if self.shift is None:  # sums about a point among the samples lose no digits to a large mean
            self.shift = np.mean(latents, 0, dtype=np.float64)
        for rows in _batches(np.arange(len(scores)), 512):
            x = torch.from_numpy(latents[rows] - self.shift)  # float64
            self.gram.addmm_(x.t(), x)  # in place: a product of its own would double the memory
            self.sum_x += x.sum(0).numpy()
            self.sum_xy += x.numpy().T @ scores[rows]
        self.sum_y += float(np.sum(scores))
        self.n += len(scores)

    def solve(self, ridge=RIDGE) -> np.ndarray:
        """Unit normal [D]."""
        from scipy import linalg

        if self.n < 2:
            raise BoundaryError(f"{self.n} samples are too few for a regression")
        mean = self.sum_x / self.n
        about_mean = torch.from_numpy(mean)
        covariance = self.gram.addr_(about_mean, about_mean, alpha=-self.n).numpy().T  # in place; symmetric
        penalty = ridge * np.trace(covariance) / len(mean)
        if not penalty > 0:
            raise BoundaryError("the latents of the samples do not differ")
        covariance[np.diag_indices_from(covariance)] += penalty
        weights = linalg.solve(covariance, self.sum_xy - mean * self.sum_y, assume_a="pos", overwrite_a=True)
        self.gram = None
        length = np.linalg.norm(weights)
        if length == 0:
            raise BoundaryError("the scores of the samples do not differ")
        return weights / length


def _batches(rows, size=4096):
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _project_all(latents, normal) -> np.ndarray:
    """normal . x of every one of the latents [N, D], [N]."""
    return np.concatenate([np.asarray(latents[rows]) @ normal for rows in _batches(np.arange(len(latents)))])


def _accuracy(distance, side):
    return float(np.mean((distance > 0) == side)) if len(side) else None


# ---------------------------------------------------------------------------------------------------------------------
# Walking


def orthogonalise(boundary: Boundary, others, latents) -> Boundary:
    """The boundary with the directions of other boundaries projected out, so that walking leaves those attributes.

    latents: samples [N, D]; mean and std along the new normal are theirs, and the hyperplane lies at their median. The
    accuracies were those of the old normal and go. Raises BoundaryError when nothing is left, or the spaces differ.
    """
    normals = np.concatenate([other.normal for other in others]).astype(np.float64)  # [K, D]
    for other in others:
        if (other.space, other.normal.shape) != (boundary.space, boundary.normal.shape):
            raise BoundaryError(
                f"boundary {other.attribute} is of space {other.space} {list(other.normal.shape)}, "
                f"{boundary.attribute} of {boundary.space} {list(boundary.normal.shape)}"
            )
    basis = np.linalg.svd(normals, full_matrices=False)
    basis = basis[2][basis[1] > 1e-6]  # [rank, D], orthonormal
    normal = boundary.normal[0].astype(np.float64)
    left = normal - basis.T @ (basis @ normal)
    length = np.linalg.norm(left)
    if length < 1e-3:
        names = ", ".join(other.attribute for other in others)
        raise BoundaryError(f"nothing of the boundary {boundary.attribute} is left beside {names}")
    normal = (left / length).astype(np.float32)
    along = _project_all(latents, normal)
    return replace(
        boundary,
        normal=normal[None],
        intercept=-float(np.median(along)),
        mean=float(along.mean()),
        std=float(along.std()),
        accuracies={},
        orthogonal_to=[other.attribute for other in others],
    )


def walk(latents, boundary: Boundary, distances, *, distance="relative", layers=None) -> np.ndarray:
    """Codes along the normal: latents [L, 512], distances [K] -> float32 [K, L, 512].

    distance "absolute" (published for one long vector per image): a frame's own projection on the normal *is* the
    distance, so that the unedited code is in general none of the frames; "relative": the distance is added. A 512-wide
    boundary moves every layer by the same step (absolute: layer by layer). layers: range or list of the layers that
    move; the others stay (absolute: the projection of the moving part is what is set).
    """
    latents = np.asarray(latents, np.float32)
    n_layers, width = latents.shape
    steps = np.asarray(distances, np.float64)
    moving = np.zeros(n_layers, bool)
    moving[list(range(n_layers) if layers is None else layers)] = True
    normal = boundary.normal.reshape(-1, width).astype(np.float64)  # [1 or L, 512]
    if len(normal) not in (1, n_layers):
        raise BoundaryError(
            f"boundary {boundary.attribute} has {boundary.normal.shape[1]} numbers, the code {n_layers} x {width}"
        )
    direction = np.broadcast_to(normal, latents.shape) * moving[:, None]  # [L, 512]
    if distance == "relative":
        offsets = steps[:, None, None] * direction
    elif distance == "absolute":
        along = (latents * direction).sum(-1, keepdims=True)  # [L, 1]
        weight = np.ones_like(along)
        if len(normal) > 1:  # one vector: one projection for all layers
            along, weight = along.sum(), np.square(direction).sum()
        offsets = (steps[:, None, None] - along) / np.maximum(weight, 1e-12) * direction
    else:
        raise BoundaryError(f"--distance {distance}: expected absolute or relative")
    return (latents + offsets).astype(np.float32)
