"""The conditional GAN (the paper's cGAN figure): the game of training/trainer.py, where the generator is asked for
attributes.

Every fake is synthesised under a request, the attributes of a real face (editing/attributes.py). The generator's loss
has an L1 term between the request and what the frozen scorer reads in the picture; the discriminator sees no condition,
and path length acts on the codes alone. Started from an unconditional checkpoint (--init_from) the pictures are the
same at first. `--light` trains nothing of the generator but the columns that the condition adds to the modulations: a
direction of StyleSpace per attribute, the unconditional model staying what it is at 0.5. The discriminator plays on: a
frozen one is soon fooled together with the scorer, by blotches of colour that nobody would take for a smile.

    train.py --path faces.lmdb --condition face-scorer --init_from faces.pt --exp_name runs/cgan
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.checkpoint import CheckpointError
from common.cli import UsageError, UserError
from common.distributed import Distributed, broadcast_object
from editing.attributes import (
    DEFAULT_ATTRIBUTES,
    AttributeReader,
    Condition,
    attribute_error,
    draw_requests,
    read_condition,
    sample_requests,
    score_dataset,
)
from model import GeneratorConfig
from scorer.network import load_scorer
from training.trainer import Trainer, TrainSettings
from training.transfer import is_modulation


@dataclass(frozen=True)
class ConditionSettings:
    """What the requests weigh; the names are train.py's flags. Raises ValueError for what cannot work."""

    attr_weight: float = 5.0
    attr_ramp: int = 1000  # steps in which the weight rises from 0, after a warm start
    attr_permute: float = 0.5
    light: bool = False
    light_lr: float = 0.01

    def __post_init__(self):
        if not 0 <= self.attr_weight < float("inf") or self.attr_ramp < 0:
            raise ValueError(f"--attr_weight {self.attr_weight} --attr_ramp {self.attr_ramp}: expected 0 or more")
        if not 0 < self.light_lr < float("inf"):
            raise ValueError(f"--light_lr {self.light_lr}: expected above 0")
        if not 0 <= self.attr_permute <= 1:
            raise ValueError(f"--attr_permute is a probability, 0 to 1, got {self.attr_permute}")


class ConditionalTrainer(Trainer):
    """A Trainer whose generator is asked for attributes.

    reader: the frozen scorer. table: attributes [M, d] of real faces, kept in the checkpoint, so that a resumed run
    draws the same requests. scorer: its name, for the checkpoint.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        settings: TrainSettings,
        dist: Distributed,
        *,
        reader: AttributeReader,
        table: torch.Tensor,
        scorer: str,
        asked: ConditionSettings,
    ):
        if asked.light:  # path length depends on the codes' columns, which stay
            settings = replace(settings, path_regularize=0)
        super().__init__(config, settings, dist)
        if asked.light:
            for group in self.g_optim.param_groups:
                group["lr"] = asked.light_lr
        self.reader, self.table, self.scorer, self.asked = reader, table.to(dist.device), scorer, asked
        self.warm = False  # started from trained weights: the weight of the attributes rises slowly

    # -- one round ----------------------------------------------------------------------------------------------------

    def select(self, network):
        super().select(network)
        if self.asked.light and network is self.g:
            for name, parameter in self.g.named_parameters():
                parameter.requires_grad_(is_modulation(name))

    def accumulate_gradients(self, phase, images, name):
        super().accumulate_gradients(phase, images, name)
        if self.asked.light and name == "g":  # where a gradient is always zero, Adam leaves the columns as they are
            for parameter_name, parameter in self.g.named_parameters():
                if is_modulation(parameter_name) and parameter.grad is not None:
                    parameter.grad[:, : self.config.style_dim] = 0

    def request(self, n):
        return draw_requests(self.table, n, permute=self.asked.attr_permute)  # [n, d]

    def synthesise(self, n, dtype):
        return self.g(self.draw_codes(n), input_is_latent=True, dtype=dtype, condition=self.request(n))

    @property
    def attr_weight(self) -> float:
        """Of the attribute loss at this step."""
        ramp = self.asked.attr_ramp if self.warm else 0
        return self.asked.attr_weight * (min(1.0, (self.step + 1) / ramp) if ramp else 1.0)

    def g_phase(self, real, weight):
        n, g = real.shape[0], self.g
        wanted = self.request(n)
        fake, _ = g(self.draw_codes(n), input_is_latent=True, dtype=self.dtype, condition=wanted)
        loss = self.realism_loss(fake)
        errors = attribute_error(self.reader, fake, wanted).mean(0)  # [d]
        ((loss + self.attr_weight * errors.mean()) * weight).backward()
        by_name = zip(self.reader.names, errors, strict=True)
        self.note(attr=errors.mean(), **{f"attr_{name}": error for name, error in by_name})

    def sheet(self, z):
        """One face per row: at the means of the data, then each attribute at 0 and at 1."""
        requests = sample_requests(self.table.mean(0))  # [1 + 2d, d]
        rows = z[: max(1, len(z) // len(requests))]
        return rows.repeat_interleave(len(requests), 0), requests.repeat(len(rows), 1), len(requests)

    # -- state --------------------------------------------------------------------------------------------------------

    def adopt(self, weights, source):
        if self.asked.light and "d" not in weights:
            raise CheckpointError(
                f"{source} has no discriminator, which --light needs to keep faces real: pass a "
                "training checkpoint (.pt), or leave out --light"
            )
        super().adopt(weights, source)
        if self.asked.light:  # what is kept must be what is averaged
            self.g.load_state_dict(self.g_ema.state_dict())
        self.warm = True

    def header(self):
        return {"condition": Condition.of(self.reader, self.table, self.scorer, self.asked.light).to_dict()}

    def state_dict(self):
        return super().state_dict() | self.header() | {"attributes": self.table.cpu().clone(), "warm": self.warm}

    def load_state_dict(self, state, source="checkpoint"):
        super().load_state_dict(state, source)
        self.table = state["attributes"].to(self.dist.device)
        self.warm = state["warm"]


# ---------------------------------------------------------------------------------------------------------------------
# From flags to a trainer


def add_condition_flags(parser) -> None:
    group = parser.add_argument_group("conditional GAN", "the generator is asked for attributes of real faces")
    group.add_argument(
        "--condition",
        metavar="SCORER",
        help="face-scorer, or a .safetensors of train_scorer.py; read from the checkpoint of a run that is continued",
    )
    group.add_argument(
        "--attributes", help=f"of the scorer, with commas between (default: {','.join(DEFAULT_ATTRIBUTES)})"
    )
    group.add_argument("--attr_weight", type=float, default=5, help="weight of the L1 loss of the attributes")
    group.add_argument("--attr_ramp", type=int, default=1000, help="steps in which it rises from 0 with --init_from")
    group.add_argument(
        "--attr_permute",
        type=float,
        default=0.5,
        help="probability that an attribute is asked for as another face has it",
    )
    group.add_argument(
        "--light",
        action="store_true",
        default=None,
        help="of the generator train only what the condition adds to that of --init_from; a continued "
        "run does as before",
    )
    group.add_argument("--light_lr", type=float, default=0.01, help="its Adam learning rate under --light")


def read_condition_settings(args) -> ConditionSettings:
    """Raises UsageError for numbers that cannot work."""
    try:
        return ConditionSettings(args.attr_weight, args.attr_ramp, args.attr_permute, bool(args.light), args.light_lr)
    except ValueError as error:
        raise UsageError(str(error)) from None


def find_reader(args, state: dict | None, source, stored: GeneratorConfig | None, device) -> AttributeReader | None:
    """Scorer and attributes of a conditional run: from the flags, or the checkpoint that is continued (`state`), or of
    which the weights are taken (`stored`). None for an unconditional run. Fills in args.condition, args.attributes and
    args.light.

    Raises UserError where flags and file do not fit together; ValueError for what the scorer does not know.
    """
    if args.light and state is None and not args.init_from:
        raise UsageError("--light trains what the condition adds to a trained generator: pass one as --init_from")
    source = args.init_from if state is None else source
    known = None
    if stored is not None and stored.condition_dim:
        known = read_condition(source) if state is None else Condition.from_dict(state.get("condition") or {}, source)
    if state is not None and known is None and args.condition:
        raise UserError(f"{source} is an unconditional run: --init_from starts a conditional one from its weights")
    if state is not None and known is not None:
        args.condition = args.condition or known.scorer
        if args.light and not known.light:
            raise UserError(f"{source} was trained without --light: --init_from starts a light run from its weights")
        args.light = known.light
    if not args.condition:
        if known is not None:
            raise UserError(f"{source} is a conditional generator: pass --condition SCORER to train it on")
        if args.light or args.attributes:
            raise UsageError("--light and --attributes are for a conditional GAN: pass --condition SCORER")
        args.light = False
        return None
    names = [name.strip() for name in args.attributes.split(",")] if args.attributes else None
    if known is not None and names is not None and tuple(names) != known.attributes:
        raise UserError(f"--attributes {args.attributes}, but {source} was trained for {','.join(known.attributes)}")
    names = names or (DEFAULT_ATTRIBUTES if known is None else known.attributes)
    args.light = bool(args.light)
    reader = AttributeReader(load_scorer(args.condition, device), names)
    args.attributes = ",".join(names)
    if state is not None:
        own = Condition.of(reader, state["attributes"], args.condition).scorer_fingerprint
        if own != known.scorer_fingerprint:
            raise UserError(
                f"{source} was trained with the scorer {known.scorer_fingerprint}, --condition "
                f"{args.condition} is {own}"
            )
    return reader


def build_trainer(
    config: GeneratorConfig,
    settings: TrainSettings,
    dist: Distributed,
    *,
    asked: ConditionSettings,
    reader: AttributeReader | None,
    dataset,
    args,
    state: dict | None,
) -> Trainer:
    """The Trainer of the run; with a reader a conditional one, for which faces of the data set are scored first."""
    if reader is None:
        return Trainer(config, settings, dist)
    config = replace(config, condition_dim=len(reader.names))
    table = None if state is None else state["attributes"]
    if table is None:
        table = broadcast_object(score_dataset(reader, dataset, dist.device) if dist.is_main else None)
    scorer = str(Path(args.condition).resolve()) if Path(args.condition).is_file() else args.condition
    return ConditionalTrainer(config, settings, dist, reader=reader, table=table, scorer=scorer, asked=asked)
