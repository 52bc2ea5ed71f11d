"""projector.py --tune: the same w, nearer to the image; restarts; other settings."""

import json

import pytest
import torch
from projecting import PIXELS, STEPS, results, start
from small_generator import make_checkpoint
from tqdm import tqdm

from common.checkpoint import load_safetensors
from common.distributed import Distributed
from common.images import read_image
from common.latents import load_latents
from inversion import runner
from inversion.inputs import open_images
from inversion.tuning import tunable
from model import GeneratorConfig, load_generator
from perceptual import lpips

pytestmark = pytest.mark.usefixtures("undrawn")

TUNE = 12


@pytest.fixture
def pixels(monkeypatch):
    """Tuning compares pixels, in the place of the features of mobilefacenet, which take longer."""
    build = lpips.build_perceptual
    monkeypatch.setattr(
        lpips, "build_perceptual", lambda name, *rest: PIXELS if name == "mobilefacenet" else build(name, *rest)
    )


def test_tuned_results_are_nearer_at_the_same_w(checkpoint, generator, photos, tmp_path, monkeypatch, pixels):
    bars = []
    monkeypatch.setattr(runner, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    start(checkpoint, photos, tmp_path / "plain", "--batch", 3)
    start(checkpoint, photos, tmp_path / "tuned", "--batch", 3, "--tune", TUNE)
    assert [bar.total for bar in bars] == [2 * STEPS, 2 * STEPS + 5 * TUNE] and all(bar.n == bar.total for bar in bars)
    plain, tuned = (load_latents(tmp_path / name) for name in ("plain", "tuned"))
    assert torch.equal(plain.latents, tuned.latents) and all(map(torch.equal, plain.noise, tuned.noise))
    assert all(after < before for before, after in zip(plain.losses["mse"], tuned.losses["mse"], strict=True))
    for name in ("0", "a b/two  spaces"):
        weights, header = load_safetensors(tmp_path / "tuned" / "tuned" / f"{name}.safetensors")
        assert header["fingerprint"] == generator.fingerprint and set(weights) == set(tunable(generator))
        assert all(weight.dtype == torch.float16 for weight in weights.values())
        assert any((weight - tunable(generator)[key]).abs().max() > 1e-3 for key, weight in weights.items())


def test_a_stopped_run_goes_on(checkpoint, photos, tmp_path, monkeypatch, pixels):
    """The tuned weights come before the result, so that every result has them; a lost result is made again alike."""
    start(checkpoint, photos, tmp_path / "whole", "--tune", 2)
    out, save = tmp_path / "out", runner.save_result

    def killed(path, result):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "save_result", killed)
    start(checkpoint, photos, out, "--tune", 2, expect=130)
    assert (out / "tuned" / "0.safetensors").is_file() and not (out / "inversions" / "0.npz").exists()
    monkeypatch.setattr(runner, "save_result", save)
    start(checkpoint, photos, out, "--tune", 2)
    _, files = results(tmp_path / "whole")
    assert results(out)[1] == files and "tuned/1.safetensors" in files
    (out / "inversions" / "1.npz").unlink()
    (out / "tuned" / "1.safetensors").unlink()
    start(checkpoint, photos, out, "--tune", 2)
    assert results(out)[1] == files


def test_no_tuning_is_as_before(checkpoint, photos, tmp_path, monkeypatch, capsys, pixels):
    """Settings of earlier runs, which know no tuning, fit; with other steps of tuning a folder is begun anew."""
    monkeypatch.setattr(runner, "tune", None)
    start(checkpoint, photos, tmp_path / "out", "--tune", 0)
    assert "tune" not in json.loads((tmp_path / "out" / "inversions" / "settings.json").read_text())
    assert not (tmp_path / "out" / "tuned").exists()
    monkeypatch.undo()
    start(checkpoint, photos, tmp_path / "out", "--tune", 2, expect=1)
    assert "other settings (tune None, now 2)" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "out", "--tune", 2, "--overwrite")
    assert load_latents(tmp_path / "out").extra["settings"]["tune"] == 2 and (tmp_path / "out" / "tuned").is_dir()
    start(checkpoint, photos, tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "tuned").exists()


def test_an_image_that_diverged_is_not_tuned(checkpoint, photos, tmp_path, monkeypatch, pixels):
    project, tune, tuned = runner.project, runner.tune, []

    def diverged(*args, **options):
        result = project(*args, **options)
        result.latents[1, 0, 0] = float("nan")
        return result

    monkeypatch.setattr(runner, "project", diverged)
    monkeypatch.setattr(runner, "tune", lambda *args, **options: tuned.append(1) or tune(*args, **options))
    start(checkpoint, photos, tmp_path / "out", "--tune", 1)
    assert len(tuned) == len(load_latents(tmp_path / "out")) == 4
    assert not (tmp_path / "out" / "tuned" / "1.safetensors").exists()


def test_each_image_is_tuned_under_its_condition(config, photos, tmp_path, monkeypatch):
    config = GeneratorConfig(**config.to_dict() | {"condition_dim": 2})
    generator, tune, given = load_generator(make_checkpoint(config, tmp_path / "cgan.pt")), runner.tune, []
    conditions = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    how = {"dist": Distributed(0, 1, torch.device("cpu")), "settings": {"steps": 2}, "mean_samples": 50, "batch": 2}
    how |= {"perceptual": PIXELS, "recorded": {"attributes": ["smile", "eyes_open"]}}
    how |= {"start": lambda positions, images: {"condition": conditions[list(positions)]}}
    monkeypatch.setattr(runner, "tune", lambda *args, **how: given.append(how["condition"]) or tune(*args, **how))
    tuning = {"steps": 2, "perceptual": PIXELS}
    runner.invert_images(generator, open_images([photos], 16), tmp_path / "out", tuning=tuning, **how)
    assert torch.equal(torch.cat(given), conditions)
    assert read_image(tmp_path / "out" / "project" / "0.png").size == (16, 16)
