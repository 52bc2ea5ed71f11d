"""Tiny generators, a trained encoder, and the command lines of training and inference, for all tests of a module."""

import shutil

import pytest
import torch.nn.functional as F
from psp_commands import PLAIN, start
from psp_networks import FakeIdentity, FakePerceptual, tiny_generator

from common.checkpoint import save_checkpoint
from pSp.scripts import inference as inference_script
from pSp.scripts import train as train_script


@pytest.fixture
def fake_networks(monkeypatch):
    """Small networks in place of those of a training's losses."""
    monkeypatch.setattr("pSp.losses.build_perceptual", lambda *_, **__: FakePerceptual())
    monkeypatch.setattr("pSp.losses.build_identity", lambda *_, **__: FakeIdentity())


class FakeMeasure(FakeIdentity):
    def similarity(self, a, b):
        return F.cosine_similarity(self.embed(a), self.embed(b))


@pytest.fixture(scope="module")
def quick():
    """No paths from outside, no weights and no seconds for SqueezeNet in inference, a mean w of few samples."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WPP_FFHQ", "WPP_CELEBA_TEST", "WPP_CELEBA_TRAIN", "WPP_STYLEGAN"):
            patch.delenv(name, raising=False)
        patch.setattr("perceptual.lpips.build_perceptual", lambda *_, **__: FakePerceptual())
        patch.setattr("perceptual.identity.build_identity", lambda *_, **__: FakeMeasure())
        patch.setattr("pSp.start.MEAN_SAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """{"w++" and "w": file of a tiny 32 px generator}."""
    files = {}
    for w_space in (False, True):
        generator = tiny_generator(w_space=w_space)
        files[generator.config.space] = tmp_path_factory.mktemp("generators") / f"{'w' if w_space else 'wpp'}.pt"
        state = {"g_ema": generator.state_dict(), "config": generator.config.to_dict()}
        save_checkpoint(files[generator.config.space], state)
    return files


@pytest.fixture(scope="module")
def train(quick, generators, face_folder):
    """Status of a training in a folder on the W++ generator and the faces; later flags override the small ones."""

    def train(folder, *flags):
        base = ("--exp_dir", folder, "--stylegan_weights", generators["w++"], "--train_path", face_folder)
        return start(train_script, *base, *PLAIN, *flags)

    return train


@pytest.fixture(scope="module")
def infer(quick, face_folder):
    """Status of an inversion of the faces into a folder, by the encoder that was trained there."""

    def infer(folder, *flags):
        base = ("--exp_dir", folder, "--data_path", face_folder, "--test_workers", 0, "--device", "cpu")
        return start(inference_script, *base, *flags)

    return infer


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The folder of a run of four steps on the W++ generator."""
    folder = tmp_path_factory.mktemp("runs") / "trained ü"
    assert train(folder, "--max_steps", 4, "--save_interval", 2, "--val_interval", 2) == 0
    return folder


@pytest.fixture(scope="module")
def newest(trained):
    return trained / "checkpoints" / "iteration_4.pt"


@pytest.fixture(scope="module")
def best(trained):
    return trained / "checkpoints" / "best_model.pt"


@pytest.fixture(scope="module")
def faces_to_invert(face_folder, tmp_path_factory):
    """Five images, one in a folder, one called like an image but none, and a folder called like an image."""
    folder = tmp_path_factory.mktemp("to invert")
    sources = sorted(p for p in face_folder.rglob("*") if p.is_file())[:5]
    for i, source in enumerate(sources):
        target = folder / ("in/ü 中.png" if i == 4 else f"face {i}.png")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "folder.png").mkdir()
    return folder
