"""The pSp encoders: image [N, 3, S, S] -> w, relative to the average w (Richardson et al. 2021, section 3.1).

Names of classes and tensors are those of eladrich/pixel2style2pixel and omertov/encoder4editing. With `input_nc` 6 an
encoder sees its own reconstruction beside the image (ReStyle; see pSp/psp.py). The number of tokens follows from the
generator; generators below 256 px, which the published 256 px input would enlarge, get a narrower, shallower network on
a smaller image.

    encoder = build_encoder(EncoderConfig.for_generator(generator.config))
    offsets = encoder(images)                                    # add generator.mean_latent() for w
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoint import CheckpointError, load_strictly
from common.weights import find
from layers import EqualLinear
from perceptual.arcface import DEPTHS, MODES, STRIDES, arcface_state, build_body, input_layer
from perceptual.identity import MobileFaceNet, build_identity, crop_with_margin, fold_batch_norms
from pSp.settings import E4E, GRADUAL, IDENTITY, INTO_W, INTO_W_PLUS

SIZES = (16, 32, 64, 128, 256, 512, 1024)  # of the input, pixels
PUBLISHED_INPUT = 256
COARSE, MIDDLE = 3, 7  # tokens below 3 come from the coarsest tap, below 7 from the middle, the rest from the finest
POOL = 7  # the side to which IntoWPlus pools its last map


@dataclass(frozen=True)
class EncoderConfig:
    """All that is needed to rebuild an encoder. Raises ValueError for what cannot be built."""

    encoder_type: str = GRADUAL
    n_styles: int = 14  # tokens per image, L of the generator
    style_dim: int = 512
    input_size: int = PUBLISHED_INPUT  # pixels, a power of two
    input_nc: int = 3  # 6: image and reconstruction (ReStyle)
    width: int = 64  # feature maps of the first stage; the others have 2, 4 and 8 times as many
    depth: int = 50
    mode: str = "ir_se"  # or ir: without squeeze and excitation

    def __post_init__(self):
        allowed = {"encoder_type": ENCODERS, "depth": DEPTHS, "mode": MODES, "input_size": SIZES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(map(str, values))}, not {getattr(self, name)!r}")
        for name, most in (("n_styles", 32), ("style_dim", 4096), ("input_nc", 512), ("width", 512)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"the encoder's {name} is a number from 1 to {most}, not {value!r}")
        if self.encoder_type == IDENTITY and self.input_nc != 3:
            raise ValueError(f"{IDENTITY} takes 3 channels, a face alone, not {self.input_nc}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the four stages. A small image keeps its resolution in the first: else the taps have 2 px."""
        return STRIDES if self.input_size > 64 else (1, *STRIDES[1:])

    @property
    def channels(self) -> int:
        """Feature maps of the last stage and of the pyramid: 512 at the published width."""
        return 8 * self.width

    @property
    def taps(self) -> tuple[int, int, int]:
        """Index of the last unit of stages 2, 3 and 4 in the body: 6, 20, 23 at depth 50."""
        units = DEPTHS[self.depth]
        return tuple(sum(units[: stage + 1]) - 1 for stage in (1, 2, 3))

    @property
    def tap_sizes(self) -> tuple[int, int, int]:
        """Side of these feature maps: 64, 32, 16 for 256 px."""
        return tuple(self.input_size // math.prod(self.strides[: stage + 1]) for stage in (1, 2, 3))

    def tap_of(self, style: int) -> int:
        """The tap (0 fine, 1 middle, 2 coarse) that token `style` is computed from."""
        return 2 if style < COARSE else 1 if style < MIDDLE else 0

    @classmethod
    def from_dict(cls, values: dict) -> "EncoderConfig":
        """The config of a checkpoint's entries. Raises ValueError for unknown ones."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"encoder config has unknown entries {sorted(unknown)}: written by a newer version?")
        return cls(**values)

    @classmethod
    def for_generator(cls, config, *, width: int = 0, depth: int = 0, **other) -> "EncoderConfig":
        """The encoder for a generator (a GeneratorConfig). 0 chooses: the published network from 256 px on, below that
        width 32 and depth 18; IdentityStyleEncoder has width 12. The input has the generator's size, at most the
        published one."""
        light, size = config.size < PUBLISHED_INPUT, min(PUBLISHED_INPUT, max(16, config.size))
        suited = 12 if other.get("encoder_type") == IDENTITY else 32 if light else 64
        other |= {"width": width or suited, "depth": depth or (18 if light else 50)}
        return cls(n_styles=config.n_tokens, style_dim=config.style_dim, input_size=size, **other)


class GradualStyleBlock(nn.Module):
    """map2style: strided convolutions from [N, C, side, side] down to one pixel, then a linear layer -> [N, out]."""

    def __init__(self, channels: int, out_dim: int, side: int, linear: type[nn.Module] = EqualLinear):
        super().__init__()
        layers = []
        for _ in range(max(1, math.ceil(math.log2(side)))):
            layers += [nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = linear(channels, out_dim)

    def forward(self, x):
        return self.linear(self.convs(x).flatten(1))  # [N, C, 1, 1] -> [N, out]


class Backbone(nn.Module):
    """`input_layer` and `body` of ArcFace's network, which all encoders share."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.input_layer = input_layer(config.input_nc, config.width)
        self.body = build_body(config.depth, config.width, config.mode, config.strides)

    def features(self, images) -> list[torch.Tensor]:
        """The three taps, fine to coarse: [N, 2w, s, s], [N, 4w, s/2, s/2], [N, 8w, s/4, s/4], s = tap_sizes[0]."""
        expected = (self.config.input_nc, self.config.input_size, self.config.input_size)
        if images.shape[1:] != expected:
            raise ValueError(f"the encoder takes images [N, {', '.join(map(str, expected))}], got {list(images.shape)}")
        x = self.input_layer(images.contiguous(memory_format=torch.channels_last))
        taps = []
        for index, unit in enumerate(self.body):
            x = unit(x)
            if index in self.config.taps:
                taps.append(x)
        return taps


class GradualStyleEncoder(Backbone):
    """images [N, 3, S, S] in [-1, 1] -> w [N, L, style_dim], each token from the pyramid level of its resolution."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        channels, sides = config.channels, config.tap_sizes
        self.styles = nn.ModuleList(
            GradualStyleBlock(channels, config.style_dim, sides[config.tap_of(i)]) for i in range(config.n_styles)
        )
        self.latlayer1 = nn.Conv2d(channels // 2, channels, 1)
        self.latlayer2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, images):
        fine, middle, coarse = self.features(images)
        middle = enlarge(coarse, middle) + self.latlayer1(middle)  # [N, 8w, s/2, s/2]
        fine = enlarge(middle, fine) + self.latlayer2(fine)  # [N, 8w, s, s]
        pyramid = (fine, middle, coarse)
        ws = [style(pyramid[self.config.tap_of(i)]) for i, style in enumerate(self.styles)]
        return torch.stack(ws, 1)  # [N, L, style_dim]


class Encoder4Editing(GradualStyleEncoder):
    """images [N, 3, S, S] in [-1, 1] -> w [N, L, style_dim]: w_0, and w_i = w_0 + delta_i (Tov et al. 2021, 4.1)."""

    def forward(self, images):
        first, deltas = super().forward(images).split((1, self.config.n_styles - 1), 1)
        return torch.cat([first, first + deltas], 1)  # [N, L, style_dim]


def enlarge(x, like):
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


class IdentityStyleEncoder(nn.Module):
    """images [N, 3, S, S] in [-1, 1] -> w [N, L, style_dim]: each token from the image and the maps of MobileFaceNet at
    its pyramid level, plus a linear function of the embedding. The recognition network is not trained: what tells
    people apart is there before the first step (Nitzan et al. 2020, arXiv 2005.07728, encode identity so). Its deep
    maps ignore hair, light and background: every level sees all of them, and the pixels."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.recognition = fold_batch_norms(MobileFaceNet()).requires_grad_(False)
        taken, self.sides = 3 + sum(width for width, _ in MobileFaceNet.TAPS), [side for _, side in MobileFaceNet.TAPS]
        self.lateral = nn.ModuleList(nn.Conv2d(taken, config.channels, 1) for _ in self.sides)
        self.styles = nn.ModuleList(
            GradualStyleBlock(config.channels, config.style_dim, self.sides[config.tap_of(i)], nn.Linear)
            for i in range(config.n_styles)
        )
        for style in self.styles:  # at first the embedding alone decides
            nn.init.zeros_(style.linear.weight)
            nn.init.zeros_(style.linear.bias)
        self.identity = nn.Linear(MobileFaceNet.EMBEDDING, config.n_styles * config.style_dim)
        self.register_buffer("basis", torch.eye(config.style_dim))  # rows: principal directions of w, times deviations

    def requires_grad_(self, requires_grad: bool = True):
        super().requires_grad_(requires_grad)
        self.recognition.requires_grad_(False)
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        self.recognition.eval()  # the embedding's batch norm keeps its statistics
        return self

    def embed(self, images):
        """[N, 3, S, S] -> [N, 128], what `identity` sees."""
        return self.recognition.taps(crop_with_margin(images))[1]

    @torch.no_grad()
    def fit(self, embeddings, offsets) -> None:
        """Set `basis`, and `identity` by least squares, from embeddings [N, 128] of images whose offsets [N, L, D] are
        known. In units of the deviations all directions of w are learnt at one pace."""
        x, offsets = embeddings.double(), offsets.double()
        flat = offsets.flatten(0, 1)  # all tokens have nearly the same covariance
        variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
        basis = directions.T * variances.clamp(min=variances[-1] * 1e-6).sqrt()[:, None]  # [D, D]
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)  # the last column is the bias
        known = torch.linalg.solve(basis, offsets, left=False)  # [N, L, D]
        solution = torch.linalg.lstsq(x, known.flatten(1)).solution  # [129, L * D]
        self.basis.copy_(basis)
        self.identity.weight.copy_(solution[:-1].T)
        self.identity.bias.copy_(solution[-1])

    def forward(self, images):
        faces = crop_with_margin(images)  # [N, 3, 144, 144]
        taps, embedding = self.recognition.taps(faces)  # maps; [N, 128]
        pyramid = [
            lateral(torch.cat([F.interpolate(x, (side, side), mode="area") for x in (faces, *taps)], 1))
            for lateral, side in zip(self.lateral, self.sides, strict=True)
        ]  # [N, 8w, 36, 36], [N, 8w, 18, 18], [N, 8w, 9, 9]
        ws = [style(pyramid[self.config.tap_of(i)]) for i, style in enumerate(self.styles)]
        known = self.identity(embedding).unflatten(1, (-1, self.config.style_dim))  # [N, L, style_dim]
        return (torch.stack(ws, 1) + known) @ self.basis  # [N, L, style_dim]


class BackboneEncoderUsingLastLayerIntoW(Backbone):
    """images [N, 3, S, S] in [-1, 1] -> one w [N, style_dim] for all layers (space W)."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.linear = EqualLinear(config.channels, config.style_dim)

    def forward(self, images):
        coarse = self.features(images)[-1]  # [N, 8w, s, s]
        return self.linear(coarse.mean((2, 3)))  # [N, style_dim]


class BackboneEncoderUsingLastLayerIntoWPlus(Backbone):
    """images [N, 3, S, S] in [-1, 1] -> w [N, L, style_dim] from the last feature map alone."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        channels = config.channels
        linear = nn.Linear(channels * POOL**2, channels)
        self.output_layer_2 = nn.Sequential(nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(POOL), nn.Flatten(), linear)
        self.linear = EqualLinear(channels, config.style_dim * config.n_styles)

    def forward(self, images):
        x = self.output_layer_2(self.features(images)[-1])  # [N, 8w]
        return self.linear(x).unflatten(1, (self.config.n_styles, self.config.style_dim))  # [N, L, style_dim]


ENCODERS = {
    GRADUAL: GradualStyleEncoder,
    E4E: Encoder4Editing,
    IDENTITY: IdentityStyleEncoder,
    INTO_W: BackboneEncoderUsingLastLayerIntoW,
    INTO_W_PLUS: BackboneEncoderUsingLastLayerIntoWPlus,
}


def build_encoder(config: EncoderConfig) -> nn.Module:
    return ENCODERS[config.encoder_type](config)


def init_backbone(encoder: nn.Module, weights_dir=None) -> str:
    """Load IR-SE50 ArcFace into input_layer and body of an encoder, as published, where the file is found and fits;
    returns what was loaded. Of six input channels the first three get ArcFace's, as in ReStyle."""
    config = encoder.config
    if config.encoder_type == IDENTITY:
        encoder.recognition = build_identity("mobilefacenet", weights_dir=weights_dir).network
        return str(find("mobilefacenet", weights_dir))
    path = find("arcface_ir_se50", weights_dir)
    if path is None or (config.width, config.depth, config.mode) != (64, 50, "ir_se"):
        return f"random weights (IR-SE50 ArcFace {'has another shape' if path else 'is not here'})"
    state = arcface_state(path)
    if config.input_nc > 3:
        rest = encoder.input_layer[0].weight[:, 3:].detach()
        state["input_layer.0.weight"] = torch.cat([state["input_layer.0.weight"], rest], 1)
    for name in ("input_layer", "body"):
        load_strictly(getattr(encoder, name), part(state, name), path)
    return str(path)


def part(state: dict, name: str) -> dict:
    """The tensors below `name.` of a state dict, without the prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def infer_encoder_config(state: dict, stated: str | None = None) -> EncoderConfig:
    """The config of an encoder from its tensors: those of a published checkpoint, which holds none, have 256 px input.
    stated: the encoder_type in the file's opts, which alone tells Encoder4Editing from GradualStyleEncoder. Raises
    CheckpointError when the tensors are no pSp encoder's, or not those of `stated`."""
    if stated is not None and stated not in ENCODERS:
        raise CheckpointError(f"it holds an encoder of type {stated!r}; supported are {', '.join(ENCODERS)}")
    try:
        width, input_nc = state["input_layer.0.weight"].shape[:2]
        n_units = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("body."))
        depth = next(depth for depth, units in DEPTHS.items() if sum(units) == n_units)
        mode = "ir_se" if "body.0.res_layer.5.fc1.weight" in state else "ir"
        if "styles.0.linear.weight" in state:
            kind, style_dim = E4E if stated == E4E else GRADUAL, state["styles.0.linear.weight"].shape[0]
            n_styles = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("styles."))
        elif "output_layer_2.3.weight" in state:
            kind, style_dim = INTO_W_PLUS, 512
            n_styles = state["linear.weight"].shape[0] // style_dim
        else:
            kind, style_dim, n_styles = INTO_W, state["linear.weight"].shape[0], 1
    except (KeyError, StopIteration, ValueError, IndexError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "its layers are numbered or counted otherwise"
        raise CheckpointError(f"these tensors are no pSp encoder's: {what}") from None
    if stated not in (None, kind):
        raise CheckpointError(f"its opts say {stated}, but the tensors are those of {kind}")
    return EncoderConfig(kind, n_styles, style_dim, PUBLISHED_INPUT, input_nc, width, depth, mode)
