"""metrics/path_length.py and ppl.py: closed forms on a linear generator, any batch size, spaces, and the script."""

import numpy as np
import pytest
import torch
from linear_generator import Linear, squared
from processes import launch

from common.cli import run
from common.generator_file import export_ema
from metrics import ppl
from metrics.flags import PathSettings
from metrics.path_length import crop_and_shrink, path_lengths, trimmed_mean
from metrics.protocol import read_records
from model import Generator


def test_straight_in_w(tiny_config):
    """Linear: (d image / epsilon)² = |M (w2 - w1)|², anywhere on the path; the mean is |M|² * 18 per entry."""
    generator = Linear(tiny_config)
    full = path_lengths(generator, squared, "w++", PathSettings(n_sample=200))
    end = path_lengths(generator, squared, "w++", PathSettings(n_sample=200, sampling="end"))
    np.testing.assert_allclose(full, end, rtol=0.05)
    expected = float(generator.matrix.square().sum()) * 2 * 9  # variance of 3 z2 - 3 z1
    assert full.mean() == pytest.approx(expected, rel=0.05)
    smaller = path_lengths(generator, squared, "w++", PathSettings(n_sample=200, epsilon=1e-2))
    np.testing.assert_allclose(smaller, full, rtol=0.05)


def test_spherical_in_z(tiny_config):
    """The path turns by the angle between the ends (about a right angle) at constant length: (pi/2)² 9 |M|² in all."""
    generator = Linear(tiny_config)
    lengths = path_lengths(generator, squared, "z", PathSettings(n_sample=200))
    expected = float(generator.matrix.square().sum()) * 9 * (np.pi / 2) ** 2
    assert lengths.mean() == pytest.approx(expected, rel=0.1)


def test_batch_and_seed(tiny_config):
    torch.manual_seed(0)
    generator = Generator(tiny_config).eval()
    some = path_lengths(generator, squared, "w++", PathSettings(n_sample=6, batch=4))
    np.testing.assert_allclose(
        path_lengths(generator, squared, "w++", PathSettings(n_sample=6, batch=1)), some, rtol=0.02
    )
    np.testing.assert_allclose(path_lengths(generator, squared, "w++", PathSettings(n_sample=3)), some[:3], rtol=0.02)
    assert np.abs(path_lengths(generator, squared, "w++", PathSettings(n_sample=6, seed=1)) / some - 1).max() > 0.1
    assert (some > 0).all()


def test_w_space(tiny_w_config):
    generator = Generator(tiny_w_config).eval()
    for space in ("z", "w"):
        assert path_lengths(generator, squared, space, PathSettings(n_sample=3)).shape == (3,)
    with pytest.raises(ValueError, match=r"--space w\+\+: this generator has z and w$"):
        path_lengths(generator, squared, "w++", PathSettings(n_sample=3))


def test_crop_and_size(tiny_config):
    sizes = []

    def distance(a, b):
        sizes.append(tuple(a.shape[2:]))
        return squared(a, b)

    path_lengths(Linear(tiny_config), distance, "z", PathSettings(n_sample=2, crop=True))
    assert sizes == [(8, 8)]
    assert crop_and_shrink(torch.zeros(1, 3, 1024, 1024), False).shape == (1, 3, 256, 256)
    assert crop_and_shrink(torch.zeros(1, 3, 1024, 1024), True).shape == (1, 3, 256, 256)


def test_diverged_generator(tiny_config):
    generator = Linear(tiny_config)
    generator.matrix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="path length 0 is not finite"):
        path_lengths(generator, squared, "z", PathSettings(n_sample=2))


def test_trimmed_mean():
    values = np.arange(1.0, 201.0)
    values[-1] = 1e9
    mean, std = trimmed_mean(np.random.default_rng(0).permutation(values))
    kept = np.arange(2.0, 200.0)  # numpy: the 1st percentile is 2.99, lower 2; the 99th 198.01, higher 199
    assert mean == pytest.approx(kept.mean()) and std == pytest.approx(kept.std())


WORKER = """
import sys, torch
sys.path.insert(0, "tests/metrics")
from common import distributed as d
from linear_generator import Linear, squared
from metrics.flags import PathSettings
from metrics.path_length import path_lengths
from model import GeneratorConfig
dist = d.setup("cpu", timeout=60)
generator = Linear(GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8))
print(path_lengths(generator, squared, "w++", PathSettings(n_sample=5), dist).round(3).tolist())
d.shutdown()
"""


def test_two_ranks(tiny_config):
    first, second = launch(WORKER, 2)
    expected = path_lengths(Linear(tiny_config), squared, "w++", PathSettings(n_sample=5))
    assert first == second
    np.testing.assert_allclose(eval(first), expected, rtol=0.05)


def test_script(tmp_path, capfd):
    from common import weights
    from model import GeneratorConfig

    if weights.find("squeezenet1_1_features") is None:
        pytest.skip("no squeezenet1_1_features.pth for LPIPS: set WPP_WEIGHTS to a folder that holds it")
    config = GeneratorConfig(size=32, style_dim=32, n_mlp=2, channel_max=8)
    generator = Generator(config)
    ckpt = tmp_path / "000050.safetensors"
    export_ema({"g_ema": generator.state_dict(), "config": config.to_dict(), "step": 50}, ckpt)
    flags = ["--ckpt", str(ckpt), "--output", str(tmp_path / "m.jsonl")]
    flags += "--perceptual squeeze --n_sample 6 --device cpu".split()
    assert run(ppl.main, ppl.build_parser(), flags) == 0
    assert run(ppl.main, ppl.build_parser(), [*flags, "--space", "z", "--crop", "--sampling", "end"]) == 1
    captured = capfd.readouterr()
    assert "ppl-w++-squeeze" in captured.out and "error: lpips-squeeze needs images of at least" in captured.err
    assert run(ppl.main, ppl.build_parser(), [*flags, "--space", "z", "--sampling", "end"]) == 0
    first, second = read_records(tmp_path / "m.jsonl")
    assert (first["metric"], second["metric"], first["step"]) == ("ppl-w++-squeeze", "ppl-z-squeeze", 50)
    assert first["value"] > 0 and first["protocol"]["epsilon"] == 1e-4 and first["fake"]["fingerprint"]
    assert second["protocol"]["name"] == "end" and first["extractor"] == {"name": "lpips-squeeze"}
    assert run(ppl.main, ppl.build_parser(), [*flags, "--space", "w"]) == 1
    assert "this generator has z and w++" in capfd.readouterr().err
    assert run(ppl.main, ppl.build_parser(), [*flags, "--n_sample", "1"]) == 2
