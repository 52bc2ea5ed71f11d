"""Losses of adversarial training, as pure functions: the non-saturating logistic loss (Goodfellow et al. 2014, arXiv
1406.2661, section 3) with the R1 penalty and path length regularisation (Karras et al. 2020, arXiv 1912.04958)."""

import math

import torch
import torch.nn.functional as F

PATH_DECAY = 0.01  # of the moving average of path lengths


def d_logistic_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))), each averaged."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def g_nonsaturating_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(G(z))), averaged."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """E |grad_x D(x)|^2 at real images [N, 3, S, S] (Mescheder et al. 2018, arXiv 1801.04406, equation 9)."""
    (grad,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def path_lengths(images: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
    """|J_w^T y| of each image, [N]; y ~ N(0, 1 / pixels), root mean square over the tokens of ws [N, L, C]
    (arXiv 1912.04958, equation 4)."""
    noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)  # [N, L, C]
    return grad.square().sum(2).mean(1).sqrt()


def path_penalty(lengths: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E (|J_w^T y| - a)^2 (equation 4), and a: the moving average `mean` of lengths [N], moved by these."""
    mean = torch.lerp(mean, lengths.mean(), PATH_DECAY)
    return (lengths - mean).square().mean(), mean.detach()
