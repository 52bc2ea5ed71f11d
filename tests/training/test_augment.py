"""Each transform of training/augment.py against slow references that share no code with it, and its derivatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import training.augment as A
from training.augment import augment, make_plan

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ["cpu", CUDA]


def noise_that_draws(n=1, **values):
    """Noise that, at p = 0.5, draws exactly the named transforms, with the given uniforms as their values."""
    noise = torch.full((n, A.N_NOISE), 0.9)
    for name, value in values.items():
        if name in A._DECISIONS:
            noise[:, A._DECISIONS.index(name)] = 0.0
        noise[:, len(A._DECISIONS) + A._VALUES.index(name)] = value
    return noise


def draw(images, **values):
    return augment(images, 0.5, noise=noise_that_draws(len(images), **values))


def gauss(sigmas):
    """The uniform that the normal quantile takes to `sigmas`."""
    return 0.5 * (1 + math.erf(sigmas / math.sqrt(2)))


def faces(n=2, size=16, seed=0, **options):
    """Smooth random images in [-1, 1]: [n, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, size // 4 + 1, size // 4 + 1, generator=generator, dtype=torch.float64) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True).to(**options)


# The reference for geometry: appendix B with numpy, on one channel.


def convolve(image, taps, axis, mode):
    return np.apply_along_axis(lambda line: np.convolve(line, taps, mode), axis, image)


def reference_warp(image, inverse, margin=A.MARGIN):
    """`image` [S, S] moved by `inverse`, the 3x3 matrix from output to input pixels about the centre: reflected,
    doubled by zero insertion and convolution, sampled, convolved and decimated. Positions further than `margin` outside
    the image are reflected into it first; margin=inf is NVIDIA's way."""
    size, wide, taps = len(image), 3 * len(image), np.array(A.SYM6)
    doubled = np.zeros((2 * (size + 2 * wide),) * 2)
    doubled[::2, ::2] = np.pad(image, wide, mode="reflect")
    for axis in (0, 1):
        doubled = convolve(doubled, taps * np.sqrt(2), axis, "full").take(range(5, 5 + len(doubled)), axis)

    centre = (size - 1) / 2
    position = (np.arange(2 * size + 10) - 5) / 2 - centre
    y, x = np.meshgrid(position, position, indexing="ij")
    x, y, _ = inverse @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    for v in (x, y):
        far = np.abs(v) > centre + margin
        while (far & (np.abs(v) > centre)).any():
            v[far & (v > centre)] = 2 * centre - v[far & (v > centre)]
            v[far & (v < -centre)] = -2 * centre - v[far & (v < -centre)]
    column, line = 2 * (x + centre + wide), 2 * (y + centre + wide)
    j, i = np.floor(column).astype(int), np.floor(line).astype(int)
    s, t = column - j, line - i
    upper = (1 - s) * doubled[i, j] + s * doubled[i, j + 1]
    lower = (1 - s) * doubled[i + 1, j] + s * doubled[i + 1, j + 1]
    out = ((1 - t) * upper + t * lower).reshape(len(position), -1)
    for axis in (0, 1):
        out = convolve(out, taps[::-1] / np.sqrt(2), axis, "valid").take(range(0, 2 * size, 2), axis)
    return out


def translation(x, y):
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def scaling(x, y):
    return np.diag([x, y, 1.0])


def rotation(theta):
    c, s = math.cos(theta), math.sin(theta)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def check_warp(x, out, forward):
    """out [N, 3, S, S] is x moved by `forward`, the 3x3 matrix from input to output pixels."""
    inverse = np.linalg.inv(forward)
    for image, result in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        np.testing.assert_allclose(result.numpy(), reference_warp(image.numpy(), inverse), atol=2e-5)


# Each transform alone


def test_xflip():
    x = faces(3)
    assert torch.equal(draw(x, xflip=0.7), x.flip(3))
    assert torch.equal(draw(x, xflip=0.3), x)  # drawn, and came out as no flip


def test_rotate90():
    x = faces(2)
    for k in range(4):
        assert torch.equal(draw(x, rotate90=(k + 0.5) / 4), torch.rot90(x, k, (2, 3)))


@pytest.mark.parametrize("dx,dy", [(1, 0), (0, 2), (-2, 1), (2, -2)])
def test_integer_translation(dx, dy):
    x = faces(2, size=16)  # 0.125 * 16 = 2 pixels at most
    out = draw(x, xint=(dx / 2 + 1) / 2, xint_y=(dy / 2 + 1) / 2)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    assert torch.equal(out, padded[:, :, 2 - dy : 18 - dy, 2 - dx : 18 - dx])


def test_blits_together():
    x = faces(2, size=16)
    out = draw(x, xflip=0.9, rotate90=0.3, xint=0.75, xint_y=0.5)  # flip, one quarter turn, one pixel to the right
    moved = F.pad(torch.rot90(x.flip(3), 1, (2, 3)), (1, 0, 0, 0), mode="reflect")[..., :16]
    assert torch.equal(out[..., 1:], moved[..., 1:])  # beyond the border lies the reflected source
    assert torch.equal(out[..., :1], moved[..., :1])


def test_scale():
    for sigmas in (1.5, -2.0):
        x, factor = faces(2), 2 ** (0.2 * sigmas)
        check_warp(x, draw(x, scale=gauss(sigmas)), scaling(factor, factor))


@pytest.mark.parametrize("name", ["rotate", "rotate_after"])
def test_rotate(name):
    x, theta = faces(2), 0.6
    check_warp(x, draw(x, **{name: (theta / math.pi + 1) / 2}), rotation(-theta))


def test_aniso():
    x, factor = faces(2), 2 ** (0.2 * 1.3)
    check_warp(x, draw(x, aniso=gauss(1.3)), scaling(factor, 1 / factor))


def test_fractional_translation():
    x = faces(2, size=16)
    check_warp(x, draw(x, xfrac=gauss(0.8), xfrac_y=gauss(-1.7)), translation(2 * 0.8, -2 * 1.7))


def test_whole_pixels_through_the_resampler_are_exact():
    x = faces(2, size=16)  # orthogonal shifts of the low-pass; the identity too
    never = make_plan(noise_that_draws(2), 0.5, 16).geometry
    torch.testing.assert_close(A.resample(x, never), x, atol=1e-12, rtol=0)
    never[:, 0, 2] = -2.0
    expected = F.pad(x, (2, 0, 0, 0), mode="reflect")[..., :16]
    torch.testing.assert_close(A.resample(x, never), expected, atol=1e-12, rtol=0)


def composed(size=16):
    """Every geometric transform: the noise's values, and the matrix from input to output in the paper's order."""
    values = dict(xflip=0.8, rotate90=0.4, xint=0.75, xint_y=0.25, scale=gauss(0.9), rotate=0.6, aniso=gauss(-1.1))
    values |= dict(rotate_after=0.3, xfrac=gauss(0.4), xfrac_y=gauss(-0.3))
    unit, s, a = 0.125 * size, 2 ** (0.2 * 0.9), 2 ** (0.2 * -1.1)
    steps = [
        scaling(-1, 1),
        rotation(-math.pi / 2),
        translation(0.5 * unit, -0.5 * unit),
        scaling(s, s),
        rotation(-0.2 * math.pi),
        scaling(a, 1 / a),
        rotation(0.4 * math.pi),
        translation(0.4 * unit, -0.3 * unit),
    ]
    forward = np.eye(3)
    for step in steps:
        forward = step @ forward
    return values, forward


def test_all_geometry_in_the_paper_order():
    x = faces(2)
    values, forward = composed()
    check_warp(x, draw(x, **values), forward)


def test_difference_from_padding_first():
    """NVIDIA's way gives the same up to MARGIN outside the image, and nearly the same beyond."""
    image, size = faces(1, size=32)[0, 0].numpy(), 32
    near = np.linalg.inv(translation(1.5, 0) @ rotation(0.1))
    np.testing.assert_array_equal(reference_warp(image, near, math.inf), reference_warp(image, near))
    far = np.linalg.inv(translation(size / 2, 0) @ rotation(0.5))
    difference = reference_warp(image, far, math.inf) - reference_warp(image, far)
    assert 0 < np.sqrt((difference**2).mean()) < 0.02


def reference_colour(x, brightness=0.0, contrast=1.0, flip=False, hue=0.0, saturation=1.0):
    """One step after the other, on x [N, 3, S, S]."""
    grey = np.ones(3) / math.sqrt(3)
    projector, eye = np.outer(grey, grey), np.eye(3)
    cross = np.array([[0, -grey[2], grey[1]], [grey[2], 0, -grey[0]], [-grey[1], grey[0], 0]])
    turn = projector + math.cos(hue) * (eye - projector) + math.sin(hue) * cross  # Rodrigues
    pixels = np.moveaxis(x.numpy(), 1, -1) + brightness
    pixels = pixels * contrast
    pixels = pixels @ (eye - 2 * projector * flip).T
    pixels = pixels @ turn.T
    pixels = pixels @ (projector + saturation * (eye - projector)).T
    return torch.from_numpy(np.moveaxis(pixels, -1, 1))


@pytest.mark.parametrize(
    "values,expected",
    [
        (dict(brightness=gauss(1.5)), dict(brightness=0.3)),
        (dict(contrast=gauss(-1.2)), dict(contrast=2**-0.6)),
        (dict(lumaflip=0.8), dict(flip=True)),
        (dict(lumaflip=0.2), dict()),
        (dict(hue=0.8), dict(hue=0.6 * math.pi)),
        (dict(saturation=gauss(0.7)), dict(saturation=2**0.7)),
        (
            dict(brightness=gauss(1), contrast=gauss(0.5), lumaflip=0.6, hue=0.1, saturation=gauss(-1)),
            dict(brightness=0.2, contrast=2**0.25, flip=True, hue=-0.8 * math.pi, saturation=0.5),
        ),
    ],
    ids=["brightness", "contrast", "lumaflip", "no lumaflip", "hue", "saturation", "all"],
)
def test_colour(values, expected):
    x = faces(2)
    torch.testing.assert_close(draw(x, **values), reference_colour(x, **expected), atol=2e-5, rtol=0)


def test_colour_invariants():
    x = faces(2)
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for values in (dict(hue=0.7), dict(saturation=0.9)):
        torch.testing.assert_close(draw(grey, **values), grey, atol=1e-6, rtol=0)
        torch.testing.assert_close(draw(x, **values).mean(1), x.mean(1), atol=1e-6, rtol=0)  # luma stays
    shifted = draw(x, brightness=gauss(1))
    torch.testing.assert_close(shifted.mean((1, 2, 3)), x.mean((1, 2, 3)) + 0.2, atol=1e-5, rtol=0)
    flipped = draw(x, lumaflip=0.9)
    torch.testing.assert_close(flipped.mean(1), -x.mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped - flipped.mean(1, True), x - x.mean(1, True), atol=1e-6, rtol=0)  # chroma stays
    torch.testing.assert_close(draw(x, hue=0.7).norm(dim=1), x.norm(dim=1), atol=1e-6, rtol=0)


# Derivatives


@pytest.mark.parametrize("device", DEVICES)
def test_first_and_second_derivatives(device):
    values, _ = composed(5)
    values |= dict(brightness=0.8, contrast=0.7, hue=0.3, saturation=0.6)
    noise = torch.cat([noise_that_draws(**values), noise_that_draws(xflip=0.9, rotate90=0.3, hue=0.2)])
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    x.requires_grad_()

    def cubed(x):  # augment is linear: the cube gives it a second derivative to carry
        return augment(x, 0.5, noise=noise).pow(3)

    assert torch.autograd.gradcheck(cubed, (x,), nondet_tol=1e-10 if device == "cuda" else 0)
    assert torch.autograd.gradgradcheck(cubed, (x,), fast_mode=True, nondet_tol=1e-10 if device == "cuda" else 0)


def test_sampling_is_torch_grid_sample():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    grid = torch.rand(2, 7, 8, 2, dtype=torch.float64) * 6 - 3
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(A._Sample.apply(x, grid, (A.BILINEAR, A.BORDER, True)), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_r1_through_the_augmentation(device):
    """d(R1)/d(weights) through augment equals finite differences."""
    rng = torch.Generator().manual_seed(0)
    x = faces(3, size=8).to(device)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=rng).to(device).requires_grad_()
    noise = torch.rand(3, A.N_NOISE, generator=rng)

    def penalty(weight):
        images = x.detach().requires_grad_()
        logits = F.conv2d(augment(images, 0.9, noise=noise), weight).tanh().sum()
        (gradient,) = torch.autograd.grad(logits, images, create_graph=True)
        return gradient.square().sum()

    (analytic,) = torch.autograd.grad(penalty(weight), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=rng).to(device)
    step = 1e-6
    numeric = (penalty(weight + step * direction) - penalty(weight - step * direction)) / (2 * step)
    torch.testing.assert_close((analytic * direction).sum(), numeric.detach(), rtol=1e-6, atol=1e-8)
