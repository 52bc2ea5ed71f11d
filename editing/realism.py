"""The range of a sweep: distances along a boundary up to which samples still are faces.

Realism (Kynkäänniemi et al. 2019, arXiv 1904.06991, equation 3): the distance of an image's features to the manifold of
reference images, spanned by the spheres that reach to their k-th neighbours. Here references are unedited samples,
features the embeddings of the identity network, and a face is at least as real as 95 % of the references are to each
other. (In features of the scorer an unusually old face leaves the manifold as a broken one does.)
"""

import numpy as np
import torch

from editing.boundary import Boundary
from editing.evaluate import image_batches
from editing.samples import Samples

REFERENCES, EDITED = 500, 150  # samples that span the manifold; others that are moved
NEIGHBOUR = 3  # k, published
PASSING, SHARE = 0.95, 0.9  # of the references that pass as faces; of the moved faces that must still be faces
STEP, LIMIT = 0.5, 12.0  # standard deviations


class Realism:
    """Realism scores against reference features [N, F], N above 2 * NEIGHBOUR."""

    def __init__(self, references: torch.Tensor):
        distance = torch.cdist(references, references).fill_diagonal_(torch.inf)
        radius = distance.kthvalue(NEIGHBOUR, 1).values  # [N]
        keep = radius <= radius.median()  # published: half of the spheres, the smaller ones
        self.centres, self.radius = references[keep], radius[keep]
        self.threshold = (self.radius / distance[:, keep]).amax(1).quantile(1 - PASSING)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Realism of features [M, F] -> [M], at least 1 on the manifold."""
        return (self.radius / torch.cdist(features, self.centres)).amax(1)

    def are_faces(self, features: torch.Tensor) -> torch.Tensor:
        """Whether features [M, F] belong to faces -> bool [M]."""
        return self(features) >= self.threshold


@torch.no_grad()
def edit_range(samples: Samples, boundary: Boundary, identity) -> tuple[float, float] | None:
    """(lowest, highest) distance in standard deviations up to which SHARE of the samples that are faces still are,
    bisected among multiples of STEP. identity: network of perceptual/identity.py. None for fewer than 20 samples, if
    none of the unmoved ones is a face, or where no STEP is left."""
    if len(samples) < 20:
        return None
    n_edited = min(EDITED, len(samples) // 4)
    n_references = min(REFERENCES, len(samples) - n_edited)
    rows = np.arange(n_references, n_references + n_edited)
    normal = torch.from_numpy(boundary.normal).view(-1, samples.generator.config.style_dim)  # [1|L, C]

    def features(rows, distance=0.0):
        frames = list(samples.frames(rows, offset=distance * boundary.std * normal))
        return torch.cat([identity.embed(block).cpu() for block in image_batches(frames, identity)])

    realism = Realism(features(np.arange(n_references)))
    before, ends = realism.are_faces(features(rows)), []
    if not before.any():
        return None
    for sign in (-1.0, 1.0):
        passed, failed = 0, round(LIMIT / STEP) + 1
        trial = failed - 1
        while failed - passed > 1:
            still = realism.are_faces(features(rows, sign * trial * STEP)) & before
            passed, failed = (trial, failed) if still.sum() >= SHARE * before.sum() else (passed, trial)
            trial = (passed + failed) // 2
        ends.append(sign * passed * STEP)
    return (ends[0], ends[1]) if ends[0] < ends[1] else None
