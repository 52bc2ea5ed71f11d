"""metrics.manifold: precision, recall, density, coverage against the `prdc` package and float64, block by block."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch

from metrics.manifold import SPARE, compute_prdc
from metrics.prdc import compute_prdc as published_name


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
        return np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1).astype(np.float32))

    real_radii = np.sort(distances(real, real), axis=1)[:, k]
    fake_radii = np.sort(distances(fake, fake), axis=1)[:, k]
    cross = distances(real, fake)
    inside = cross < real_radii[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (cross < fake_radii).any(1).mean(),
        "density": 1 / k * inside.sum(0).mean(),
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("dim, k, seed", [(64, 5, 0), (64, 3, 1), (8, 5, 2)])
def test_equals_the_package_on_2000_by_2000(dim, k, seed):
    real, fake = gaussians(2000, 2000, dim, seed)
    ours = compute_prdc(real, fake, nearest_k=k)
    assert ours == package(real, fake, k)
    assert all(0 < value for value in ours.values()) and len(set(ours.values())) == 4
    assert published_name is compute_prdc


def test_equals_the_package_on_rectified_features_of_unequal_counts():
    real, fake = (np.maximum(part, 0) for part in gaussians(700, 450, 256, seed=3))
    assert compute_prdc(real, fake, nearest_k=4) == package(real, fake, 4)


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
    found = compute_prdc(real, fake, nearest_k=1)
    # strictly inside: fake 2 only of real 3 (real 1 and its radius 1 touch it); 2.5 of real 3; both of none else,
    # since |10 - 2.5| > 7. Ball of fake 50 reaches down to 2.5: holds 3 and 10.
    assert found == {"precision": 2 / 3, "recall": 0.5, "density": 2 / 3, "coverage": 0.25}


@pytest.mark.parametrize("block", [17, 64, 150, 4096])
def test_block_size_changes_nothing(block):
    real, fake = gaussians(160, 130, 24, seed=5)
    assert compute_prdc(real, fake, nearest_k=5, block=block) == by_definition(real, fake, 5)


def test_threads_change_nothing():
    real, fake = gaussians(300, 300, 100, seed=6)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(compute_prdc(real, fake, nearest_k=5, block=128))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def tight_clusters(n, dim, seed):
    """Two clusters a thousand times farther apart than they are wide: float32 products cannot tell their neighbours."""
    draw = np.random.default_rng(seed)
    centres = np.where(np.arange(n)[:, None] % 2, 100.0, -100.0)
    return (centres + draw.standard_normal((n, dim)) * 0.1).astype(np.float32)


def test_tight_clusters_are_resolved_exactly():
    real, fake = tight_clusters(120, 16, 0), tight_clusters(90, 16, 1)
    for block in (40, 2048):
        assert compute_prdc(real, fake, nearest_k=3, block=block) == by_definition(real, fake, 3)


def test_duplicates():
    """Repeated points: radii of zero hold nothing, and a set equals itself but for the strict comparison."""
    real, fake = gaussians(60, 60, 6)
    repeated = np.repeat(real[:10], SPARE + 12, axis=0)
    assert compute_prdc(repeated, fake, nearest_k=3) == by_definition(repeated, fake, 3)
    assert compute_prdc(repeated, fake, nearest_k=3)["coverage"] == 0
    assert compute_prdc(real, real, nearest_k=3) == by_definition(real, real, 3)
    collapsed = np.tile(fake[:1], (60, 1))
    assert compute_prdc(real, collapsed, nearest_k=3)["recall"] == 0


def test_arrays_tensors_and_types_are_the_same():
    real, fake = gaussians(50, 40, 8)
    expected = compute_prdc(real, fake, nearest_k=2)
    assert compute_prdc(torch.from_numpy(real), torch.from_numpy(fake), nearest_k=2) == expected
    assert compute_prdc(real.astype(np.float64), fake, nearest_k=2) == expected
    assert {type(value) for value in expected.values()} == {float}


def test_the_inputs_and_the_matmul_setting_stay():
    real, fake = gaussians(50, 40, 8)
    copies = real.copy(), fake.copy()
    torch.set_float32_matmul_precision("high")
    try:
        compute_prdc(real, fake, nearest_k=2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (real == copies[0]).all() and (fake == copies[1]).all()


def test_refusals():
    real, fake = gaussians(20, 20, 4)
    with pytest.raises(ValueError, match="nearest_k 5 needs at least 6 real points.* got 5"):
        compute_prdc(real[:5], fake, nearest_k=5)
    with pytest.raises(ValueError, match="at least 6 fake points.* got 4"):
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
        with pytest.raises(ValueError, match="fake features hold values that are not finite"):
            compute_prdc(real, broken, nearest_k=2)


@pytest.mark.parametrize("order", ["as it is", "near ones last"])
def test_neighbours_found_in_later_blocks(order):
    """Blocks are merged by what is nearer than so far: first neighbours that are all replaced, and many at once."""
    real, fake = gaussians(240, 100, 4, seed=8)
    if order == "near ones last":  # shells, from the outermost inwards: every later block is nearer than all before
        real = real[np.argsort(-np.linalg.norm(real, axis=1))]
    for block in (20, 128):
        assert compute_prdc(real, fake, nearest_k=5, block=block) == by_definition(real, fake, 5)


def test_portions_of_pairs_change_nothing(monkeypatch):
    """Tiles of which nearly all pairs count are looked at in portions."""
    real, fake = gaussians(150, 150, 3, scale=0.2)
    expected = by_definition(real, fake, 60)
    assert compute_prdc(real, fake, nearest_k=60) == expected
    monkeypatch.setattr("metrics.manifold.PAIRS", 100)
    assert compute_prdc(real, fake, nearest_k=60, block=64) == expected


def test_features_in_mapped_files(tmp_path):
    """As large sets come: read-only pages of a file. No warning, no copy, the file stays as it is."""
    sides = gaussians(200, 150, 16, seed=9)
    for name, values in zip("rf", sides, strict=True):
        np.save(tmp_path / f"{name}.npy", values)
    before = (tmp_path / "r.npy").read_bytes()
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "rf"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_prdc(*mapped, nearest_k=5) == compute_prdc(*sides, nearest_k=5)
    assert (tmp_path / "r.npy").read_bytes() == before


def test_working_memory_does_not_grow_with_the_points(monkeypatch):
    """Whatever N: two blocks, one tile, and pairs in portions. No tensor of N x N, or of N x D, is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self, *given):
            super().__init__()
            self.given, self.n_bytes = {tensor.untyped_storage().data_ptr() for tensor in given}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                    self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
            return result

    dim, block = 40, 64
    monkeypatch.setattr("metrics.manifold.BLOCK", block)
    monkeypatch.setattr("metrics.manifold.PAIRS", 2048)
    monkeypatch.setattr("metrics.manifold.CACHED_BYTES", 8 * dim * block)
    for n in (300, 600):
        features = [torch.from_numpy(side) for side in gaussians(n, n, dim, seed=10)]
        with Largest(*features) as seen:
            compute_prdc(*features, nearest_k=3, block=block)
        neighbours = n * (3 + 1 + SPARE) * 8  # kept, of every point: int64; all that grows
        assert max(2 * block * dim * 4, block * block * 4) <= seen.n_bytes <= max(neighbours, 4 * 2048 * 8)
        assert seen.n_bytes < min(n * dim * 4, n * n * 4 / 5)


@pytest.mark.gpu
def test_cuda_gives_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the tiles run on the CPU only")
    real, fake = gaussians(1500, 1200, 128, seed=7)
    on_cpu = compute_prdc(real, fake, nearest_k=5)
    assert compute_prdc(real, fake, nearest_k=5, device="cuda") == on_cpu
    assert compute_prdc(real, fake, nearest_k=5, device="cuda", block=500) == on_cpu
