"""Conditional training (the paper's cGAN figure): the generator is given attributes of faces as a condition.

The generator's loss has an L1 term between the attributes of a real face, its condition (editing/attributes.py), and
what the frozen scorer reads in the image; the discriminator sees no condition. `--light` trains of the generator only
the columns that the condition adds to the modulations: a direction of StyleSpace per attribute, the unconditional model
staying what it is at 0.5. The discriminator is trained on: a frozen one is soon fooled together with the scorer. There
probabilities have the cross entropy, whose gradient does not vanish where an attribute is rare, such as glasses, and
the coarse colours of the unconditional face are kept.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from common.checkpoint import CheckpointError
from common.distributed import broadcast_object
from common.images import normalise
from editing.attributes import Condition, ConditionScorer, load_condition_scorer
from scorer.network import load_scorer
from training.resume import Start, init_from
from training.settings import ConditionSettings
from training.trainer import Trainer

MODULATION = ".modulation.weight"  # ends the names of tensors [channels, style_dim + d], which turn w into styles
TABLE = 5000  # real faces whose attributes stand for the data set
SHIFT, SCALE, NOISE = 1 / 16, 1.06, 0.04  # of `jitter`: share of the side, factor, standard deviation
# Of --light:
END_PROBABILITY = 0.25  # probability that an attribute is at an end of the table, so that rare ones are asked for
END_QUANTILE = 0.01  # quantile of the table that is an end
LIGHT_WEIGHTS = {"probability": 0.5, "years": 3.0}  # of the cross entropy, of the L1 loss; 1 for the L1 loss otherwise
COLOUR_WEIGHT, COLOUR_BLOCKS = 3.0, 8  # weight of the change of colours, averaged over so many blocks per side


class ConditionalTrainer(Trainer):
    """A Trainer whose generator takes attributes, those of `scorer`, as a condition. table: attributes [M, d] of real
    faces, in [0, 1]: kept in the checkpoint, so that a resumed run draws the same conditions."""

    def __init__(self, config, settings, dist, *, scorer: ConditionScorer, table, condition: ConditionSettings):
        if condition.light:  # path length depends on the columns of w, which stay
            settings = replace(settings, path_regularize=0)
        super().__init__(config, settings, dist)
        self.scorer, self.table, self.condition = scorer, table.to(dist.device), condition
        self.ends = torch.quantile(self.table, self.table.new_tensor((END_QUANTILE, 1 - END_QUANTILE)), 0)  # [2, d]
        if condition.light:
            self.g_optim.param_groups[0]["lr"] = condition.light_lr
            columns = torch.arange(config.style_dim + config.condition_dim, device=dist.device) >= config.style_dim
            for name, parameter in self.g.named_parameters():
                if name.endswith(MODULATION):  # Adam leaves alone what never has a gradient
                    parameter.register_hook(lambda gradient: gradient * columns)
                else:
                    self.frozen.add(parameter)

    def draw_condition(self, n):
        """Attributes [n, d] of real faces, each with probability --attr_permute taken from another face: this
        decorrelates them. --light: some at an end of what the faces have."""
        faces = torch.randint(len(self.table), (n, 1), device=self.table.device).expand(-1, self.table.shape[1])
        others = torch.randint(len(self.table), faces.shape, device=self.table.device)
        swapped = torch.rand(faces.shape, device=self.table.device) < self.condition.attr_permute
        drawn = self.table.gather(0, torch.where(swapped, others, faces))
        if not self.condition.light:
            return drawn
        u = torch.rand(2, *drawn.shape, device=drawn.device)
        return torch.where(u[0] < END_PROBABILITY, torch.where(u[1] < 0.5, *self.ends), drawn)

    def condition_loss(self, fake, ws, condition):
        read = self.scorer(jitter(fake))
        errors = (read - condition).abs().mean(0)  # [d], the L1 loss of the figure
        loss = self.light_loss(fake, ws, condition, read, errors) if self.condition.light else errors.mean()
        by_name = zip(self.scorer.names, errors, strict=True)
        self.stats.report(attr=errors.mean(), **{f"attr_{name}": error for name, error in by_name})
        ramp = self.condition.attr_ramp if self.warm else 0  # after a warm start the weight rises
        return self.condition.attr_weight * min(1.0, (self.n_steps + 1) / max(1, ramp)) * loss

    def light_loss(self, fake, ws, condition, read, errors):
        """Loss of attributes `read` [n, d], with mean errors [d], and of colours that changed."""
        entropy = F.binary_cross_entropy(read.clamp(0, 1), condition.clamp(0, 1), reduction="none").mean(0)
        in_years = torch.tensor([kind == "years" for kind in self.scorer.kinds], device=read.device)
        weights = read.new_tensor([LIGHT_WEIGHTS[kind] for kind in self.scorer.kinds])
        loss = (weights * torch.where(in_years, errors, entropy)).mean()
        with torch.no_grad():
            neutral, _ = self.g(ws, input_is_latent=True, dtype=self.dtype)
        before, after = (F.adaptive_avg_pool2d(images.float(), COLOUR_BLOCKS) for images in (neutral, fake))
        keep = (after - before).abs().mean()
        self.stats.report(keep=keep)
        return loss + COLOUR_WEIGHT * keep

    def sample_inputs(self, z):
        """One face per row: at the means of the data, then each attribute at 0 and at 1."""
        n = self.table.shape[1]
        conditions = self.table.mean(0).repeat(1 + 2 * n, 1)  # [1 + 2d, d]
        for k in range(n):
            conditions[1 + 2 * k, k], conditions[2 + 2 * k, k] = 0.0, 1.0
        rows = z[: max(1, len(z) // len(conditions))]
        return rows.repeat_interleave(len(conditions), 0), conditions.repeat(len(rows), 1), len(conditions)

    def warm_start(self, weights, source):
        if self.condition.light and "d" not in weights:
            hint = "pass a training checkpoint (.pt), or leave out --light"
            raise CheckpointError(f"{source} has no discriminator, which --light needs to keep faces real: {hint}")
        super().warm_start(weights, source)
        if self.condition.light:  # what stays frozen in g is that of the average
            self.g.load_state_dict(self.g_ema.state_dict())

    @property
    def header(self):
        name, light = self.condition.condition, self.condition.light
        return {"condition": Condition.of(self.scorer, self.table, name, light).to_dict()}

    def state_dict(self):
        return super().state_dict() | self.header | {"attributes": self.table.cpu().clone()}


def score_dataset(scorer: ConditionScorer, dataset, device) -> torch.Tensor:
    """Attributes [M, d] of at most TABLE images (uint8 [3, S, S]) of a data set, evenly spread over it; CPU."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(TABLE, len(dataset))).round().astype(int)).tolist()
    blocks = (chosen[start : start + 64] for start in range(0, len(chosen), 64))
    return torch.cat([scorer.read(normalise(torch.stack([dataset[i] for i in block]), device)) for block in blocks])


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Mirrored, shifted, scaled and noisy copies of images [N, 3, H, W]; differentiable. Between generator and scorer,
    so that what the scorer reads is in the face and not in the pixel grid."""
    n, device = len(images), images.device
    u = torch.rand(n, 4, device=device)
    scale = SCALE ** (2 * u[:, 0] - 1)
    mirror = torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    shift = (2 * u[:, 2:] - 1) * (2 * SHIFT)  # grid coordinates span 2
    factors = torch.diag_embed(torch.stack([mirror * scale, scale], 1))  # [N, 2, 2]
    affine = torch.cat([factors, shift[:, :, None]], 2)  # [N, 2, 3]
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)  # [N, H, W, 2]
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + NOISE * torch.randn_like(moved)


def build_trainer(config, settings, dist, *, condition: ConditionSettings, dataset, start: Start) -> Trainer:
    """The trainer, conditional where `condition` names a scorer, in the state of `start`. A new conditional run scores
    faces of the data set (on rank 0). Raises ConditionError for attributes that the scorer lacks, UserError for another
    scorer than a continued run's."""
    if not condition.condition:
        trainer = Trainer(config, settings, dist)
    else:
        if start.continues:
            stored = Condition.from_dict(start.state["condition"], start.path)
            scorer = load_condition_scorer(start.path, stored, dist.device, scorer=condition.condition)
            table = start.state["attributes"]
        else:
            scorer = ConditionScorer(load_scorer(condition.condition, dist.device), condition.attributes.split(","))
            table = broadcast_object(score_dataset(scorer, dataset, dist.device) if dist.is_main else None)
        config = replace(config, condition_dim=len(scorer.names))
        trainer = ConditionalTrainer(config, settings, dist, scorer=scorer, table=table, condition=condition)
    if start.continues:
        trainer.load_state_dict(start.state, start.path)
    elif start.path:
        init_from(trainer, start)
    return trainer
