"""metrics.manifold: precision, recall, density, coverage against the `prdc` package and float64, block by block."""

import contextlib
import io

import numpy as np
import pytest
import torch

from metrics import manifold
from metrics.manifold import compute_prdc


def gaussians(n, m, dim, seed=0, shift=0.1, scale=0.9):
    draw = np.random.default_rng(seed)
    real = draw.standard_normal((n, dim), dtype=np.float32)
    return real, (draw.standard_normal((m, dim)) * scale + shift).astype(np.float32)


def package(real, fake, k):
    prdc = pytest.importorskip("prdc", reason="the package prdc (requirements-dev.txt) is not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        return {name: float(value) for name, value in prdc.compute_prdc(real, fake, k).items()}


def by_definition(real, fake, k):
    """The definitions in float64, on whole matrices."""

    def distances(a, b):
        return np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1)).astype(np.float32)

    real_radii = np.sort(distances(real, real), axis=1)[:, k]
    fake_radii = np.sort(distances(fake, fake), axis=1)[:, k]
    cross = distances(real, fake)
    inside = cross < real_radii[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (cross < fake_radii).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("dim, k, seed", [(64, 5, 0), (64, 3, 1), (8, 5, 2)])
def test_agrees_with_the_package(dim, k, seed):
    real, fake = gaussians(2000, 2000, dim, seed)
    ours = compute_prdc(real, fake, nearest_k=k)
    assert ours == pytest.approx(package(real, fake, k), abs=1e-3)
    assert all(0 < value for value in ours.values()) and len(set(ours.values())) == 4


def test_agrees_with_the_package_on_rectified_features_of_unequal_counts():
    real, fake = (np.maximum(part, 0) for part in gaussians(700, 450, 256, seed=3))
    assert compute_prdc(real, fake, nearest_k=4) == pytest.approx(package(real, fake, 4), abs=1e-3)


def test_real_and_fake_do_not_commute():
    """A swap anywhere would give another result: each of the four numbers tells the sides apart."""
    real, fake = gaussians(600, 500, 8, shift=0.5, scale=0.6)
    straight, swapped = compute_prdc(real, fake, nearest_k=3), compute_prdc(fake, real, nearest_k=3)
    assert all(abs(straight[name] - swapped[name]) > 0.05 for name in straight)
    assert (straight["precision"], straight["recall"]) == (swapped["recall"], swapped["precision"])
    assert straight["precision"] > 0.95 and straight["recall"] < 0.5  # narrow fakes amid wide reals
    assert straight["density"] > 1  # not capped


def test_by_hand():
    """Reals at 0, 1, 3 and 10 of a line, k = 1: radii 1, 1, 2, 7. Fakes at 2, 2.5 and 50: radii .5, .5, 47.5."""
    real, fake = np.array([[0], [1], [3], [10]], np.float32), np.array([[2], [2.5], [50]], np.float32)
    # strictly inside: fake 2 only of real 3 (real 1 and its radius 1 touch it); 2.5 of real 3; both of none else,
    # since |10 - 2.5| > 7. Ball of fake 50 reaches down to 2.5: holds 3 and 10.
    expected = {"precision": 2 / 3, "recall": 0.5, "density": 2 / 3, "coverage": 0.25}
    assert compute_prdc(real, fake, nearest_k=1) == pytest.approx(expected)


@pytest.mark.parametrize("block, entries", [(17, 700), (64, 5000), (2048, 1 << 20)])
def test_block_sizes_change_nothing(block, entries, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", block)
    monkeypatch.setattr(manifold, "ENTRIES", entries)
    real, fake = gaussians(160, 130, 24, seed=5)
    assert compute_prdc(real, fake, nearest_k=5) == pytest.approx(by_definition(real, fake, 5), abs=1e-9)


def test_tight_clusters_are_resolved():
    """Two clusters a thousand times farther apart than they are wide: float32 products would confuse neighbours."""

    def clusters(n, seed):
        centres = np.where(np.arange(n)[:, None] % 2, 100.0, -100.0)
        return (centres + np.random.default_rng(seed).standard_normal((n, 16)) * 0.1).astype(np.float32)

    real, fake = clusters(120, 0), clusters(90, 1)
    assert compute_prdc(real, fake, nearest_k=3) == pytest.approx(by_definition(real, fake, 3), abs=1e-9)


def test_duplicates():
    """Repeated points: radii of zero hold nothing, and a set equals itself but for the strict comparison."""
    real, fake = gaussians(60, 60, 64)
    repeated = np.repeat(real[:10], 20, axis=0)
    assert compute_prdc(repeated, fake, nearest_k=3) == pytest.approx(by_definition(repeated, fake, 3))
    assert compute_prdc(repeated, fake, nearest_k=3)["coverage"] == 0
    assert compute_prdc(repeated, repeated, nearest_k=3)["precision"] == 0
    assert compute_prdc(real, real, nearest_k=3) == pytest.approx(by_definition(real, real, 3))
    assert compute_prdc(real, np.tile(fake[:1], (60, 1)), nearest_k=3)["recall"] == 0


def test_arrays_and_tensors_give_floats_and_stay():
    real, fake = gaussians(50, 40, 8)
    copies = real.copy(), fake.copy()
    expected = compute_prdc(real, fake, nearest_k=2)
    assert compute_prdc(torch.from_numpy(real), torch.from_numpy(fake), nearest_k=2) == expected
    assert compute_prdc(real.astype(np.float64), fake, nearest_k=2) == expected
    assert {type(value) for value in expected.values()} == {float}
    assert (real == copies[0]).all() and (fake == copies[1]).all()


def test_refusals():
    real, fake = gaussians(20, 20, 4)
    with pytest.raises(ValueError, match="nearest_k 5: expected at least 1 and fewer than the 5 real points"):
        compute_prdc(real[:5], fake, nearest_k=5)
    with pytest.raises(ValueError, match="fewer than the 4 fake points"):
        compute_prdc(real, fake[:4], nearest_k=5)
    with pytest.raises(ValueError, match="nearest_k 0"):
        compute_prdc(real, fake, nearest_k=0)
    with pytest.raises(ValueError, match=r"shape \[20\]"):
        compute_prdc(real[:, 0], fake, nearest_k=2)
    with pytest.raises(ValueError, match="real features have 4 dimensions, fake ones 3"):
        compute_prdc(real, fake[:, :3], nearest_k=2)
    for bad in (np.nan, np.inf):
        broken = fake.copy()
        broken[7, 2] = bad
        with pytest.raises(ValueError, match="fake features have values that are not finite"):
            compute_prdc(real, broken, nearest_k=2)


def test_memory_is_bounded(monkeypatch):
    """No tensor of N x N entries is ever made; what is made grows with N as the radii do, not faster."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n_entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.n_entries = max(self.n_entries, tensor.numel())
            return result

    monkeypatch.setattr(manifold, "BLOCK", 256)
    monkeypatch.setattr(manifold, "ENTRIES", 20_000)
    for n in (300, 900):
        with Largest() as seen:
            compute_prdc(*gaussians(n, n, 4, seed=10), nearest_k=3)
        assert 10_000 < seen.n_entries <= 20_000


@pytest.mark.gpu
def test_cuda_gives_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    real, fake = gaussians(1500, 1200, 128, seed=7)
    on_cpu = compute_prdc(real, fake, nearest_k=5)
    assert compute_prdc(real, fake, nearest_k=5, device="cuda") == pytest.approx(on_cpu, abs=1e-3)
