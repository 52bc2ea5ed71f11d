"""--precision and --graphs of the stages behind the training: pictures, inversions and edits with graphs are those
without, through the recorder of test_graphs.py, and low precision stays near float32."""

import functools

import numpy as np
import pytest
import torch
from psp_networks import tiny_net
from small_generator import PixelDistance, make_checkpoint
from test_edit_attribute import ColourScorer
from test_graphs import StandIn

import edit_attribute
import generate
import projector
from common.cli import run
from common.graphs import WARM_UPS, graph_forward
from common.latents import load_latents
from editing.edit import BLOCK, render_codes
from editing.samples import SamplesError, score_samples
from inversion.projection import project
from model import GeneratorConfig, load_generator
from pSp.scripts import inference


class Pixels(PixelDistance):
    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


CONFIG = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(CONFIG, tmp_path_factory.mktemp("generator") / "wpp.pt")


@pytest.fixture
def generator(checkpoint):
    return load_generator(checkpoint)


@pytest.fixture
def recorders(monkeypatch):
    """Those that the scripts ask for, in order."""
    made = []

    def find(graphs, device):
        made.append(StandIn() if graphs == "on" else None)
        return made[-1]

    for script in (generate, edit_attribute, projector, inference):
        monkeypatch.setattr(script, "recorder_for", find)
    monkeypatch.setattr(edit_attribute, "load_scorer", lambda *args, **kwargs: ColourScorer())
    monkeypatch.setattr(projector, "build_perceptual", lambda *args: Pixels())
    return made


def start(script, *flags):
    assert run(script.main, script.build_parser(), [*map(str, flags), "--device", "cpu"]) == 0


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_pictures_inversions_and_edits_with_graphs(checkpoint, recorders, tmp_path):
    """Stages 2b, 3a and 5a by their commands, without and with --graphs on."""
    for graphs in ("off", "on"):
        home, shared = tmp_path / graphs, ("--ckpt", checkpoint, "--graphs", graphs)
        start(generate, *shared, "--seeds", "0-7", "--save_latents", "--output_dir", home / "drawn")
        faces = [home / "drawn" / f"seed{k:04d}.png" for k in range(2)]
        start(
            projector,
            *shared,
            "--dataset",
            *faces,
            "--step",
            8,
            "--mean_samples",
            50,
            "--identity",
            "none",
            "--output_dir",
            home / "inverted",
        )
        start(
            edit_attribute,
            *shared,
            "--latent",
            home / "drawn" / "latents",
            "--num_sample",
            60,
            "--ratio",
            0.1,
            "--steps",
            17,
            "--identity",
            "none",
            "--perceptual",
            "none",
            "--output_dir",
            home / "edited",
        )
    plain, graphed = (files(tmp_path / graphs) for graphs in ("off", "on"))
    assert len(plain) > 100 and plain == graphed
    codes = [load_latents(tmp_path / graphs / "inverted").latents for graphs in ("off", "on")]
    assert np.array_equal(*codes)
    launches = [recorder.launches for recorder in recorders if recorder is not None]
    assert len(launches) == 3 and launches[0] == 8 - WARM_UPS and launches[1] == 8 - WARM_UPS and launches[2] > 8


def test_encoder_with_graphs():
    """Under autocast too, which belongs to the kind of a call."""
    plain, graphed, recorder = tiny_net().eval(), tiny_net().eval(), StandIn()
    graph_forward(graphed.encoder, recorder)
    graph_forward(graphed.decoder, recorder)
    with torch.no_grad():
        for dtype in (None, torch.bfloat16):
            for seed in range(WARM_UPS + 2):
                images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
                found, expected = (net(net.fit(images), randomize_noise=False, dtype=dtype) for net in (graphed, plain))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.recordings == 4 and recorder.launches == 8


# -- precision -----------------------------------------------------------------------------------------------------


def relative(low, full):
    return float((low - full).norm() / full.norm())


def test_frames_and_samples_in_bf16(generator, tmp_path):
    """A sweep stays within 2 % of its contrast, 8-bit pictures and all; scores of both are not mixed."""
    codes = generator.get_latent(generator.draw_z(BLOCK + 1, torch.Generator().manual_seed(0))).numpy()
    frames = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator.compute_dtype = dtype
        rendered = np.stack(list(render_codes(generator, codes, generator.fixed_noise())))
        frames[dtype] = torch.from_numpy(rendered).double() - 127.5
    assert 0 < relative(frames[torch.bfloat16], frames[torch.float32]) < 0.02
    score = functools.partial(score_samples, generator, ColourScorer(), 4, folder=tmp_path / "samples")
    low = score()
    generator.compute_dtype = torch.float32
    with pytest.raises(SamplesError, match="precision bfloat16, now float32"):
        score()
    full = score(folder=tmp_path / "full")
    assert 0 < np.abs(low - full).max() < 0.02 * np.abs(full).max()


def test_encoder_in_bf16():
    net = tiny_net().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, low = (net.encode_images(images, dtype) for dtype in (None, torch.bfloat16))
    assert low.dtype == torch.float32 and 0 < relative(low, full) < 0.02


def test_projection_in_bf16(generator):
    """The loss after a few steps is that of float32 within 2 %."""
    images, _ = generator(generator.draw_z(2, torch.Generator().manual_seed(1)), randomize_noise=False)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        result = project(
            generator,
            images.clamp(-1, 1),
            perceptual=PixelDistance(),
            steps=30,
            dtype=dtype,
            statistics=generator.latent_statistics(100, seed=1),
        )
        losses.append(result.curves["perceptual"][:, -1])
    assert relative(losses[1], losses[0]) < 0.02


@pytest.mark.parametrize("script", [generate, edit_attribute, projector, inference])
def test_flags(script, capsys):
    """Offered everywhere, off by default, refused without CUDA in one line before anything is read."""
    flags = {
        generate: ("--ckpt", "a.pt"),
        edit_attribute: ("--ckpt", "a.pt", "--latent", "b", "--output_dir", "c"),
        projector: ("--ckpt", "a.pt", "--dataset", "b"),
        inference: ("--exp_dir", "a"),
    }[script]
    args = script.build_parser().parse_args(flags)
    assert (args.graphs, args.precision) == ("off", "fp32")
    assert run(script.main, script.build_parser(), [*flags, "--graphs", "on", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: --graphs on needs a CUDA device, this is cpu: leave it out\n"
