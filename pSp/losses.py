"""Losses of a pSp encoder (Richardson et al. 2021, arXiv 2008.00951, section 3.2).

    loss = l2 ||y - x||^2 + lpips LPIPS(y, x) + id (1 - cos(R(y), R(x))) + w_norm ||w - w_avg||

and the same L2 and LPIPS on the inner face alone (the crops). A part whose weight is 0 loads nothing.

    criterion = EncoderLoss(LossWeights(lpips_lambda=0.8, l2_lambda=1, id_lambda=0.1), "cpu")
    loss, parts = criterion(output, target, source, w, latent_avg)
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F

from common.weights import find
from perceptual.identity import build_identity
from perceptual.lpips import build_perceptual
from pSp.settings import LossWeights

CROP = (35 / 256, 223 / 256, 32 / 256, 220 / 256)  # top, bottom, left, right of the inner face in an FFHQ crop


def crop(images):
    """The inner face [35:223, 32:220] of a 256 px image, in proportion for other sizes."""
    side = images.shape[-1]
    top, bottom, left, right = (round(edge * side) for edge in CROP)
    return images[..., top:bottom, left:right]


class EncoderLoss:
    """The weighted sum; `perceptual` and `identity` are None where nothing needs them."""

    def __init__(self, weights: LossWeights, device="cpu", *, lpips_net="auto", id_net="auto", weights_dir=None):
        self.weights = weights
        self.perceptual = self.identity = None
        if weights.lpips_lambda or weights.lpips_lambda_crop:
            if lpips_net == "auto" and find("alexnet", weights_dir):
                lpips_net = "alex"  # as published
            self.perceptual = build_perceptual(lpips_net, device, weights_dir)
        if weights.id_lambda:
            self.identity = build_identity(id_net, device, weights_dir)

    @property
    def description(self) -> str:
        """The lambdas that are not 0, and the networks that serve them."""
        used = [f"{name} {value:g}" for name, value in asdict(self.weights).items() if value]
        networks = [network.name for network in (self.perceptual, self.identity) if network is not None]
        return ", ".join(used) + (f" ({', '.join(networks)})" if networks else "")

    def __call__(self, output, target, source, w, latent_avg) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and its parts detached under the published names (loss_l2, loss_lpips, loss_id, id_improve, ..., loss).
        output, target, source: [N, 3, H, H] in [-1, 1]; w [N, L, D]; latent_avg [1, L, D], or None for an encoder that
        does not start from it. Means over the batch."""
        weights = self.weights
        parts: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=output.device)
        if weights.id_lambda:
            parts["loss_id"], parts["id_improve"] = self.identity_loss(output, target, source)
            total = total + weights.id_lambda * parts["loss_id"]
        for suffix, view in (("", lambda images: images), ("_crop", crop)):
            for name, distance in (("l2", F.mse_loss), ("lpips", self.perceptual)):
                weight = getattr(weights, f"{name}_lambda{suffix}")
                if weight:
                    value = distance(view(output), view(target)).mean()
                    parts[f"loss_{name}{suffix}"] = value
                    total = total + weight * value
        if weights.w_norm_lambda:
            offset = w - latent_avg if latent_avg is not None else w
            parts["loss_w_norm"] = offset.flatten(1).norm(dim=1).mean()
            total = total + weights.w_norm_lambda * parts["loss_w_norm"]
        parts["loss"] = total
        return total, {name: value.detach() for name, value in parts.items()}

    def identity_loss(self, output, target, source):
        """1 - cosine similarity of output and target; and by how much the output is more alike than the source is."""
        reference = self.identity.embed(target).detach()
        similarity = (self.identity.embed(output) * reference).sum(1)
        before = 1.0 if source is target else (self.identity.embed(source).detach() * reference).sum(1)
        return (1 - similarity).mean(), (similarity.detach() - before).mean()
