"""Losses of a pSp encoder (Richardson et al. 2021, arXiv 2008.00951, section 3.2).

    loss = l2 ||y - x||^2 + lpips LPIPS(y, x) + id (1 - cos(R(y), R(x))) + w_norm ||w - w_avg||

and the same L2 and LPIPS on the inner face alone (the crops). A part whose weight is 0 loads nothing.

    criterion = EncoderLoss(LossWeights(lpips=0.8, l2=1, id=0.1), "cpu")
    loss, parts = criterion(output, target, source, w, latent_avg)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from common.weights import find
from perceptual.identity import build_identity

CROP = (35 / 256, 223 / 256, 32 / 256, 220 / 256)  # top, bottom, left, right of the inner face in an FFHQ crop


@dataclass(frozen=True)
class LossWeights:
    """The lambdas. Raises ValueError for negative ones, or when all are 0."""

    lpips: float = 0.8
    l2: float = 1.0
    id: float = 0.1
    w_norm: float = 0.0
    lpips_crop: float = 0.0
    l2_crop: float = 0.0

    def __post_init__(self):
        values = asdict(self)
        negative = [name for name, value in values.items() if value < 0]
        if negative:
            raise ValueError(f"--{flag(negative[0])} must not be negative, got {values[negative[0]]}")
        if not any(values[name] for name in values if name != "w_norm"):
            raise ValueError("every lambda that compares images is 0: there is nothing to learn from")


def flag(name: str) -> str:
    """The flag of a weight: lpips -> lpips_lambda, lpips_crop -> lpips_lambda_crop."""
    return f"{name.removesuffix('_crop')}_lambda{'_crop' if name.endswith('_crop') else ''}"


def crop(images):
    """The inner face [35:223, 32:220] of a 256 px image, in proportion for other sizes."""
    side = images.shape[-1]
    top, bottom, left, right = (round(edge * side) for edge in CROP)
    return images[..., top:bottom, left:right]


class EncoderLoss:
    """The weighted sum; `perceptual` and `identity` are None where nothing needs them."""

    def __init__(
        self,
        weights: LossWeights,
        device="cpu",
        *,
        lpips_net: str = "auto",
        id_net: str = "auto",
        weights_dir=None,
        start_from_latent_avg: bool = True,
    ):
        self.weights, self.start_from_latent_avg = weights, start_from_latent_avg
        self.perceptual = self.identity = None
        if weights.lpips or weights.lpips_crop:
            from perceptual.lpips import build_perceptual  # with lpips and torchvision: only where it is used

            if lpips_net == "auto" and find("alexnet", weights_dir):
                lpips_net = "alex"  # as published
            try:
                self.perceptual = build_perceptual(lpips_net, device, weights_dir)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; --lpips_net auto takes the best distance that is here") from None
        if weights.id:
            self.identity = build_identity(id_net, device, weights_dir)

    @property
    def description(self) -> str:
        """The lambdas that are not 0, and the networks that serve them."""
        used = [f"{flag(name)} {value:g}" for name, value in asdict(self.weights).items() if value]
        networks = [network.name for network in (self.perceptual, self.identity) if network is not None]
        return ", ".join(used) + (f" ({', '.join(networks)})" if networks else "")

    def __call__(self, output, target, source, w, latent_avg) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and its parts detached under the published names (loss_l2, loss_lpips, loss_id, id_improve, ..., loss).

        output, target, source: [N, 3, H, H] in [-1, 1]; w [N, L, D]; latent_avg [1, L, D]. Means over the batch.
        """
        weights = self.weights
        parts: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=output.device)
        if weights.id:
            parts["loss_id"], parts["id_improve"] = self.identity_loss(output, target, source)
            total = total + weights.id * parts["loss_id"]
        for suffix, view in (("", lambda images: images), ("_crop", crop)):
            for name, distance in (("l2", F.mse_loss), ("lpips", self.perceptual)):
                weight = getattr(weights, name + suffix)
                if weight:
                    value = distance(view(output), view(target)).mean()
                    parts[f"loss_{name}{suffix}"] = value
                    total = total + weight * value
        if weights.w_norm:
            offset = w - latent_avg if self.start_from_latent_avg else w
            parts["loss_w_norm"] = offset.flatten(1).norm(dim=1).mean()
            total = total + weights.w_norm * parts["loss_w_norm"]
        parts["loss"] = total
        return total, {name: value.detach() for name, value in parts.items()}

    def identity_loss(self, output, target, source):
        """1 - cosine similarity of output and target; and by how much the output is more alike than the source is."""
        reference = self.identity.embed(target).detach()
        similarity = (self.identity.embed(output) * reference).sum(1)
        before = 1.0 if source is target else (self.identity.embed(source).detach() * reference).sum(1)
        return (1 - similarity).mean(), (similarity.detach() - before).mean()
