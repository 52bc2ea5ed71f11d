"""A generator in W++ and in W, latents of three faces, and a scorer that sees their colours."""

import pytest
import torch
from colour_edits import ColourScorer, PixelIdentity

import editing.fit
import editing.samples
from common.checkpoint import save_checkpoint
from common.latents import save_latents
from model import Generator, GeneratorConfig, load_generator
from sampling.render import map_latents, seeded_z


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(editing.samples, "CHUNK", 60)


@pytest.fixture(autouse=True)
def edit_range(monkeypatch):
    """No range is measured; the function that does, with a small identity network."""
    function = editing.fit.edit_range
    monkeypatch.setattr("editing.fit.edit_range", lambda *_: None)
    monkeypatch.setattr("editing.fit.build_identity", lambda *_: PixelIdentity())
    return function


@pytest.fixture
def scorer(monkeypatch):
    monkeypatch.setattr("scorer.network.load_scorer", lambda *args, **kwargs: ColourScorer())
    return ColourScorer()


@pytest.fixture(scope="module", params=["w++", "w"])
def ckpt(request, tmp_path_factory):
    torch.manual_seed(3)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, w_space=request.param == "w")
    network = Generator(config).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if "to_rgb" in name and name.endswith("conv.weight"):
            parameter.mul_(0.2)
    path = tmp_path_factory.mktemp("ckpt ü") / "000007.pt"
    save_checkpoint(path, {"g_ema": network.state_dict(), "config": config.to_dict(), "step": 7})
    return path


@pytest.fixture(scope="module")
def generator(ckpt):
    return load_generator(ckpt, "cpu")


@pytest.fixture
def latents(generator, tmp_path):
    ws = torch.stack(list(map_latents(generator, seeded_z(generator, [9000, 9001, 9002]))))
    folder = tmp_path / "inverted"
    draw = torch.Generator().manual_seed(1)
    noise = [torch.randn(3, 1, *layer.shape[2:], generator=draw) for layer in generator.fixed_noise()]
    save_latents(
        folder,
        ws,
        names=["a/ü 1.png", "b.png", "c.png"],
        space=generator.config.space,
        size=16,
        fingerprint=generator.fingerprint,
        noise=noise,
    )
    return folder
