"""The interface of all attribute scorers: images in, years and probabilities out, differentiable."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from scorer.labels import AGE_BINS, Attribute


def expected_age(logits: torch.Tensor) -> torch.Tensor:
    """[N, 101] -> [N] years: sum over i = 0..100 of i p_i (DEX, Rothe et al. 2015)."""
    return logits.softmax(1) @ torch.arange(AGE_BINS, dtype=logits.dtype, device=logits.device)


class AttributeScorer(nn.Module, ABC):
    """Base of every scorer, frozen. A subclass sets `attributes` and implements `margins`."""

    attributes: tuple[Attribute, ...] = ()
    errors: dict[str, float] = {}  # attribute -> mean absolute error on faces kept out of training, where it is known

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    @property
    def units(self) -> dict[str, str]:
        return {attribute.name: attribute.unit for attribute in self.attributes}

    def column(self, name: str) -> int:
        """Column of an attribute in the scores. Raises ValueError naming those there are."""
        if name not in self.names:
            raise ValueError(f"this scorer has no attribute {name!r}; it has {', '.join(self.names)}")
        return self.names.index(name)

    @abstractmethod
    def margins(self, images: torch.Tensor) -> torch.Tensor:
        """Scores [N, A] with log-odds in place of probabilities: they rank images whose probabilities are near 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in [-1, 1] (clamped to it), any size -> [N, A] in the units of `units`, columns `names`.
        Differentiable in the images. Raises ValueError for another shape."""
        return self.to_scores(self.margins(images))

    def to_scores(self, margins: torch.Tensor) -> torch.Tensor:
        """Margins [N, A] -> scores [N, A]."""
        columns = zip(margins.unbind(1), self.attributes, strict=True)
        return torch.stack([c.sigmoid() if a.kind == "probability" else c for c, a in columns], 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in [-1, 1] -> input of the last layer [N, F]: for distances between sets of images."""
        raise ValueError(f"{type(self).__name__} has no features")

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[N, 3, H, W] in [-1, 1] -> maps [N, C_i, S_i, S_i], fine to coarse: for distances between images."""
        raise ValueError(f"{type(self).__name__} has no feature maps")

    def train(self, mode: bool = True):
        return super().train(False)  # stays in evaluation mode inside a network that is being trained

    def freeze(self):
        return self.eval().requires_grad_(False)


def require_images(images: torch.Tensor) -> torch.Tensor:
    """The images, clamped to [-1, 1] as saving clamps them. Raises ValueError for a shape other than [N, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"a scorer takes float images [N, 3, H, W] in [-1, 1], not {found}")
    return images.clamp(-1, 1)
