"""Conditional training (the paper's cGAN figure): the generator is given attributes of faces as a condition.

Every image is generated under the attributes of a real face (editing/attributes.py). The generator's loss has an L1
term between the condition and what the frozen scorer reads in the image; the discriminator sees no condition. `--light`
trains nothing of the generator but the columns that the condition adds to the modulations: a direction of StyleSpace
per attribute, the unconditional model staying what it is at 0.5. The discriminator is trained on: a frozen one is soon
fooled together with the scorer.

    train.py --path faces.lmdb --condition face-scorer --init_from faces.pt --exp_name runs/cgan
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.checkpoint import CheckpointError
from common.cli import UsageError, UserError
from common.distributed import broadcast_object
from editing.attributes import (
    DEFAULT_ATTRIBUTES,
    Condition,
    ConditionScorer,
    attribute_error,
    draw_requests,
    sample_requests,
    score_dataset,
)
from scorer.network import load_scorer
from training.resume import Start, init_from
from training.trainer import Trainer
from training.transfer import is_modulation


class ConditionalTrainer(Trainer):
    """A Trainer whose generator takes attributes as a condition. scorer: the frozen scorer with the attributes of the
    condition; scorer_name: for the checkpoint. table: attributes [M, d] of real faces, in [0, 1], kept in the
    checkpoint, so that a resumed run draws the same conditions. condition: ConditionSettings."""

    def __init__(self, config, settings, dist, *, scorer: ConditionScorer, scorer_name, table, condition):
        if condition.light:  # path length depends on the columns of w, which stay
            settings = replace(settings, path_regularize=0)
        super().__init__(config, settings, dist)
        self.scorer, self.scorer_name, self.condition = scorer, scorer_name, condition
        self.table = table.to(dist.device)
        if condition.light:
            self.g_optim.param_groups[0]["lr"] = condition.light_lr
            self.frozen = [parameter for name, parameter in self.g.named_parameters() if not is_modulation(name)]
            columns = torch.arange(config.style_dim + config.condition_dim, device=dist.device) >= config.style_dim
            for name, parameter in self.g.named_parameters():
                if is_modulation(name):  # Adam leaves alone what never has a gradient
                    parameter.register_hook(lambda gradient: gradient * columns)

    # -- one step -----------------------------------------------------------------------------------------------------

    def draw_condition(self, n):
        return draw_requests(self.table, n, permute=self.condition.attr_permute)  # [n, d]

    @property
    def attr_weight(self) -> float:
        """Attribute-loss weight at the current step (linear ramp after a warm start)."""
        ramp = self.condition.attr_ramp if self.warm else 0
        return self.condition.attr_weight * (min(1.0, (self.n_steps + 1) / ramp) if ramp else 1.0)

    def condition_loss(self, fake, condition):
        errors = attribute_error(self.scorer, fake, condition).mean(0)  # [d]
        by_name = zip(self.scorer.names, errors, strict=True)
        self.stats.report(attr=errors.mean(), **{f"attr_{name}": error for name, error in by_name})
        return self.attr_weight * errors.mean()

    def sample_inputs(self, z):
        """One face per row: at the means of the data, then each attribute at 0 and at 1."""
        conditions = sample_requests(self.table.mean(0))  # [1 + 2d, d]
        rows = z[: max(1, len(z) // len(conditions))]
        return rows.repeat_interleave(len(conditions), 0), conditions.repeat(len(rows), 1), len(conditions)

    # -- state --------------------------------------------------------------------------------------------------------

    def warm_start(self, weights, source):
        if self.condition.light and "d" not in weights:
            hint = "pass a training checkpoint (.pt), or leave out --light"
            raise CheckpointError(f"{source} has no discriminator, which --light needs to keep faces real: {hint}")
        super().warm_start(weights, source)
        if self.condition.light:  # what is kept must be what is averaged
            self.g.load_state_dict(self.g_ema.state_dict())

    @property
    def header(self):
        return {"condition": Condition.of(self.scorer, self.table, self.scorer_name, self.condition.light).to_dict()}

    def state_dict(self):
        return super().state_dict() | self.header | {"attributes": self.table.cpu().clone()}

    def load_state_dict(self, state, source="checkpoint"):
        super().load_state_dict(state, source)
        self.table = state["attributes"].to(self.dist.device)


@dataclass(frozen=True)
class ConditionSpec:
    """Condition of a run: a scorer by name, attributes of it, and the fingerprint that a continued run's must have."""

    scorer: str
    attributes: tuple[str, ...]
    light: bool = False
    fingerprint: str | None = None


def resolve_condition(scorer: str | None, attributes: str | None, light: bool | None, start: Start):
    """ConditionSpec of a run from the flags (None: not given) and the file that it starts from; None: unconditional.
    Raises UsageError for flags that do not fit together, UserError for those that do not fit the file."""
    path, stored = start.path, None
    if start.config is not None and start.config.condition_dim:
        stored = Condition.from_dict(start.state.get("condition") or {}, path)
    if light and path is None:
        raise UsageError("--light trains what the condition adds to a trained generator: pass one as --init_from")
    if start.continues and scorer and stored is None:
        raise UserError(f"{path} is an unconditional run: --init_from starts a conditional one from its weights")
    if start.continues and stored is not None:
        if light and not stored.light:
            raise UserError(f"{path} was trained without --light: --init_from starts a light run from its weights")
        scorer, light = scorer or stored.scorer, stored.light
    if not scorer and stored is not None:
        raise UserError(f"{path} is a conditional generator: pass --condition SCORER to train it on")
    if not scorer:
        if light or attributes:
            raise UsageError("--light and --attributes are for a conditional GAN: pass --condition SCORER")
        return None
    names = tuple(name.strip() for name in attributes.split(",")) if attributes else None
    if stored is not None and names not in (None, stored.attributes):
        raise UserError(f"--attributes {attributes}, but {path} was trained for {','.join(stored.attributes)}")
    names = names or (DEFAULT_ATTRIBUTES if stored is None else stored.attributes)
    return ConditionSpec(scorer, names, bool(light), stored.scorer_fingerprint if start.continues else None)


def build_trainer(config, settings, dist, *, spec, condition, dataset, start: Start) -> Trainer:
    """The trainer, conditional where there is a ConditionSpec, in the state of `start`. A new conditional run scores
    faces of the data set (on rank 0). Raises ConditionError for attributes that the scorer lacks, UserError for another
    scorer than a continued run's."""
    if spec is None:
        trainer = Trainer(config, settings, dist)
    else:
        scorer = ConditionScorer(load_scorer(spec.scorer, dist.device), spec.attributes)
        table = start.state.get("attributes") if start.continues else None
        if table is None:
            table = broadcast_object(score_dataset(scorer, dataset, dist.device) if dist.is_main else None)
        name = str(Path(spec.scorer).resolve()) if Path(spec.scorer).is_file() else spec.scorer
        fingerprint = Condition.of(scorer, table, name).scorer_fingerprint
        if spec.fingerprint not in (None, fingerprint):
            which = f"the scorer {spec.fingerprint}, --condition {spec.scorer} is {fingerprint}"
            raise UserError(f"the run was trained with {which}")
        config = replace(config, condition_dim=len(scorer.names))
        networks = {"scorer": scorer, "scorer_name": name, "table": table}
        trainer = ConditionalTrainer(config, settings, dist, condition=condition, **networks)
    if start.continues:
        trainer.load_state_dict(start.state, start.path)
    elif start.path:
        init_from(trainer, start)
    return trainer
