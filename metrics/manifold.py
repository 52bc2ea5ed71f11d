"""Precision, recall, density and coverage of features, in blocks: no N x N matrix, on CPU and CUDA.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage: Naeem et al. 2020
(arXiv 2002.09797). A sample is inside a ball when it is closer to the centre than the centre's k-th neighbour,
strictly, as in the authors' package `prdc`, whose results these are. Density is not capped at 1. Real and fake do not
commute.

    compute_prdc(real, fake, nearest_k=5)["recall"]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

BLOCK = 2048  # rows and columns of a tile of distances: 16 MiB, and matrix products at full speed
SPARE = 8  # neighbours kept beyond the k-th, so that rounding cannot hide the right one
UNIT = 2.0**-24  # rounding unit of float32
CACHED_BYTES = 2 << 20  # of float64 values at a time: stays in the processor's cache
FEW_ROWS = 256  # at a time, where little memory matters more than speed
PAIRS = 1 << 20  # pairs of a tile looked at one by one, at a time

PRDC = ("precision", "recall", "density", "coverage")


@torch.no_grad()
def compute_prdc(real, fake, *, nearest_k: int, block: int = BLOCK, device="cpu", progress: bool = False) -> dict:
    """{"precision", "recall", "density", "coverage"} as floats, of features real [N, D] and fake [M, D].

    Arrays (memory-mapped ones too) or tensors, compared as float32; N and M may differ. nearest_k: the neighbour that
    sets a ball's radius, the centre itself not counted. Every distance that decides something is the same whatever
    block, thread or device: tiles of float32 products (matrix |x|² + |y|² - 2xy) leave the pairs within their rounding
    error of a radius open, and those are taken again by differences in float64. Memory beyond the features: one tile of
    block² floats with its mask, two blocks x D, lists of at most PAIRS pairs, and nearest_k + 9 neighbours per point.
    Raises ValueError: other shapes, values that are not finite, fewer than nearest_k + 1 points.
    """
    device = "cpu" if torch.device(device).type == "mps" else device  # Metal has no float64
    real, fake = _features(real, "real"), _features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}: two extractors?")
    for name, points in (("real", real), ("fake", fake)):
        if nearest_k < 1 or len(points) < nearest_k + 1:
            raise ValueError(
                f"nearest_k {nearest_k} needs at least {max(nearest_k, 1) + 1} {name} points and a k from "
                f"1, got {len(points)}"
            )
    n_real, n_fake = (-(-len(points) // block) for points in (real, fake))
    n_tiles = n_real * (n_real + 1) // 2 + n_fake * (n_fake + 1) // 2 + n_real * n_fake
    work = _Workspace(min(block, max(len(real), len(fake))), real.shape[1], device)
    with _full_precision(), tqdm(total=n_tiles, desc="PRDC", unit="tile", disable=None if progress else True) as bar:
        real_points = _Points(real, device)
        real_radii = _radii(real_points, nearest_k, block, work, bar)
        fake_radii = _radii(_Points(fake, device), nearest_k, block, work, bar)
        fake_points = _Points(fake, device, real_points.mean)
        in_real_balls, covered, recalled = _balls(real_points, fake_points, real_radii, fake_radii, block, work, bar)
    return {
        "precision": float((in_real_balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(1 / nearest_k * in_real_balls.double().mean()),
        "coverage": float(covered.double().mean()),
    }


def _features(values, name: str) -> torch.Tensor:
    values = _from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
    if values.ndim != 2:
        raise ValueError(f"{name} features have the shape {list(values.shape)}; expected [N, D]")
    values = values.detach().to(torch.float32)
    for rows in values.split(FEW_ROWS):
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{name} features hold values that are not finite (NaN or infinite): broken images or weights?"
            )
    return values


def _from_numpy(values: np.ndarray) -> torch.Tensor:
    if values.flags.writeable:
        return torch.from_numpy(values)
    with warnings.catch_warnings():  # of read-only memory, such as a file mapped with mode "r": nothing writes to it
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)


class _full_precision:
    """No TF32: the error bounds are those of float32."""

    def __enter__(self):
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_):
        torch.set_float32_matmul_precision(self.before)


class _Points:
    """Features on their way to the device, block by block, centred: shorter vectors, smaller rounding errors."""

    def __init__(self, values: torch.Tensor, device, mean: torch.Tensor | None = None):
        self.values, self.device = values, torch.device(device)
        dim = values.shape[1]
        self.n_cached = max(1, CACHED_BYTES // (8 * dim))  # rows whose float64 values stay in the cache
        if mean is None:
            total = torch.zeros(dim, dtype=torch.float64)
            for rows in values.split(self.n_cached):
                total += rows.sum(0, dtype=torch.float64).cpu()
            mean = (total / len(values)).float().to(self.device)
        self.mean = mean  # [D]
        # Results go into place, values into two buffers: small lasting tensors between large passing ones would leave
        # holes in the heap that grow with N
        self.buffers = torch.empty(2, self.n_cached, dim, dtype=torch.float64, device=self.device)
        self.norms = torch.empty(len(values), device=self.device)  # [N], squared
        for rows in self.blocks(self.n_cached):
            centred = self.buffers[0, : rows.stop - rows.start].copy_(values[rows].to(self.device) - mean)
            self.norms[rows] = centred.square_().sum(1)
        # |computed - true| of a squared distance <= error * (|x|² + |y|²): D products and sums, each within UNIT, and
        # the rounding of centring, norms and their sum (Higham 2002, section 3.1)
        self.error = (dim + 16) * UNIT

    def __len__(self):
        return len(self.values)

    def blocks(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def exact(self, rows: torch.Tensor, others: _Points, columns: torch.Tensor) -> torch.Tensor:
        """Distances of pairs, [P], float64 rounded to float32 before and after the root: as `prdc` gets them."""
        result = torch.empty(len(rows), device=self.device)
        for start in range(0, len(rows), self.n_cached):
            part = slice(start, min(start + self.n_cached, len(rows)))
            a, b = self.buffers[:, : part.stop - start]
            for points, positions, values in ((self, rows, a), (others, columns, b)):
                values.copy_(points.values[positions[part].to(points.values.device)])
            result[part] = a.sub_(b).square_().sum(1).float().sqrt()
        return result


class _Workspace:
    """Two blocks of points and a tile of distances between them, used again and again: on a CPU, fresh memory for
    every tile would cost as much as all that is done with it but the product."""

    def __init__(self, block: int, dim: int, device):
        self.sides = torch.empty(2, block, dim, device=device)
        self.distances = torch.empty(block * block, device=device)
        self.below = torch.empty(block * block, dtype=torch.bool, device=device)

    def load(self, side: int, points: _Points, rows: slice) -> torch.Tensor:
        """Centred points [B, D]."""
        values = points.values[rows]
        return torch.sub(values.to(points.device), points.mean, out=self.sides[side, : len(values)])

    def squared(self, a, b, aa, bb) -> torch.Tensor:
        """Squared distances [A, B], up to rounding, of a [A, D] and b [B, D] with squared norms aa and bb."""
        tile = self.distances[: len(a) * len(b)].view(len(a), len(b))
        torch.add(aa[:, None], bb, out=tile)
        return tile.addmm_(a, b.T, alpha=-2)

    def pairs(self, tile: torch.Tensor, limits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Positions (i, j), in order, where the tile is below the limits, which broadcast against it; in portions."""
        mask = torch.lt(tile, limits, out=self.below[: tile.numel()].view(tile.shape))
        width, n_rows = tile.shape[1], max(1, PAIRS // tile.shape[1])
        for start in range(0, len(tile), n_rows):
            found = mask[start : start + n_rows].view(-1).nonzero()[:, 0]
            if len(found):
                yield found // width + start, found % width


# ---------------------------------------------------------------------------------------------------------------------
# Radii


def _radii(points: _Points, k: int, block: int, work: _Workspace, bar) -> torch.Tensor:
    """Distance to the k-th neighbour, the point itself not counted, [N]."""
    n, kept = len(points), min(len(points), k + 1 + SPARE)
    nearest = points.norms.new_full((n, kept), torch.inf)  # squared, up to rounding
    which = torch.zeros((n, kept), dtype=torch.int64, device=points.device)
    blocks = points.blocks(block)
    for rows in blocks:  # neighbours within a block: of what comes after, only what is nearer is looked at
        a = work.load(0, points, rows)
        tile = work.squared(a, a, points.norms[rows], points.norms[rows])
        tile.fill_diagonal_(-torch.inf)  # a point is its own neighbour 0
        _keep_nearest(nearest[rows], which[rows], tile, rows.start)
        bar.update()
    for position, rows in enumerate(blocks):
        a = work.load(0, points, rows)
        for columns in blocks[position + 1 :]:  # half of a symmetric matrix, for the points of both sides
            b = work.load(1, points, columns)
            tile = work.squared(a, b, points.norms[rows], points.norms[columns])
            for i, j in work.pairs(tile, nearest[rows, -1:]):
                _merge(nearest[rows], which[rows], i, j + columns.start, tile[i, j])
            for i, j in work.pairs(tile, nearest[columns, -1]):
                j, order = j.sort()
                i = i[order]
                _merge(nearest[columns], which[columns], j, i + rows.start, tile[i, j])
            bar.update()
    reach = points.error * (points.norms + points.norms.max())
    radii = _kth_exact(points, torch.arange(n, device=points.device), nearest, which, k, reach)
    # A point that was not kept is at least this far; if that may be within the radius, look at all in float64
    unsure = (nearest[:, -1] - reach < radii.square() * (1 + 8 * UNIT)) & (radii > 0)
    if kept < n and unsure.any():
        rows = unsure.nonzero()[:, 0]
        radii[rows] = _radii_double(points, rows, k, kept, block)
    return radii


def _keep_nearest(nearest: torch.Tensor, which: torch.Tensor, tile: torch.Tensor, start: int) -> None:
    """Merge the columns of a tile into the smallest values per row, in place; `which` are their positions."""
    values, columns = tile.topk(min(nearest.shape[1], tile.shape[1]), dim=1, largest=False)
    values, order = torch.cat((nearest, values), 1).topk(nearest.shape[1], dim=1, largest=False)
    which.copy_(torch.cat((which, columns + start), 1).gather(1, order))
    nearest.copy_(values)


def _merge(nearest: torch.Tensor, which: torch.Tensor, rows, ids, values) -> None:
    """As _keep_nearest, of single values [P] with their ids, in order of their rows."""
    rows, place, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(values), device=values.device) - first[place]
    shape = (len(rows), int(counts.max()))
    new, new_ids = values.new_full(shape, torch.inf), ids.new_zeros(shape)
    new[place, column], new_ids[place, column] = values, ids
    found, order = torch.cat((nearest[rows], new), 1).topk(nearest.shape[1], dim=1, largest=False)
    which[rows] = torch.cat((which[rows], new_ids), 1).gather(1, order)
    nearest[rows] = found


def _kth_exact(points: _Points, rows, nearest, which, k: int, reach) -> torch.Tensor:
    """The k-th neighbour's distance [R] among candidates [R, C] (the row is one), known up to `reach` [R] in square.

    Only those that may be the k-th are measured: the others are certainly nearer or certainly farther.
    """
    kth = nearest[:, k, None]
    open_ = (nearest >= kth - 2 * reach[:, None]) & (nearest <= kth + 2 * reach[:, None])
    distances = torch.where(nearest < kth, -torch.inf, torch.inf).float()
    i, j = open_.nonzero(as_tuple=True)
    distances[i, j] = points.exact(rows[i], points, which[i, j])
    return distances.kthvalue(k + 1, dim=1).values


def _radii_double(points: _Points, rows: torch.Tensor, k: int, kept: int, block: int) -> torch.Tensor:
    """_radii of some rows, the candidates found in float64: for clusters far tighter than they are distant."""
    result, block = [], min(block, FEW_ROWS)
    for chosen in rows.split(block):
        nearest = torch.full((len(chosen), kept), torch.inf, dtype=torch.float64, device=points.device)
        which = torch.zeros((len(chosen), kept), dtype=torch.int64, device=points.device)
        a = points.values[chosen.to(points.values.device)].to(points.device).double() - points.mean.double()
        for columns in points.blocks(block):
            b = points.values[columns].to(points.device).double() - points.mean.double()
            tile = torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)
            tile[chosen[:, None] == torch.arange(columns.start, columns.stop, device=points.device)] = -torch.inf
            _keep_nearest(nearest, which, tile, columns.start)
        result.append(_kth_exact(points, chosen, nearest, which, k, points.norms.new_full((len(chosen),), torch.inf)))
    return torch.cat(result)


# ---------------------------------------------------------------------------------------------------------------------
# Balls


def _balls(real: _Points, fake: _Points, real_radii, fake_radii, block: int, work: _Workspace, bar):
    """How many real balls hold each fake [M], which real balls hold a fake [N], which reals a fake ball holds [N]."""
    in_real_balls = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows in real.blocks(block):
        a = work.load(0, real, rows)
        for columns in fake.blocks(block):
            b = work.load(1, fake, columns)
            tile = work.squared(a, b, real.norms[rows], fake.norms[columns])
            margin = real.error * (real.norms[rows] + fake.norms[columns].max())
            for i, j in _inside(real, fake, tile, rows, columns, real_radii[rows, None], margin[:, None], work):
                in_real_balls.index_add_(0, j, torch.ones_like(j))
                covered[i] = True
            margin = real.error * (real.norms[rows].max() + fake.norms[columns])
            for i, _ in _inside(real, fake, tile, rows, columns, fake_radii[columns], margin, work):
                recalled[i] = True
            bar.update()
    return in_real_balls, covered, recalled


def _inside(real, fake, tile, rows, columns, radii, margin, work) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Positions (i, j) of the pairs of a tile closer than `radii`, which broadcasts against it; margin: its error."""
    squares = radii.square()
    slack = margin + squares * (8 * UNIT)  # of squaring and of the root
    certain, radii = (squares - slack).expand_as(tile), radii.expand_as(tile)
    for i, j in work.pairs(tile, squares + slack):  # all that may be inside
        sure, limits = tile[i, j] < certain[i, j], radii[i, j]
        i, j = i + rows.start, j + columns.start
        open_ = (~sure).nonzero()[:, 0]
        sure[open_] = real.exact(i[open_], fake, j[open_]) < limits[open_]
        yield i[sure], j[sure]
