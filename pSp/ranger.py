"""Ranger, the optimiser of the published pSp: RAdam with gradient centralisation and Lookahead.

Built on torch.optim.RAdam, whose update is the published one (threshold 5 on the length of the moving average, eps
outside the root, plain momentum before it is reached); only the two additions are here.
Sources: Liu et al. 2020 (arXiv 1908.03265, RAdam), Zhang et al. 2019 (arXiv 1907.08610, Lookahead), Yong et al. 2020
(arXiv 2004.01461, gradient centralisation); settings of lessw2020's Ranger 20.4.11, which pSp uses.

    optimiser = Ranger(encoder.parameters(), lr=1e-4)
"""

import torch


class Ranger(torch.optim.RAdam):
    """alpha, k: every k steps the weights go back to slow + alpha * (fast - slow), which becomes the new slow weight.
    Gradients of matrices and convolutions lose their mean over all axes but the first. `state_dict` holds everything,
    the slow weights included: continuing from it equals never having stopped."""

    def __init__(self, params, lr=1e-3, *, alpha=0.5, k=6, betas=(0.95, 0.999), eps=1e-5, weight_decay=0.0):
        if not 0 <= alpha <= 1 or k < 1:
            raise ValueError(f"Ranger takes alpha from 0 to 1 and k of at least 1, got {alpha} and {k}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True)
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    @torch.no_grad()
    def step(self):
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in moved:
            if p.ndim > 1:
                p.grad -= p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True)
        slow = {p: p.detach().clone() for p in moved if not self.state[p]}  # at the first step: where it starts from
        super().step()
        for p, start in slow.items():
            self.state[p]["slow"] = start
        for group in self.param_groups:
            due = [p for p in group["params"] if p.grad is not None and int(self.state[p]["step"]) % group["k"] == 0]
            if due:
                anchors = [self.state[p]["slow"] for p in due]
                torch._foreach_lerp_(anchors, due, group["alpha"])
                torch._foreach_copy_(due, anchors)
