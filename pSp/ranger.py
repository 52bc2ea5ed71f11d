"""Ranger, the optimiser of the published pSp: RAdam with gradient centralisation and Lookahead.

Built on torch.optim.RAdam, whose update is the published one (threshold 5 on the length of the moving average, eps
outside the root, plain momentum before it is reached); only the two additions are here.
Sources: Liu et al. 2020 (arXiv 1908.03265, RAdam), Zhang et al. 2019 (arXiv 1907.08610, Lookahead), Yong et al. 2020
(arXiv 2004.01461, gradient centralisation); settings of lessw2020's Ranger 20.4.11, which pSp uses.

    optimiser = Ranger(encoder.parameters(), lr=1e-4)
"""

import torch

EVERY, ALPHA = 6, 0.5  # steps between two looks back, and how far the slow weights follow (k and alpha of Lookahead)


class Ranger(torch.optim.RAdam):
    """RAdam with lookahead: every EVERY steps the weights become slow + ALPHA * (fast - slow), the new slow weights.
    Gradients of matrices and convolutions lose their mean over all axes but the first. `state_dict` holds everything,
    the slow weights included: continuing from it equals never having stopped."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr, betas=(0.95, 0.999), eps=1e-5)

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
        if due := [p for p in moved if int(self.state[p]["step"]) % EVERY == 0]:
            anchors = [self.state[p]["slow"] for p in due]
            torch._foreach_lerp_(anchors, due, ALPHA)
            torch._foreach_copy_(due, anchors)
