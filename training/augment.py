"""Adaptive discriminator augmentation (ADA): every image that the discriminator sees, real or generated, is transformed
with probability p, and p follows how far the discriminator overfits.

Karras et al. 2020, arXiv 2006.06676. Appendix B: transforms, distributions, order (the set `bgc`); section 3: control
of p. Per image all geometry is one affine matrix from output to input pixels, all colour one on RGB. Unlike
NVIDIA's: images with blits alone are moved by exact indexing, and borders are reflected any number of times."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.distributed import all_reduce_mean

BLITS = ("xflip", "rotate90", "xint")  # xint: translation by whole pixels, xfrac: by fractions
GEOMETRY = ("scale", "rotate", "aniso", "xfrac")  # rotate: before and after aniso, the stretch
COLOURS = ("brightness", "contrast", "lumaflip", "hue", "saturation")
TRANSFORMS = BLITS + GEOMETRY + COLOURS

# Appendix B: ranges of the parameters. Translations are shares of the image side, scales are log2.
XINT_MAX = XFRAC_STD = 0.125
SCALE_STD = ANISO_STD = 0.2
BRIGHTNESS_STD, CONTRAST_STD, SATURATION_STD = 0.2, 0.5, 1.0

# Columns of the noise, per image: uniforms that decide, then uniforms that give the values; drawn whatever p is.
_RESAMPLED = ("scale", "rotate", "aniso", "rotate_after", "xfrac")
_DECISIONS = (*BLITS, *_RESAMPLED, *COLOURS)
_VALUES = (*_DECISIONS, "xint_y", "xfrac_y")
N_NOISE = len(_DECISIONS) + len(_VALUES)

# Low-pass of the sym6 wavelet (Daubechies' least asymmetric, 6 vanishing moments): orthonormal to its shifts by 2.
TAPS = """0.015404109327027373 0.0034907120842174702 -0.11799011114819057 -0.048311742585633
    0.4910559419267466 0.787641141030194 0.3379294217276218 -0.07263752278646252
    -0.021060292512300564 0.04472490177066578 0.0017677118642428036 -0.007800708325034148"""
SYM6 = [float(tap) for tap in TAPS.split()]
MARGIN = 6  # pixels around the image that are doubled with it
BILINEAR, NEAREST, BORDER, REFLECTION = 0, 1, 1, 2  # of torch's grid_sampler_2d


class Plan(NamedTuple):
    """Transforms of N images. Matrices are homogeneous ones without their constant last row."""

    blit: torch.Tensor  # [N, 2, 3] output pixel -> input pixel, both (x, y) from the centre, of the blits alone
    geometry: torch.Tensor  # [N, 2, 3] likewise, of blits and geometry
    colour: torch.Tensor  # [N, 3, 4] on RGB in [-1, 1]
    resampled: torch.Tensor  # bool [N], drew geometry that is not a blit


def make_plan(noise: torch.Tensor, p: float, size: int, transforms: tuple[str, ...] = TRANSFORMS) -> Plan:
    """Noise [N, N_NOISE] -> transforms of N images of size x size, each drawn with probability p."""
    u = dict(zip(_VALUES, noise[:, len(_DECISIONS) :].unbind(1), strict=True))  # each [N]
    chance = {name: p if name in transforms else 0.0 for name in TRANSFORMS}
    chance["rotate"] = chance["rotate_after"] = 1 - (1 - chance["rotate"]) ** 0.5  # p_rot: P(before or after) = p
    drew = {name: noise[:, i] < chance[name] for i, name in enumerate(_DECISIONS)}  # each bool [N]

    def pick(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.where(drew[name], value, 0.0)

    def normal(name: str) -> torch.Tensor:  # clamped to 5.2 sigma, where float32's uniform ends
        return math.sqrt(2) * torch.erfinv((2 * u[name] - 1).clamp(-1 + 1.2e-7, 1 - 1.2e-7))

    def angle(name: str) -> torch.Tensor:
        return pick(name, (2 * u[name] - 1) * math.pi)

    # Blits. Matrices lead from output to input: inverse factors, the first transform on the left.
    mirror = 1 - 2 * pick("xflip", torch.floor(2 * u["xflip"]))
    turns = pick("rotate90", torch.floor(4 * u["rotate90"])) * (math.pi / 2)
    cos, sin = torch.cos(turns).round(), torch.sin(turns).round()
    blit = _matrix2(mirror * cos, -mirror * sin, sin, cos)  # [N, 2, 2]
    shift = [pick("xint", torch.round((2 * u[axis] - 1) * XINT_MAX * size)) for axis in ("xint", "xint_y")]
    blit_offset = -blit @ torch.stack(shift, 1)[:, :, None]  # [N, 2, 1]

    # Geometry
    scale = torch.exp2(-pick("scale", normal("scale") * SCALE_STD))[:, None, None]
    aniso = torch.exp2(-pick("aniso", normal("aniso") * ANISO_STD))
    stretch = torch.diag_embed(torch.stack([aniso, 1 / aniso], 1))  # [N, 2, 2]
    linear = blit @ (_rotation(angle("rotate")) * scale) @ stretch @ _rotation(angle("rotate_after"))  # [N, 2, 2]
    shift = [pick("xfrac", normal(axis) * XFRAC_STD * size) for axis in ("xfrac", "xfrac_y")]
    offset = blit_offset - linear @ torch.stack(shift, 1)[:, :, None]  # [N, 2, 1]

    # Colour. Contrast, luma flip, hue and saturation scale along or across the grey axis v or turn about it, so they
    # commute: luma * K + chroma * (cos * (I - K) + sin * [v]x), K = vv^T, a circulant. Brightness, the first, is on v.
    gain = torch.exp2(pick("contrast", normal("contrast") * CONTRAST_STD))
    luma = gain * (1 - 2 * pick("lumaflip", torch.floor(2 * u["lumaflip"])))
    chroma, hue = gain * torch.exp2(pick("saturation", normal("saturation") * SATURATION_STD)), angle("hue")
    shade = luma * pick("brightness", normal("brightness") * BRIGHTNESS_STD)
    same, mean = (luma + 2 * chroma * torch.cos(hue)) / 3, (luma - chroma * torch.cos(hue)) / 3
    turn = chroma * torch.sin(hue) / math.sqrt(3)
    low, high = mean - turn, mean + turn
    rows = (same, low, high, shade), (high, same, low, shade), (low, high, same, shade)
    colour = torch.stack([torch.stack(row, 1) for row in rows], 1)  # [N, 3, 4]
    resampled = torch.stack([drew[name] for name in _RESAMPLED]).any(0)
    return Plan(torch.cat([blit, blit_offset], 2), torch.cat([linear, offset], 2), colour, resampled)


def _matrix2(*elements: torch.Tensor) -> torch.Tensor:
    return torch.stack(elements, 1).view(-1, 2, 2)


def _rotation(theta: torch.Tensor) -> torch.Tensor:
    return _matrix2(torch.cos(theta), -torch.sin(theta), torch.sin(theta), torch.cos(theta))


def augment(images: torch.Tensor, p: float, *, transforms=TRANSFORMS, noise=None) -> torch.Tensor:
    """Augment images [N, 3, S, S] in [-1, 1], each transform with probability p; values may leave [-1, 1]. Same shape
    and dtype; differentiable twice; computed in float32 (float64 for float64). noise: uniforms
    [N, N_NOISE]; default: drawn. p = 0 returns the very tensor."""
    if p == 0:
        return images
    noise = torch.rand(len(images), N_NOISE, device=images.device) if noise is None else noise.to(images.device)
    with torch.no_grad():
        plan = make_plan(noise, p, images.shape[2], transforms)

    x = images if images.dtype == torch.float64 else images.float()
    moved = blit(x, plan.blit)
    if len(index := plan.resampled.nonzero()[:, 0]):  # a GPU is waited for here
        moved = moved.index_copy(0, index, resample(x.index_select(0, index), plan.geometry[index]))
    colour = plan.colour.to(x.dtype)
    x = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], moved.flatten(2)).view(images.shape)
    return x.to(images.dtype)


def blit(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Move x [N, C, S, S] by matrices [N, 2, 3] of mirrors, quarter turns and whole pixels. Exact; borders reflect."""
    linear, offset = matrix.to(x.dtype).split((2, 1), 2)
    matrix = torch.cat([linear, offset * (2 / (x.shape[2] - 1))], 2)  # the grid's unit: -1, 1 are the outermost pixels
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)  # [N, S, S, 2]
    return _Sample.apply(x, grid, (NEAREST, REFLECTION, True))


def resample(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Warp x [N, C, S, S] by matrices [N, 2, 3] (Plan.geometry): up to twice the resolution through the low-pass,
    bilinear sampling there, down through its transpose. Whole pixels are exact, as the low-pass is orthogonal."""
    channels, size = x.shape[1:3]
    taps = x.new_tensor(SYM6)[:, None].expand(channels, 1, -1, 1)  # along y; taps.mT along x
    up, down = taps * 2**0.5, taps * 0.5**0.5

    # Twice the resolution: out[j] = sum_k up[j + 5 - 2k] x[k], where out[2k] lies on pixel k, as tap 5 is the centre.
    # Depthwise filters on the CPU are 1.3 (64x64) to 5 times (256x256) faster in channels_last.
    margin = min(MARGIN, size - 4)
    x = F.pad(x.contiguous(memory_format=torch.channels_last), (margin + 3, margin + 2) * 2, mode="reflect")
    x = F.conv_transpose2d(x, up, None, (2, 1), (2 * 3 + 5, 0), (1, 0), channels)
    x = F.conv_transpose2d(x, up.mT, None, (1, 2), (0, 2 * 3 + 5), (0, 1), channels)  # [N, C, R, R], R = 2S-1+4margin

    # Sample from 5 before the first pixel to 6 after the last on the doubled grid, as the transposed filter needs.
    # The grid's unit: positions about the centre, -1 and 1 on the ends of the doubled image.
    n, ends, (linear, offset) = 2 * size + 10, (size - 1) / 2 + margin, matrix.to(x.dtype).split((2, 1), 2)
    offset = offset + linear.sum(2, keepdim=True) / 4  # the middle of the n lies a quarter off the centre
    matrix = torch.cat([linear * ((n - 1) / 4), offset], 2) / ends
    grid, border = F.affine_grid(matrix, [len(x), channels, n, n], align_corners=True), (size - 1) / 2 / ends
    phase = (grid / (4 * border)).add_(0.25)
    wave = phase.sub_(phase.floor()).sub_(0.5).abs_().mul_(-4 * border).add_(border)  # reflected between the borders
    x = _Sample.apply(x, torch.where(grid.abs() > 1, wave, grid), (BILINEAR, BORDER, True))  # [N, C, n, n]

    # The transpose of the doubling: out[k] = sum_i down[i] x[2k + i].
    x = x.contiguous(memory_format=torch.channels_last)
    x = F.conv2d(x, down, None, (2, 1), 0, 1, channels)  # [N, C, S, Q]
    return F.conv2d(x, down.mT, None, (1, 2), 0, 1, channels)  # [N, C, S, S]


# grid_sample is linear in the image: its gradient is the transposed sampling, whose gradient is the sampling again.
# Releases before torch 2.15 raise "derivative for grid_sampler_2d_backward is not implemented". CUDA adds in any order.
class _Sample(torch.autograd.Function):
    """x [N, C, H, W] at a grid; mode: interpolation, padding, align_corners. shape: the transpose, to that shape."""

    @staticmethod
    def forward(ctx, x, grid, mode, shape=None):
        ctx.save_for_backward(grid)
        ctx.transpose = mode, None if shape else x.shape
        if shape is None:
            return torch.ops.aten.grid_sampler_2d(x, grid, *mode)
        image = x.new_zeros(()).expand(shape)  # read only for the gradient of the grid, which is not computed
        return torch.ops.aten.grid_sampler_2d_backward(x, image, grid, *mode, [True, False])[0]

    @staticmethod
    def backward(ctx, grad):
        return _Sample.apply(grad, *ctx.saved_tensors, *ctx.transpose), None, None, None


class AdaptiveAugment:
    """Augmentation whose p follows r = E[sign(D(real))], the paper's r_t (section 3): it rises by images / length where
    r is above target (the discriminator is sure of the training set), falls where it is below, and stays in [0, 1].
    target: None keeps p. length: images in which p may go from 0 to 1. interval: updates between adjustments. All ranks
    must call update() and state_dict()."""

    def __init__(self, p=0.0, target=0.6, length=500_000, interval=4, *, device="cpu", world_size: int = 1):
        self.target, self.length, self.interval, self.world_size = target, length, interval, world_size
        self.p, self.r = p, 0.0  # r: of the last adjustment, for the log
        self._sums = torch.zeros(2, device=device)  # signs, images: since the last adjustment, this rank's
        self._updates = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return augment(images, self.p)

    @torch.no_grad()
    def accumulate(self, real_logits: torch.Tensor) -> None:
        """Count the discriminator's outputs [N, 1] (before softplus) for augmented real images."""
        if self.target is not None:
            self._sums[0] += real_logits.sign().sum()
            self._sums[1] += real_logits.numel()

    def _total(self) -> list[float]:
        """Signs and images of all ranks."""
        total = self._sums.clone()
        all_reduce_mean([total])
        return (total * self.world_size).tolist()

    def update(self) -> None:
        """Adjust p at every interval-th call, once per step."""
        if self.target is None:
            return
        self._updates += 1
        if self._updates % self.interval:
            return
        signs, images = self._total()
        self.r = signs / max(1, images)
        direction = (self.r > self.target) - (self.r < self.target)
        self.p = min(1.0, max(0.0, self.p + direction * images / self.length))
        self._sums.zero_()

    def state_dict(self) -> dict:
        signs, images = self._total()
        return {"p": self.p, "r": self.r, "signs": signs, "images": images, "updates": self._updates}

    def load_state_dict(self, state: dict) -> None:
        """Continue from state_dict(); each rank takes over its share of the sums."""
        self.p, self.r, self._updates = state["p"], state["r"], int(state["updates"])
        self._sums.copy_(torch.tensor([state["signs"], state["images"]]) / self.world_size)
