"""Precision, recall, density and coverage of features, in blocks: no N x N matrix, on CPU and CUDA.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991); density and coverage: Naeem et al. 2020
(arXiv 2002.09797), whose package `prdc` gives the same numbers. A sample is inside a ball when it is closer to the
centre than the centre's k-th neighbour, strictly. Density is not capped at 1. Real and fake do not commute.
"""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from metrics.distance import check_features

ENTRIES = 1 << 25  # distances held at a time: 128 MiB
BLOCK = 2048  # points converted to float64 at a time
IDENTICAL = 1e-6  # a distance below this share of the largest norm is a rounding error of |x|² + |y|² - 2xy

PRDC = ("precision", "recall", "density", "coverage")


@torch.no_grad()
def compute_prdc(real, fake, *, nearest_k: int, device="cpu") -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of features real [N, D] and fake [M, D]. nearest_k: the neighbour
    that sets a ball's radius, the centre itself not counted. Distances are computed in float64 and rounded to float32,
    as in `prdc`. Raises ValueError as `check_features`, and for fewer than nearest_k + 1 points."""
    real, fake = check_features(real, fake)
    for name, n in (("real", len(real)), ("fake", len(fake))):
        if not 1 <= nearest_k < n:
            raise ValueError(f"nearest_k {nearest_k}: expected at least 1 and fewer than the {n} {name} points")
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # Metal has no float64
    inside, covered, recalled = 0, [], []
    with tqdm(total=2 * len(real) + len(fake), desc="PRDC", leave=False, disable=None) as bar:
        real_radii, fake_radii = (_radii(points, nearest_k, device, bar) for points in (real, fake))
        for distances, radii in zip(_distances(real, fake, device, bar), real_radii.split(_rows(fake)), strict=True):
            in_balls = distances < radii[:, None]  # [R, M]: is the fake in the ball of this real
            inside = inside + in_balls.sum(0)  # [M]: real balls around each fake
            covered.append(in_balls.any(1))
            recalled.append((distances < fake_radii).any(1))
    shares = (inside > 0, torch.cat(recalled), inside.double() / nearest_k, torch.cat(covered))
    return {name: float(share.double().mean()) for name, share in zip(PRDC, shares, strict=True)}


def _radii(points: torch.Tensor, k: int, device, bar) -> torch.Tensor:
    """Distance to the k-th neighbour [N]; each point is its own neighbour 0."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(points, points, device, bar)])


def _rows(points: torch.Tensor) -> int:
    """Rows of a block of distances to these points."""
    return max(1, min(BLOCK, ENTRIES // len(points)))


def _distances(a: torch.Tensor, b: torch.Tensor, device, bar) -> Iterator[torch.Tensor]:
    """Distances of blocks of a [N, D] to b [M, D]: float32 [R, M], R * M at most ENTRIES."""
    identical = IDENTICAL * float(max(points.square().sum(1).max() for points in (a, b))) ** 0.5
    for left in a.split(_rows(b)):
        rows = left.to(device).double()
        distances = torch.cat([torch.cdist(rows, right.to(device).double()).float() for right in b.split(BLOCK)], 1)
        yield distances.masked_fill_(distances < identical, 0)
        bar.update(len(left))
