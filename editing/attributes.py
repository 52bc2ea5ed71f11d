"""The conditional GAN's condition: attributes of faces as numbers in [0, 1], read by a frozen scorer.

The paper's cGAN figure (Li et al. 2024, arXiv 2105.14230): the attributes of a real face are stacked on every style
code; an L1 loss compares them with what the same frozen classifier reads in the generated image.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import UsageError, UserError
from common.files import check_shape
from editing.samples import scorer_identity
from model import CONDITION_GAIN
from scorer.network import load_scorer

EXPRESSION = ("smile", "eyes_open", "mouth_open")  # attributes of a condition unless others are named
UNIT_OF = {"probability": 1.0, "years": 60.0}  # kind -> what 1 stands for: 0.5, the neutral, is a common age
EARLIER_YEARS = 100.0  # of files that do not say
LISTS = {"attributes": [str], "kinds": [str], "means": [float]}
# Schema of the entry `condition` of a checkpoint (common/files.py).
SCHEMA = LISTS | {"scorer": str, "scorer_fingerprint": str, "units?": [float], "gain?": float, "light?": bool}


class ConditionError(ValueError):
    """Attributes, scorer or checkpoint that do not fit together; the message is one sentence."""


class ConditionScorer:
    """Chosen attributes of a scorer as numbers: probabilities as they are, years / 60. units: other scores that are 1.
    Raises ValueError for an attribute that the scorer lacks or that has no such scale."""

    def __init__(self, scorer, names: Sequence[str], units: Sequence[float] | None = None):
        names = tuple(names)
        if not names or len(set(names)) < len(names):
            raise ConditionError(f"--attributes {','.join(names)}: expected different names with commas between")
        self.scorer, self.names = scorer, names
        self.columns = [scorer.column(name) for name in names]
        self.kinds = tuple(scorer.attributes[column].kind for column in self.columns)
        for name, kind in zip(names, self.kinds, strict=True):
            if kind not in UNIT_OF:
                scale = f"the scorer gives it as a {kind}, which has no scale from 0 to 1"
                raise ConditionError(f"--attributes {name}: {scale}; a condition is a probability or years")
        self.units = tuple(units or (UNIT_OF[kind] for kind in self.kinds))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in [-1, 1] -> [N, d], 0 or more; gradients flow to the images, the scorer keeps its weights."""
        return self.to_unit(self.scorer(images))

    def to_unit(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [N, A] of the scorer -> [N, d]; ages above the unit are above 1."""
        return scores[:, self.columns] / scores.new_tensor(self.units)

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
        """The attributes [N, d], at most 1, without gradients, on the CPU, `batch` images at a time."""
        return torch.cat([self(block).clamp(max=1).cpu() for block in images.split(batch)])


@dataclass(frozen=True)
class Condition:
    """The entry `condition` of a checkpoint, and of an exported generator's header."""

    attributes: tuple[str, ...]
    kinds: tuple[str, ...]  # of the scorer: probability or years
    means: tuple[float, ...]  # of the training images, in [0, 1]
    units: tuple[float, ...]  # scores that a condition of 1 stands for
    scorer: str  # as it was named
    scorer_fingerprint: str
    gain: float = CONDITION_GAIN  # the generator sees gain * (2 a - 1)
    light: bool = False  # the last steps trained the columns of the condition alone

    @classmethod
    def of(cls, scorer: ConditionScorer, table: torch.Tensor, name: str, light: bool) -> "Condition":
        """The entry of a generator that was trained on attributes [M, d] of a `table`; name: the scorer's."""
        means, fingerprint = tuple(table.mean(0).tolist()), scorer_identity(scorer.scorer)
        return cls(scorer.names, scorer.kinds, means, scorer.units, name, fingerprint, light=light)

    def to_dict(self) -> dict:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict, source) -> "Condition":
        """The condition that `source` describes. Raises ConditionError for what is unknown here."""
        try:
            check_shape(values, SCHEMA)
            values = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            years = UNIT_OF | {"years": EARLIER_YEARS}
            values.setdefault("units", [years.get(kind, 1.0) for kind in values["kinds"]])
            condition = cls(**values | {name: tuple(values[name]) for name in (*LISTS, "units")})
            if len({len(values[name]) for name in (*LISTS, "units")}) > 1 or set(condition.kinds) - set(UNIT_OF):
                raise ValueError(f"{len(condition.attributes)} attributes of the kinds {', '.join(condition.kinds)}")
            if condition.gain != CONDITION_GAIN:
                raise ValueError(f"it has the gain {condition.gain}, this program uses {CONDITION_GAIN}")
        except ValueError as error:
            raise ConditionError(f"{source}: its condition is described in a way unknown here ({error})") from None
        return condition

    def index(self, name: str) -> int:
        """Position of an attribute. Raises ConditionError naming those there are."""
        if name not in self.attributes:
            known = ", ".join(self.attributes)
            raise ConditionError(f"this generator knows no attribute {name!r}: it was trained for {known}")
        return self.attributes.index(name)

    def parse(self, text: str) -> dict[int, float]:
        """'smile=1,age=60' -> {position: number in [0, 1]}. Raises ValueError for values out of range."""
        values = {}
        for part in text.split(","):
            name, _, number = map(str.strip, part.partition("="))
            position = self.index(name)
            unit = self.units[position]
            try:
                values[position] = float(number) / unit
            except ValueError:
                raise UsageError(f"--set {part}: expected NAME=NUMBER, such as smile=1") from None
            if not 0 <= values[position] <= 1:
                raise UserError(f"--set {part}: {name} goes from 0 to {unit:g}")
        return values

    def vector(self, targets: dict[int, float], base: torch.Tensor | None = None) -> torch.Tensor:
        """Condition [d]: `base` (default: the means of the training images) with the targets of `parse` put in."""
        vector = torch.tensor(self.means) if base is None else base.clone()
        for position, value in targets.items():
            vector[position] = value
        return vector


def load_condition_scorer(path, condition: Condition, device="cpu", *, scorer: str | None = None, weights_dir=None):
    """ConditionScorer of the scorer that the generator in the file `path` was trained with; scorer: where to find it.
    Raises FileNotFoundError when that is absent, UserError when it is another, or the recorded one is not here."""
    trained = f"{path} was trained with the scorer"
    try:
        result = load_scorer(scorer or condition.scorer, device, weights_dir=weights_dir)
    except FileNotFoundError as error:
        if scorer:
            raise
        raise UserError(f"{trained} {condition.scorer}, which is not here: name it with --scorer") from error
    if (actual := scorer_identity(result)) != condition.scorer_fingerprint:
        raise UserError(f"{trained} {condition.scorer_fingerprint}, {scorer or condition.scorer} is {actual}")
    return ConditionScorer(result, condition.attributes, condition.units)


def read_condition(path) -> Condition:
    """The condition of a generator file. Raises ConditionError when it is unconditional."""
    path = Path(path)
    file = load_safetensors(path)[1] if path.suffix == ".safetensors" else load_checkpoint(path)
    if file.get("condition") is None:
        how = "train one with train.py --condition SCORER --init_from CHECKPOINT"
        raise ConditionError(f"{path} is an unconditional generator: it takes no attributes; {how}")
    return Condition.from_dict(file["condition"], path)


def base_fingerprint(path) -> str | None:
    """Fingerprint of the generator that an exported one was trained from, where its header names it."""
    base = load_safetensors(path)[1].get("base") if Path(path).suffix == ".safetensors" else None
    return base.get("fingerprint") if isinstance(base, dict) else None
