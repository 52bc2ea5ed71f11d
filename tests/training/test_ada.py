"""Adaptive augmentation as a whole: who draws what and how often, shapes and types, and the control of p."""

import math

import pytest
import torch
import torch.nn.functional as F

import training.augment as A
from training.augment import BLITS, COLOURS, GEOMETRY, AdaptiveAugment, augment, make_plan


def faces(n=2, size=16, seed=0, **options):
    """Smooth random images in [-1, 1]: [n, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, size // 4 + 1, size // 4 + 1, generator=generator, dtype=torch.float64) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True).to(**options)


def draw_noise(n, seed=0):
    return torch.rand(n, A.N_NOISE, generator=torch.Generator().manual_seed(seed))


# Which and how often


def test_p_zero_is_the_same_tensor_and_draws_nothing():
    x, before = faces(2), torch.get_rng_state()
    assert augment(x, 0.0) is x
    assert AdaptiveAugment()(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_drawn_is_the_identity():
    x = faces(3)
    assert torch.equal(augment(x, 0.5, noise=torch.full((3, A.N_NOISE), 0.9)), x)


def test_images_do_not_depend_on_their_neighbours():
    x = faces(8)
    noise = draw_noise(8, 2)
    together = augment(x, 0.3, noise=noise)
    alone = [augment(x[i : i + 1], 0.3, noise=noise[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


def test_the_global_seed_decides_alone():
    x = faces(6)
    torch.manual_seed(5)
    first, second = augment(x, 0.6), augment(x, 0.6)
    torch.manual_seed(5)
    assert torch.equal(first, augment(x, 0.6)) and torch.equal(second, augment(x, 0.6))
    assert not torch.equal(first, second)


def test_selection():
    x, noise = faces(8), draw_noise(8, 4)
    blits = augment(x, 1.0, noise=noise, transforms=BLITS)
    assert all(set(a.flatten().tolist()) <= set(b.flatten().tolist()) for a, b in zip(blits, x, strict=True))
    only = augment(x, 1.0, noise=noise, transforms=("xflip",))
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(only, x, strict=True))
    assert torch.equal(augment(x, 1.0, noise=noise, transforms=()), x)


@pytest.mark.parametrize("p", [0.25, 0.8])
def test_each_transform_is_drawn_with_probability_p(p):
    n = 20_000
    noise = draw_noise(n, 0)
    error = 5 * math.sqrt(p * (1 - p) / n)
    shares = {"xflip": 1 / 2, "rotate90": 3 / 4, "xint": 1 - 1 / 256, "lumaflip": 1 / 2}  # that change the image
    for name in A.TRANSFORMS:
        plan = make_plan(noise, p, 64, (name,))
        matrices = ((plan.blit, torch.eye(2, 3)), (plan.colour, torch.eye(3, 4)))
        changed = plan.resampled | torch.stack([(m != same).flatten(1).any(1) for m, same in matrices]).any(0)
        expected = p * shares.get(name, 1)  # p_rot: before or after, p in all
        assert changed.double().mean().item() == pytest.approx(expected, abs=error), name


def test_distributions_of_the_parameters():
    n, size = 40_000, 64
    noise = draw_noise(n, 0)

    def plan(name):
        return make_plan(noise, 1.0, size, (name,))

    def spread(values, mean, std):
        assert values.mean().item() == pytest.approx(mean, abs=6 * std / math.sqrt(n))
        assert values.std().item() == pytest.approx(std, rel=0.03)

    spread(plan("scale").geometry[:, 0, 0].log2(), 0, 0.2)
    spread(plan("aniso").geometry[:, 0, 0].log2(), 0, 0.2)
    torch.testing.assert_close(torch.linalg.det(plan("aniso").geometry[:, :, :2]), torch.ones(n))
    for axis in (0, 1):
        spread(plan("xfrac").geometry[:, axis, 2] / size, 0, 0.125)
        shift = plan("xint").blit[:, axis, 2]
        assert shift.abs().max() == 8 and torch.equal(shift, shift.round())
        spread(shift, 0, 16 / math.sqrt(12))
    angle = torch.atan2(plan("rotate").geometry[:, 1, 0], plan("rotate").geometry[:, 0, 0])
    spread(angle, 0, 2 * math.pi / math.sqrt(12))
    assert plan("xflip").blit[:, 0, 0].mean().item() == pytest.approx(0, abs=0.03)
    quarter = plan("rotate90").blit[:, :, :2].flatten(1)
    assert len(quarter.unique(dim=0)) == 4
    spread(plan("brightness").colour[:, 0, 3], 0, 0.2)
    spread(plan("contrast").colour[:, 0, 0].log2(), 0, 0.5)
    grey = torch.ones(3) / math.sqrt(3)
    assert (grey @ (plan("lumaflip").colour[:, :, :3] @ grey).T).mean().item() == pytest.approx(0, abs=0.03)
    colour = torch.tensor([1.0, -1.0, 0.0]) / math.sqrt(2)
    spread((plan("saturation").colour[:, :, :3] @ colour).norm(dim=1).log2(), 0, 1.0)
    turned = plan("hue").colour[:, :, :3] @ colour
    cosine, sine = turned @ colour, turned @ torch.linalg.cross(grey, colour)
    spread(torch.atan2(sine, cosine), 0, 2 * math.pi / math.sqrt(12))


def test_no_draw_can_be_infinite():
    for value in (0.0, 1 - 2**-24):
        noise = torch.full((2, A.N_NOISE), value)
        noise[:, : len(A._DECISIONS)] = 0
        assert augment(faces(2), 0.5, noise=noise).isfinite().all()


def test_expectations_at_p_one():
    constant = torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64).view(1, 3, 1, 1).expand(16, 3, 16, 16)
    torch.manual_seed(0)
    out = augment(constant, 1.0, transforms=BLITS + GEOMETRY)  # no black corners, and the filters keep a flat colour
    torch.testing.assert_close(out, constant, atol=1e-5, rtol=0)
    x = faces(64, seed=1)
    turned = augment(x, 1.0, transforms=("xflip", "rotate90"))
    torch.testing.assert_close(turned.mean((2, 3)), x.mean((2, 3)))
    many = faces(1, size=4, seed=2).expand(20_000, -1, -1, -1)
    mean = augment(many, 1.0, transforms=("brightness",)).mean(0)
    torch.testing.assert_close(mean, many[0], atol=0.01, rtol=0)
    mean = augment(many, 1.0, transforms=COLOURS).mean(0)  # half of them flipped, all hues: no colour is left
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=0.05, rtol=0)


# Shapes, types, surroundings


@pytest.mark.parametrize("size", [4, 5, 16, 32])
@pytest.mark.parametrize("n", [1, 3])
def test_sizes(n, size):
    x = torch.rand(n, 3, size, size) * 2 - 1
    out = augment(x, 0.7, noise=draw_noise(n))
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()


def test_dtype_and_memory_format():
    x, noise = faces(4, dtype=torch.float32), draw_noise(4, 0)
    expected = augment(x, 0.9, noise=noise)
    last = augment(x.contiguous(memory_format=torch.channels_last), 0.9, noise=noise)
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    half = augment(x.bfloat16(), 0.9, noise=noise)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    x, noise = faces(8, size=32, dtype=torch.float32), draw_noise(8, 0)
    expected = augment(x, 0.6, noise=noise)
    # convolutions may run in TF32
    torch.testing.assert_close(augment(x.cuda(), 0.6, noise=noise).cpu(), expected, atol=2e-3, rtol=1e-3)
    ada = AdaptiveAugment(p=0.3, length=80, interval=1, device="cuda")
    ada(x.cuda())
    ada.accumulate(torch.ones(8, 1, device="cuda"))
    ada.update()
    assert ada.p == pytest.approx(0.4)


# Control of p


def test_p_moves_by_images_over_length():
    for sign, start in ((1.0, 0.0), (-1.0, 0.5)):
        ada = AdaptiveAugment(p=start, target=0.6, length=1000, interval=4)
        for step in range(1, 9):
            ada.accumulate(torch.full((16, 1), sign * 3))
            ada.update()
            assert ada.p == pytest.approx(start + sign * (step // 4) * 64 / 1000, abs=1e-15)
        assert ada.r == sign


def test_p_stops_at_its_ends_and_at_the_target():
    ada = AdaptiveAugment(p=0.99, length=100, interval=1)
    ada.accumulate(torch.ones(50))
    ada.update()
    assert ada.p == 1.0
    for _ in range(3):
        ada.accumulate(-torch.ones(50))
        ada.update()
    assert ada.p == 0.0
    ada = AdaptiveAugment(p=0.5, target=0.5, length=100, interval=1)
    ada.accumulate(torch.tensor([1.0, 1.0, 1.0, -1.0]))  # r = 0.5 = target
    ada.update()
    assert ada.p == 0.5
    ada.update()  # no image was counted
    assert ada.p == 0.5


def test_fixed_p():
    ada = AdaptiveAugment(p=0.2, target=None, interval=1)
    ada.accumulate(torch.ones(8, 1))
    ada.update()
    assert ada.p == 0.2


def test_p_follows_the_mean_sign():
    ada = AdaptiveAugment(p=0.5, target=0.6, length=1000, interval=1)
    ada.accumulate(torch.tensor([5.0] * 85 + [-0.1] * 15))  # r = 0.7
    ada.update()
    assert ada.p == pytest.approx(0.6) and ada.r == pytest.approx(0.7)
    ada.accumulate(torch.tensor([5.0] * 75 + [-0.1] * 25))  # r = 0.5
    ada.update()
    assert ada.p == pytest.approx(0.5)


def test_ranks_agree_and_resume(monkeypatch):
    """Two ranks in one process, one after the other, whose sums are averaged as an all-reduce does."""
    logits = torch.randn(6, 2, 8, 1, generator=torch.Generator().manual_seed(0)) + 0.8  # [steps, ranks, batch, 1]

    def group(n):
        return [AdaptiveAugment(p=0.4, length=1000, interval=2, world_size=n) for _ in range(n)]

    (alone,), both = group(1), group(2)
    for step, parts in enumerate(logits):
        alone.accumulate(parts)
        alone.update()
        for ada, part in zip(both, parts, strict=True):
            ada.accumulate(part)
        with monkeypatch.context() as patch:
            mean = sum(ada._sums for ada in both) / 2
            patch.setattr(A, "all_reduce_mean", lambda sums, mean=mean: sums[0].copy_(mean))
            for ada in both:
                ada.update()
            mean = sum(ada._sums for ada in both) / 2
            patch.setattr(A, "all_reduce_mean", lambda sums, mean=mean: sums[0].copy_(mean))
            state = both[0].state_dict()
        assert alone.p == both[0].p == both[1].p and state == alone.state_dict()
        if step == 2:  # between two adjustments: the sums belong to the state
            both = group(2)
            for ada in both:
                ada.load_state_dict(state)


def test_state_round_trip_is_bit_exact(tmp_path):
    def steps(ada, first, last):
        out = []
        for step in range(first, last):
            torch.manual_seed(step)
            out.append(ada(faces(4, seed=step)))
            ada.accumulate(torch.randn(4, 1) + 1)
            ada.update()
        return out, ada.p, ada.r

    ada = AdaptiveAugment(p=0.3, length=77)
    steps(ada, 0, 6)  # 6 is no multiple of the interval
    torch.save(ada.state_dict(), tmp_path / "state.pt")
    images, p, r = steps(ada, 6, 11)
    ada = AdaptiveAugment(length=77)
    ada.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again, p_again, r_again = steps(ada, 6, 11)
    assert (p, r) == (p_again, r_again)
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
