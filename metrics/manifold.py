"""Precision, recall, density and coverage of features, in blocks: no N x N matrix, on CPU and CUDA.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage: Naeem et al. 2020
(arXiv 2002.09797). A sample is inside a ball when it is closer to the centre than the centre's k-th neighbour,
strictly, as in the authors' package `prdc`, whose results these are. Density is not capped at 1. Real and fake do not
commute.

    compute_prdc(real, fake, nearest_k=5)["recall"]
"""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

BLOCK = 2048  # rows and columns of a tile of distances: 16 MiB, and matrix products at full speed
SPARE = 8  # neighbours kept beyond the k-th, so that rounding cannot hide the right one
UNIT = 2.0**-24  # rounding unit of float32
EXACT_BYTES = 2 << 20  # of float64 differences at a time: stays in the cache

PRDC = ("precision", "recall", "density", "coverage")


@torch.no_grad()
def compute_prdc(real, fake, *, nearest_k: int, block: int = BLOCK, device="cpu", progress: bool = False) -> dict:
    """{"precision", "recall", "density", "coverage"} as floats, of features real [N, D] and fake [M, D].

    Arrays or tensors, compared as float32; N and M may differ. nearest_k: the neighbour that sets a ball's radius, the
    centre itself not counted. Every distance that decides something is the same whatever block, thread or device: tiles
    of float32 products (matrix |x|² + |y|² - 2xy) leave the pairs within their rounding error of a radius open, and
    those are taken again by differences in float64. Memory beyond the features: about 12 tiles of block² floats and two
    of block x D. Raises ValueError: other shapes, values that are not finite, fewer than nearest_k + 1 points.
    """
    device = "cpu" if torch.device(device).type == "mps" else device  # Metal has no float64
    real, fake = _features(real, "real"), _features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}: two extractors?")
    for name, points in (("real", real), ("fake", fake)):
        if nearest_k < 1 or len(points) < nearest_k + 1:
            raise ValueError(f"nearest_k {nearest_k} needs at least {max(nearest_k, 1) + 1} {name} points and a k from "
                             f"1, got {len(points)}")  # fmt: skip
    n_tiles = sum(n * (n + 1) // 2 for n in (_n_blocks(real, block), _n_blocks(fake, block)))
    n_tiles += _n_blocks(real, block) * _n_blocks(fake, block)
    with _full_precision(), tqdm(total=n_tiles, desc="PRDC", unit="tile", disable=None if progress else True) as bar:
        real_radii = _radii(_Points(real, device), nearest_k, block, bar)
        fake_radii = _radii(_Points(fake, device), nearest_k, block, bar)
        mean = _mean(real)
        inside = _balls(_Points(real, device, mean), _Points(fake, device, mean), real_radii, fake_radii, block, bar)
    in_real_balls, covered, recalled = inside
    return {
        "precision": float((in_real_balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(1 / nearest_k * in_real_balls.double().mean()),
        "coverage": float(covered.double().mean()),
    }


def _features(values, name: str) -> torch.Tensor:
    values = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
    if values.ndim != 2:
        raise ValueError(f"{name} features have the shape {list(values.shape)}; expected [N, D]")
    values = values.detach().to(torch.float32)
    for rows in values.split(BLOCK):
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name} features hold values that are not finite (NaN or infinite): broken images or "
                             "weights?")  # fmt: skip
    return values


def _n_blocks(points, block: int) -> int:
    return -(-len(points) // block)


def _mean(points: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows.double().sum(0) for rows in points.split(BLOCK)]).sum(0).div_(len(points)).float()


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
        self.mean = (_mean(values) if mean is None else mean).to(self.device)
        self.norms = torch.cat([self.block(rows).double().square().sum(1).float() for rows in self.blocks(BLOCK)])
        # |computed - true| of a squared distance <= error * (|x|² + |y|²): D products and sums, each within UNIT, and
        # the rounding of centring, norms and their sum (Higham 2002, section 3.1)
        self.error = (values.shape[1] + 16) * UNIT

    def __len__(self):
        return len(self.values)

    def blocks(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def block(self, rows: slice) -> torch.Tensor:
        return self.values[rows].to(self.device) - self.mean

    def exact(self, rows: torch.Tensor, others: _Points, columns: torch.Tensor) -> torch.Tensor:
        """Distances of pairs, [P], float64 rounded to float32 before and after the root: as `prdc` gets them."""
        result = []
        for i, j in zip(rows.split(self.n_exact), columns.split(self.n_exact), strict=True):
            a, b = (p.values[index.to(p.values.device)].to(self.device) for p, index in ((self, i), (others, j)))
            result.append((a.double() - b.double()).square().sum(1).float().sqrt())
        return torch.cat(result) if result else torch.empty(0, device=self.device)

    @property
    def n_exact(self) -> int:
        return max(1, EXACT_BYTES // (8 * self.values.shape[1]))


def _squared(a, b, aa, bb) -> torch.Tensor:
    """Squared distances [A, B], up to rounding, of a [A, D] and b [B, D] with squared norms aa and bb."""
    return torch.addmm(aa[:, None] + bb, a, b.T, alpha=-2)


def _radii(points: _Points, k: int, block: int, bar) -> torch.Tensor:
    """Distance to the k-th neighbour, the point itself not counted, [N]."""
    n, kept = len(points), min(len(points), k + 1 + SPARE)
    nearest = points.norms.new_full((n, kept), torch.inf)  # squared, up to rounding
    which = torch.zeros((n, kept), dtype=torch.int64, device=points.device)
    blocks = points.blocks(block)
    for position, rows in enumerate(blocks):
        a = points.block(rows)
        for columns in blocks[position:]:  # half of a symmetric matrix
            b = a if columns == rows else points.block(columns)
            tile = _squared(a, b, points.norms[rows], points.norms[columns])
            if columns == rows:
                tile.fill_diagonal_(-torch.inf)  # a point is its own neighbour 0
            else:
                _keep_nearest(nearest[columns], which[columns], tile.T, rows.start)
            _keep_nearest(nearest[rows], which[rows], tile, columns.start)
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
    result = []
    for chosen in rows.split(block):
        nearest = torch.full((len(chosen), kept), torch.inf, dtype=torch.float64, device=points.device)
        which = torch.zeros((len(chosen), kept), dtype=torch.int64, device=points.device)
        a = points.values[chosen.to(points.values.device)].to(points.device).double() - points.mean.double()
        for columns in points.blocks(block):
            b = points.values[columns].to(points.device).double() - points.mean.double()
            tile = _squared(a, b, a.square().sum(1), b.square().sum(1))
            tile[chosen[:, None] == torch.arange(columns.start, columns.stop, device=points.device)] = -torch.inf
            _keep_nearest(nearest, which, tile, columns.start)
        result.append(_kth_exact(points, chosen, nearest, which, k, points.norms.new_full((len(chosen),), torch.inf)))
    return torch.cat(result)


def _balls(real: _Points, fake: _Points, real_radii, fake_radii, block: int, bar):
    """How many real balls hold each fake [M], which real balls hold a fake [N], which reals a fake ball holds [N]."""
    in_real_balls = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows in real.blocks(block):
        a = real.block(rows)
        for columns in fake.blocks(block):
            tile = _squared(a, fake.block(columns), real.norms[rows], fake.norms[columns])
            margin = real.error * (real.norms[rows] + fake.norms[columns].max())
            i, j = _inside(real, fake, tile, rows, columns, real_radii[rows, None], margin[:, None])
            in_real_balls.index_add_(0, j, torch.ones_like(j))
            covered[i] = True
            margin = real.error * (real.norms[rows].max() + fake.norms[columns])
            i, _ = _inside(real, fake, tile, rows, columns, fake_radii[columns], margin)
            recalled[i] = True
            bar.update()
    return in_real_balls, covered, recalled


def _inside(real, fake, tile, rows, columns, radii, margin):
    """Positions (i, j) of the pairs of a tile closer than `radii`, which broadcasts against it; margin: its error."""
    squares = radii.square()
    slack = margin + squares * (8 * UNIT)  # of squaring and of the root
    i, j = (tile < squares + slack).nonzero(as_tuple=True)  # all that may be inside
    sure = tile[i, j] < (squares - slack).expand_as(tile)[i, j]
    limits = radii.expand_as(tile)[i, j]
    i, j = i + rows.start, j + columns.start
    open_ = (~sure).nonzero()[:, 0]
    sure[open_] = real.exact(i[open_], fake, j[open_]) < limits[open_]
    return i[sure], j[sure]
