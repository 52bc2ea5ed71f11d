"""Grids and curves of inversions, and a result of one image on disk."""

import numpy as np
from PIL import Image

from common.grids import comparison_grid, difference_map, plot_curves
from inversion.report import load_result, save_result


def test_difference_map_and_grid():
    a = np.full((16, 16, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0], b[1, 1] = (90, 100, 255), (0, 0, 0)
    difference = difference_map(a, b)
    assert difference[0, 0].tolist() == [20, 0, 255] and difference[1, 1].tolist() == [200] * 3
    assert not difference[2:].any()
    grid = comparison_grid([a, a], [b, a], ["ü one", "a very long name that has to be cut.png"])
    assert grid.width == 2 * 128 + 2 and grid.height > 3 * 128


def test_curves_are_drawn(tmp_path):
    """Images that end early, zeros and nothing at all on a log scale; the mean is red."""
    curves = {"perceptual": np.geomspace(1, 0.1, 20)[None].repeat(3, 0), "mse": np.zeros((3, 20))}
    curves["perceptual"][1, 10:] = np.nan
    plot_curves(curves, 10, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape[1] == 840 and (pixels[:, :420] == (178, 34, 34)).all(-1).any()
    plot_curves({"noise": np.full((1, 1), np.nan)}, 10, tmp_path / "nothing.png")
    assert Image.open(tmp_path / "nothing.png").width == 420


def test_result_of_an_image(tmp_path):
    result = {
        "latents": np.ones((4, 8), np.float32),
        "noise": [np.zeros((1, 4, 4), np.float32), np.ones((1, 8, 8), np.float32)],
        "curves": {name: np.arange(3.0) for name in ("perceptual", "noise", "mse")},
        "measures": {"perceptual": 0.5, "mse": 0.25, "psnr": 12.0, "ssim": 0.5},
        "steps": 30,
        "condition": [0.5, 1.0],
        "digest": "ab",
    }
    path = tmp_path / "a b" / "ü.npz"
    save_result(path, result)
    loaded = load_result(path)
    assert {name: loaded[name] for name in ("measures", "steps", "condition", "digest")} == {
        name: result[name] for name in ("measures", "steps", "condition", "digest")
    }
    assert all((one == other).all() for one, other in zip(loaded["noise"], result["noise"], strict=True))
    assert (loaded["latents"] == 1).all() and loaded["curves"]["mse"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:300])
    assert load_result(path) is None and load_result(tmp_path / "absent.npz") is None
