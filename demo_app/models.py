"""The networks with which photos are edited, loaded once: edit_photos.py and the page of demo.py share them."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from common.checkpoint import CheckpointError, fingerprint
from common.cli import ROOT, UserError
from editing.attributes import ConditionScorer, base_fingerprint, load_condition_scorer, read_condition
from editing.boundary import Boundary, BoundaryError, boundary_of
from model import Generator, load_generator
from perceptual.identity import Identity, build_identity
from perceptual.lpips import FeatureDistance, Perceptual, build_perceptual
from pSp.psp import load_psp, pSp
from scorer.interface import AttributeScorer
from scorer.network import load_scorer

CHECKPOINTS = ROOT / "checkpoints"
SCORER = "face-scorer-eval"  # reports: it had no part in fitting boundaries, nor in any inversion
SAFE = 3.5  # standard deviations along a boundary without a range of its own: further out faces break
CONDITION_SAFE = -0.8, 1.8  # change of a condition in [0, 1]: less than that of a smile harms eyes (docs/log.md)
CONDITION_RANGE = {"age": (-3.0, 3.0), "gender": (-2.0, 2.0), "eyeglasses": (-0.8, 2.0)}  # identity ends them earlier
MEAN_SAMPLES = 1000  # for the mean of w


@dataclass(frozen=True)
class Conditional:
    """A conditional generator; reader: attributes as it takes them; light: trained from the other by --light."""

    generator: Generator
    reader: ConditionScorer
    light: bool = False


@dataclass(frozen=True)
class Models:
    """Frozen networks on one device. Without encoder, faces are tuned around the mean of w."""

    generator: Generator
    scorer: AttributeScorer  # all read-outs come from it
    perceptual: Perceptual  # distance that tuning minimises
    identity: Identity  # by which an edit keeps the person
    boundaries: dict[str, Boundary] = field(default_factory=dict)
    encoder: pSp | None = None
    conditional: Conditional | None = None
    weights_dir: Path | None = None

    @property
    def size(self) -> int:
        """Side of the generator's images, in pixels."""
        return self.generator.config.size

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes that can be edited and read: those of boundaries, then those of the conditional generator."""
        names = dict.fromkeys((*self.boundaries, *(self.conditional.reader.names if self.conditional else ())))
        return tuple(name for name in names if name in self.scorer.names)

    @cached_property
    def inverted_by(self) -> list[str]:
        """Names and fingerprints of the networks on which an inversion depends."""
        networks = [self.generator.fingerprint, self.perceptual.name, fingerprint(self.perceptual.state_dict())]
        networks.append(fingerprint(self.encoder.encoder.state_dict()) if self.encoder else "")
        return [*networks, self.conditional.generator.fingerprint if self.conditional else ""]

    def safe_range(self, name: str) -> tuple[float, float]:
        """Positions of an attribute, lowest and highest, between which edited faces still are faces."""
        if name not in self.boundaries:
            return CONDITION_RANGE.get(name, CONDITION_SAFE)
        low, high = self.boundaries[name].range or (-SAFE, SAFE)
        return min(low, 0.0), max(high, 0.0)

    def describe(self) -> str:
        """One line: 'face-wpp-128 (128 px), refined by ...'."""
        parts = [f"{self.generator.path.stem} ({self.size} px)", f"refined by {self.perceptual.name}"]
        if self.conditional:
            parts.append(f"conditional generator {self.conditional.generator.path.stem}")
        return ", ".join([*parts, f"edits {', '.join(self.attributes) or 'nothing'}"])


def load_models(
    device="cpu",
    *,
    ckpt: Path | None = None,  # generator; default: the largest checkpoints/face-wpp-SIZE
    encoder: Path | None = None,  # default: the one in checkpoints/ for this generator
    boundaries: Path | None = None,  # folder of .npz files; default: of checkpoints/, what `conditional` does not edit
    conditional: str | Path | None = None,  # default: the largest checkpoints/face-cgan-SIZE; "none" for none
    scorer: str = SCORER,  # of the read-outs
    perceptual: str = "mobilefacenet",  # distance that tuning minimises
    weights_dir: Path | None = None,  # of third-party weights, looked into first
) -> Models:
    """Load the networks. Raises FileNotFoundError, or UserError, CheckpointError, BoundaryError for files that do not
    fit together."""
    ckpt = ckpt or largest("wpp")
    if ckpt is None:
        raise FileNotFoundError(f"{CHECKPOINTS} holds no face-wpp-SIZE.safetensors: name a generator with --ckpt")
    generator = load_generator(ckpt, device)
    if generator.config.condition_dim:
        raise UserError(f"--ckpt {ckpt} is a conditional generator: expected one without a condition")
    conditional = conditional or largest("cgan") or "none"
    if conditional == "none":
        conditional = None
    else:
        condition = read_condition(conditional)
        reader = load_condition_scorer(conditional, condition, device, weights_dir=weights_dir)
        light = condition.light and base_fingerprint(conditional) == generator.fingerprint
        conditional = Conditional(load_generator(conditional, device), reader, light)
    found = load_boundaries(boundaries or CHECKPOINTS, generator)
    if boundaries is None and conditional and conditional.light:  # its smiles are seen in photos (docs/log.md)
        found = {name: boundary for name, boundary in found.items() if name not in conditional.reader.names}
    identity = build_identity("mobilefacenet", device, weights_dir)
    if perceptual == identity.name:  # to load it again would take 0.16 s
        distance = FeatureDistance(identity, perceptual)
    else:
        distance = build_perceptual(perceptual, device, weights_dir)
    return Models(
        generator,
        scorer=load_scorer(scorer, device, weights_dir=weights_dir),
        perceptual=distance,
        identity=identity,
        boundaries=found,
        encoder=load_encoder(encoder, generator, device),
        conditional=conditional,
        weights_dir=weights_dir,
    )


@lru_cache(2)  # the generator and the conditional one
def mean_w(generator: Generator) -> torch.Tensor:
    """Mean of w, [1, L, D]. Seconds, unless the generator's file has it."""
    return generator.mean_latent(MEAN_SAMPLES)


def largest(kind: str) -> Path | None:
    """The largest checkpoints/face-KIND-SIZE.safetensors, if any."""
    sizes = {path: re.fullmatch(rf"face-{kind}-(\d+)", path.stem) for path in CHECKPOINTS.glob("*.safetensors")}
    return max((path for path in sizes if sizes[path]), key=lambda path: int(sizes[path][1]), default=None)


def load_encoder(path: Path | None, generator: Generator, device) -> pSp | None:
    """The encoder `path`, or the one in checkpoints/ for this generator, or None."""
    if path is not None:
        return load_psp(path, device, generator)
    for file in sorted(CHECKPOINTS.glob("face-psp-*.safetensors")):
        with suppress(CheckpointError):  # for another generator
            return load_psp(file, device, generator)
    return None


def load_boundaries(folder: Path, generator: Generator) -> dict[str, Boundary]:
    """{attribute: boundary} of the .npz files in a folder that were fitted for this generator, the last one by name."""
    folder, result = Path(folder), {}
    if not folder.is_dir():
        raise FileNotFoundError(f"--boundaries {folder} does not exist: a folder of .npz files is expected")
    for path in sorted(folder.glob("*.npz")):
        with suppress(BoundaryError):  # of another generator; noise maps, other arrays
            boundary = boundary_of(path, generator)
            result |= {boundary.attribute: boundary} if boundary.fingerprint else {}
    return result
