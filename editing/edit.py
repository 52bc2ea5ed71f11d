"""One face along one or several boundaries: codes, frames, and the distance at which a scorer sees a value.

for frame in sweep(generator, code, noise, [boundary], distances): ...      # uint8 [size, size, 3]
distance = reach(generator, code, noise, boundary, scorer, column, 60.0)    # the scorer's age becomes 60
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from common.images import to_uint8
from editing.boundary import Boundary, BoundaryError, walk
from editing.evaluate import score_frames

SCAN = 6  # steps from 0 to the limit, each way, in which a target is looked for before it is bisected
BLOCK = 8  # frames per forward pass: the fastest at 256 px on a CPU; fixed, since it moves the last bits of a picture


def edit_codes(code, boundaries: Sequence[Boundary], distances, *, distance="relative", layers=None) -> np.ndarray:
    """Codes [K, L, 512] of `code` [L, 512] moved along several boundaries at once.

    distances: [K] along the first boundary, or [K, number of boundaries].
    """
    code = np.asarray(code, np.float32)
    steps = np.asarray(distances, np.float64)
    steps = steps[:, None] if steps.ndim == 1 else steps
    if steps.shape[1] != len(boundaries):
        raise BoundaryError(f"{steps.shape[1]} distances per frame for {len(boundaries)} boundaries")
    moved = np.zeros((len(steps), *code.shape), np.float64)
    for boundary, along in zip(boundaries, steps.T, strict=True):
        moved += walk(code, boundary, along, distance=distance, layers=layers).astype(np.float64) - code
    return (code + moved).astype(np.float32)


@torch.no_grad()
def render_codes(generator, codes, noise, *, dtype=None, condition=None) -> Iterator[np.ndarray]:
    """Frames uint8 [size, size, 3] of codes [K, L, 512] with the noise maps of one picture, [1, 1, r, r] each.

    condition: attributes [1, d] of that picture, of a conditional generator (default: the neutral 0.5).
    """
    device = generator.token.device
    maps = [layer.to(device) for layer in noise]
    condition = None if condition is None else condition.to(device)
    for start in range(0, len(codes), BLOCK):
        block = torch.from_numpy(np.array(codes[start : start + BLOCK], np.float32)).to(device)  # [B, L, 512]
        asked = None if condition is None else condition.expand(len(block), -1)  # [B, d]
        images, _ = generator(block, input_is_latent=True, noise=maps, dtype=dtype, condition=asked)  # [B, 3, S, S]
        yield from to_uint8(images)


def reach(
    generator,
    code,
    noise,
    boundary,
    scorer,
    column: int,
    target: float,
    *,
    limit,
    near=0.0,
    steps=8,
    layers=None,
    condition=None,
):
    """Relative distance at which the scorer's `column` is nearest to `target`: (distance, score there).

    Bisection of the crossing that lies nearest to the face as it is, among 2 * SCAN steps from -limit to +limit (in
    units of the boundary): far out a face may break, and the score turn back. A target that is crossed nowhere, such
    as 1 of a probability, gives the least of the steps that come within `near`, else the one that comes nearest.
    condition: see render_codes.
    """

    def score(distances):
        codes = edit_codes(code, [boundary], np.asarray(distances, np.float64), layers=layers)
        frames = list(render_codes(generator, codes, noise, condition=condition))
        return score_frames(scorer, frames)[:, column]

    stops = np.linspace(-limit, limit, 2 * SCAN + 1)
    seen = score(stops)
    tried = [(max(near, abs(value - target)), abs(at), at, value) for at, value in zip(stops, seen, strict=True)]
    crossings = [k for k in range(2 * SCAN) if (seen[k] - target) * (seen[k + 1] - target) < 0]
    if crossings:
        k = min(crossings, key=lambda k: abs(stops[k] + stops[k + 1]))
        (low, high), at_low, tried = stops[k : k + 2], seen[k], tried[k : k + 2]
        for _ in range(steps):
            middle = (low + high) / 2
            (at_middle,) = score([middle])
            tried.append((abs(at_middle - target), abs(middle), middle, at_middle))
            if (at_low - target) * (at_middle - target) <= 0:
                high = middle
            else:
                low, at_low = middle, at_middle
    _, _, distance, reached = min(tried)
    return float(distance), float(reached)
