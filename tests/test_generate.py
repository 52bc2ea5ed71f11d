"""generate.py and rendering.py: a picture depends on its seed and code alone, and every file gives it back exactly."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import rendering
from common.checkpoint import fingerprint, load_safetensors, save_checkpoint
from common.cli import flags_without_help, run
from common.distributed import Distributed
from common.latents import draw_z, load_latents, save_latents
from common.runs import Run
from model import Generator, GeneratorConfig, load_generator
from rendering import (
    file_names,
    loop_position,
    map_latents,
    mix,
    noise_at,
    noise_maps,
    render,
    seed_source,
    seeded_z,
    slerp,
)
from snapshots import Outputs
from training import Trainer, TrainSettings

TINY = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 8}


def new_generator(**changes):
    """Random weights, with noise that is strong enough to see."""
    torch.manual_seed(3)
    network = Generator(GeneratorConfig(**{**TINY, **changes})).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("noise.weight"):
            parameter.fill_(0.3)
        elif "to_rgb" in name and name.endswith("conv.weight"):
            parameter.mul_(0.2)  # most values inside [-1, 1]: clamped ones would hide differences
    network.fingerprint = fingerprint(network.state_dict())
    return network


def write_ckpt(path, network):
    """As train.py writes it: g_ema beside g, which differs."""
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    state = {"g": other, "g_ema": network.state_dict(), "config": network.config.to_dict(), "step": 7}
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module", params=["w++", "w"])
def generator(request):
    return new_generator(w_space=request.param == "w")


@pytest.fixture(scope="module")
def ckpt(generator, tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("ckpt ü") / "000007.pt", generator)


@pytest.fixture(scope="module")
def wpp_ckpt(tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("wpp") / "000007.pt", new_generator())


def command(*args):
    return run(generate.main, generate.build_parser(), [str(arg) for arg in args])


def pictures(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def seed_pictures(generator, seeds, batch=8, noise="const", truncation=1.0, noise_seed=0):
    mean = generator.mean_latent(100) if truncation != 1 else None
    source = seed_source(generator, seeds, truncation=truncation, mean=mean, noise=noise, noise_seed=noise_seed,
                         batch=batch)  # fmt: skip
    return np.stack(list(render(generator, source.codes(range(len(seeds))), noise=source.noise, batch=batch)))


# -- the same seed, the same picture -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["const", "random", "none"])
def test_batch_and_company_change_nothing(generator, noise):
    together = seed_pictures(generator, [4, 0, 9, 5, 2, 7, 1, 3], 8, noise, 0.7)
    assert together.dtype == np.uint8 and together.shape == (8, 16, 16, 3)
    for batch in (1, 3):
        assert np.array_equal(together, seed_pictures(generator, [4, 0, 9, 5, 2, 7, 1, 3], batch, noise, 0.7))
    assert np.array_equal(together[2:3], seed_pictures(generator, [9], 8, noise, 0.7))
    assert len({picture.tobytes() for picture in together}) == 8


@pytest.mark.parametrize("w_space", [False, True])
def test_batch_changes_no_bit_at_full_width(w_space):
    """512 channels of style: where the matrix products of a batch do sum in another order than those of one row."""
    network = new_generator(size=32, style_dim=512, channel_max=64, w_space=w_space)
    one, eight = (seed_pictures(network, list(range(8)), batch, "random") for batch in (1, 8))
    assert np.array_equal(one, eight)
    codes = [torch.stack(list(map_latents(network, seeded_z(network, range(8)), batch=batch))) for batch in (1, 8)]
    assert torch.equal(*codes)


def test_picture_is_the_generators_own(generator):
    config = generator.config
    z = draw_z([5], config.n_tokens, config.style_dim, w_space=config.w_space)
    image, _ = generator(z[:, 0] if config.w_space else z, randomize_noise=False)
    expected = ((image[0].double() + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(seed_pictures(generator, [5])[0] - expected).max() < 0.501


def test_noise_modes(generator):
    const, none, random = (seed_pictures(generator, [1, 2], noise=mode) for mode in ("const", "none", "random"))
    other = seed_pictures(generator, [1, 2], noise="random", noise_seed=1)
    assert len({mode.tobytes() for mode in (const, none, random, other)}) == 4
    maps = noise_maps(generator, "random", seeds=[1, 1, 2])([0, 1, 2])
    assert all(torch.equal(layer[0], layer[1]) and not torch.equal(layer[0], layer[2]) for layer in maps)
    z = draw_z([1], 1, 16)[0, 0]  # the noise of a seed is not its z again
    assert not torch.equal(maps[0][0].flatten(), z)
    with pytest.raises(ValueError, match="const, random, none"):
        noise_maps(generator, "loud")


def test_truncation_is_per_token(generator):
    mean = generator.mean_latent(50)
    z = list(seeded_z(generator, [0, 1]))
    w = torch.stack(list(map_latents(generator, z)))
    half = torch.stack(list(map_latents(generator, z, truncation=0.5, mean=mean)))
    assert torch.allclose(half, mean + 0.5 * (w - mean), atol=1e-6)
    zero = torch.stack(list(map_latents(generator, z, truncation=0.0, mean=mean)))
    assert torch.equal(zero, mean.expand_as(zero))
    if not generator.config.w_space:
        assert not torch.equal(mean[:, 0], mean[:, 1])
    with pytest.raises(ValueError, match="mean"):
        list(map_latents(generator, z, truncation=0.5))


def test_render_is_lazy_and_refuses(generator):
    code = next(map_latents(generator, seeded_z(generator, [0])))
    endless = render(generator, iter(lambda: code, None))
    assert np.array_equal(next(endless), next(endless))
    with pytest.raises(ValueError, match="takes codes"):
        next(render(generator, [code[:2]]))
    with pytest.raises(ValueError, match="not finite at picture 2"):
        list(render(generator, [code, code * float("nan")]))


# -- mixing and interpolation --------------------------------------------------------------------------------------


def test_mix_swaps_tokens():
    row, column = torch.zeros(6, 4), torch.ones(6, 4)
    assert mix(row, column, [0, 3]).mean(1).tolist() == [1, 0, 0, 1, 0, 0]
    assert not row.any()


def test_slerp():
    a, b = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    middle = slerp(a, b, 0.5)
    assert torch.allclose(middle.norm(dim=1), (a.norm(dim=1) + b.norm(dim=1)) / 2, rtol=0.05)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)
    assert torch.isfinite(slerp(a, -a, 0.5)).all() and torch.isfinite(slerp(a, torch.zeros_like(a), 0.3)).all()


def test_loop_is_closed():
    assert [loop_position(frame, 3, 2) for frame in range(6)] == [
        (0, 1, 0.0), (0, 1, 0.5), (1, 2, 0.0), (1, 2, 0.5), (2, 0, 0.0), (2, 0, 0.5)
    ]  # fmt: skip


def test_mixing_sheet(ckpt, generator, tmp_path):
    assert command("--ckpt", ckpt, "--mix", "0,1", "5-7", "--mix_layers", "0-1,4", "--noise", "random",
                   "--output_dir", tmp_path) == 0  # fmt: skip
    sheet = np.asarray(Image.open(tmp_path / "mix.png"))
    cell = {(r, c): sheet[18 * r : 18 * r + 16, 18 * c : 18 * c + 16] for r in range(3) for c in range(4)}
    assert sheet.shape == (3 * 18 - 2, 4 * 18 - 2, 3) and (cell[0, 0] == 255).all()
    seeds = [0, 1, 5, 6, 7]
    alone = dict(zip(seeds, seed_pictures(generator, seeds, noise="random"), strict=True))
    margin = {0: cell[1, 0], 1: cell[2, 0], 5: cell[0, 1], 6: cell[0, 2], 7: cell[0, 3]}
    assert all(np.array_equal(margin[seed], alone[seed]) for seed in seeds)
    w = dict(zip(seeds, map_latents(generator, seeded_z(generator, seeds)), strict=True))
    noise = noise_maps(generator, "random", seeds=[1])
    (expected,) = render(generator, [mix(w[1], w[6], [0, 1, 4])], noise=noise)
    assert np.array_equal(cell[2, 2], expected)
    assert sheet.tobytes() == rendering.mixing_sheet(
        [alone[0], alone[1]], [alone[5], alone[6], alone[7]], [cell[r, c] for r in (1, 2) for c in (1, 2, 3)]
    ).tobytes()


@pytest.mark.parametrize("way", ["w", "z"])
@pytest.mark.parametrize("noise", ["const", "random"])
def test_video_passes_every_seed(ckpt, generator, tmp_path, monkeypatch, way, noise):
    """At each point stands exactly that seed's picture, between them another."""
    seen = {}
    monkeypatch.setattr(generate, "save_video", lambda frames, path, fps: seen.update(frames=list(frames), fps=fps))
    assert command("--ckpt", ckpt, "--seeds", "3-5", "--interpolate", way, "--frames", 4, "--fps", 12, "--batch", 3,
                   "--noise", noise, "--video", tmp_path / "a.gif") == 0  # fmt: skip
    assert len(seen["frames"]) == 12 and seen["fps"] == 12
    assert np.array_equal(np.stack(seen["frames"][::4]), seed_pictures(generator, [3, 4, 5], noise=noise))
    assert len({frame.tobytes() for frame in seen["frames"]}) == 12


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_video_files(wpp_ckpt, tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg", reason="mp4 needs imageio[ffmpeg]")
    path = tmp_path / f"loop ü{suffix}"
    assert command("--ckpt", wpp_ckpt, "--seeds", "0-1", "--interpolate", "--frames", 3, "--video", path) == 0
    assert path.stat().st_size > 100
    if suffix != ".mp4":
        assert Image.open(path).n_frames == 6


# -- files ---------------------------------------------------------------------------------------------------------


def test_single_files_and_grid(ckpt, generator, tmp_path, capsys):
    assert command("--ckpt", ckpt, "--seeds", "2-4,10", "--trunc", 0.6, "--truncation-mean", 100, "--grid",
                   "--outdir", tmp_path / "ü out") == 0  # fmt: skip
    found = pictures(tmp_path / "ü out")
    assert list(found) == ["grid.png", "seed0002.png", "seed0003.png", "seed0004.png", "seed0010.png"]
    expected = seed_pictures(generator, [2, 3, 4, 10], truncation=0.6)
    assert np.array_equal(np.stack(list(found.values())[1:]), expected)
    assert found["grid.png"].shape == (34, 34, 3) and np.array_equal(found["grid.png"][18:, 18:], expected[3])
    assert "4 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--noise", "random", "--noise_seed", "5"], ["--noise", "none"]])
def test_saved_latents_give_the_same_pictures(ckpt, generator, tmp_path, flags):
    """With the noise they were drawn with, which latents.json records."""
    assert command("--ckpt", ckpt, "--seeds", "3,8,1", "--truncation", 0.5, "--truncation_mean", 50, "--save_latents",
                   "--output_dir", tmp_path / "a", *flags) == 0  # fmt: skip
    saved = load_latents(tmp_path / "a" / "latents", expect_fingerprint=generator.fingerprint)
    assert saved.space == generator.config.space and saved.names == ["seed0003", "seed0008", "seed0001"]
    assert command("--ckpt", ckpt, "--latents", tmp_path / "a" / "latents", "--output_dir", tmp_path / "b") == 0
    before, after = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def saved_projection(generator, folder, **changes):
    """Latents as the projector leaves them: names of photos, and optimised noise maps."""
    names = ["people/ü 1.jpg", "a.png", "a.jpg"]
    codes = torch.stack(list(map_latents(generator, seeded_z(generator, [1, 2, 3]))))
    noise = noise_maps(generator, "random", seeds=[7, 8, 9])([0, 1, 2])
    options = {"names": names, "space": generator.config.space, "size": 16, "fingerprint": generator.fingerprint,
               "noise": noise, **changes}  # fmt: skip
    save_latents(folder, codes, **options)
    return codes, noise


def test_latents_with_saved_noise(ckpt, generator, tmp_path):
    codes, noise = saved_projection(generator, tmp_path / "p")
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--output_dir", tmp_path / "out", "--batch", 2) == 0
    found = pictures(tmp_path / "out")
    assert list(found) == ["a.jpg.png", "a.png.png", "people/ü 1.png"]
    expected = list(render(generator, codes, noise=noise))
    for picture, name in zip(expected, ["people/ü 1.png", "a.png.png", "a.jpg.png"], strict=True):
        assert np.array_equal(found[name], picture)
    (alone,) = render(generator, codes[1:2], noise=noise_at(noise, [1]))
    assert np.array_equal(alone, expected[1])
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--noise", "none", "--output_dir", tmp_path / "q") == 0
    assert not np.array_equal(pictures(tmp_path / "q")["a.jpg.png"], found["a.jpg.png"])


def test_mix_and_loop_of_latents(ckpt, generator, tmp_path, monkeypatch):
    codes, noise = saved_projection(generator, tmp_path / "p")
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--mix", "2", "0-1", "--output_dir", tmp_path) == 0
    sheet = np.asarray(Image.open(tmp_path / "mix.png"))
    (expected,) = render(generator, [mix(codes[2], codes[1], range(4))], noise=noise_at(noise, [2]))
    assert np.array_equal(sheet[18:, 36:], expected)
    seen = []
    monkeypatch.setattr(generate, "save_video", lambda frames, path, fps: seen.extend(frames))
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--interpolate", "--frames", 2) == 0
    assert np.array_equal(np.stack(seen[::2]), np.stack(list(render(generator, codes, noise=noise))))


def test_bare_array(wpp_ckpt, tmp_path):
    np.save(tmp_path / "latent.npy", np.random.RandomState(0).randn(2, 6, 32).astype(np.float32))
    assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / "latent.npy", "--output_dir", tmp_path) == 0
    assert list(pictures(tmp_path)) == ["00000.png", "00001.png"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "0" * 16}, ["0" * 16, "checkpoint given"]),
        ({"space": "w+"}, ["space w+", "expected w++"]),
        ({"noise": [torch.zeros(3, 1, 4, 4)]}, ["noise maps", "the generator takes"]),
    ],
)
def test_other_latents_are_refused(wpp_ckpt, tmp_path, capsys, changes, words):
    saved_projection(load_generator(wpp_ckpt), tmp_path / "p", **changes)
    assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / "p", "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and all(word in error[0] for word in words)
    assert not (tmp_path / "out").exists()


def test_wrong_shape_is_refused(wpp_ckpt, tmp_path, capsys):
    np.save(tmp_path / "latent.npy", np.zeros((2, 14, 512), np.float32))
    assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / "latent.npy") == 1
    error = capsys.readouterr().err
    assert "[14, 512]" in error and "[6, 32]" in error


def test_file_names():
    assert file_names(["a.jpg", "b", "v1.2", "x/y.PNG"]) == ["a", "b", "v1.2", "x/y"]
    assert file_names(["a.jpg", "A.png", "a"]) == ["a.jpg", "A.png", "a"]
    assert file_names(["a", "a", "a"]) == ["a", "a-1", "a-2"]
    assert file_names(["../../etc/x.png", "/etc/y", "C:\\z.png", "..", ""]) == [
        "etc/x", "etc/y", "C_/z", "image", "image-4"
    ]  # fmt: skip


# -- export --------------------------------------------------------------------------------------------------------


def test_export_and_load_back(ckpt, generator, tmp_path, capsys):
    file = tmp_path / "faces.safetensors"
    assert command("--ckpt", ckpt, "--export", file, "--output_dir", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists()  # an export alone renders nothing
    tensors, metadata = load_safetensors(file)
    assert metadata["config"] == generator.config.to_dict() and metadata["step"] == 7
    assert metadata["fingerprint"] == generator.fingerprint == load_generator(file).fingerprint
    assert generator.fingerprint in capsys.readouterr().out
    assert all(torch.equal(tensors[name], tensor) for name, tensor in generator.state_dict().items())
    assert np.array_equal(seed_pictures(load_generator(file), [0, 1]), seed_pictures(generator, [0, 1]))


def test_half_export(ckpt, generator, tmp_path):
    file = tmp_path / "half.safetensors"
    assert command("--ckpt", ckpt, "--export", file, "--half", "--seeds", "0", "--output_dir", tmp_path) == 0
    assert (tmp_path / "seed0000.png").is_file()
    tensors, metadata = load_safetensors(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    loaded = load_generator(file)
    assert metadata["fingerprint"] == loaded.fingerprint != generator.fingerprint
    full, half = seed_pictures(generator, [0, 1, 2]), seed_pictures(loaded, [0, 1, 2])
    assert np.abs(full.astype(int) - half).max() <= 4  # weights 5e-4 apart, values 0..255


def test_old_checkpoints_of_a_training_become_the_same_export(tmp_path, tiny_config):
    """What --keep does while training and what --export does are one; another program's file is left alone."""
    trainer = Trainer(tiny_config, TrainSettings(batch=1), Distributed(0, 0, 1, torch.device("cpu"), None))
    folder = tmp_path / "run" / "checkpoint"
    with Run(tmp_path / "run", {}, use_tensorboard=False) as opened:
        outputs = Outputs(opened, trainer, argparse.Namespace(keep=1, n_sample=1, batch=1, seed=0))
        theirs = {name: trainer.state_dict()[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
        save_checkpoint(folder / "000003.pt", theirs)
        for step in (4, 5):
            outputs.save(trainer.state_dict() | {"step": step})
            if step == 4:
                assert command("--ckpt", folder / "000004.pt", "--export", tmp_path / "a.safetensors") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["000003.pt", "000004.safetensors", "000005.pt"]
    (tensors, header), (others, other) = (
        load_safetensors(path) for path in (folder / "000004.safetensors", tmp_path / "a.safetensors")
    )
    assert header == other and header["step"] == 4 and tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_half_export_refuses_large_weights(tmp_path, capsys):
    network = new_generator()
    network.conv1.conv.weight.mul_(1e6)
    path = write_ckpt(tmp_path / "1.pt", network)
    assert command("--ckpt", path, "--export", tmp_path / "a.safetensors", "--half") == 1
    assert "conv1.conv.weight" in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def test_rosinality_checkpoint(tmp_path):
    """No config, no token buffer: the architecture comes from the tensors."""
    network = new_generator(w_space=True)
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "token"}
    save_checkpoint(tmp_path / "550000.pt", {"g_ema": state})
    assert command("--ckpt", tmp_path / "550000.pt", "--seeds", "4", "--output_dir", tmp_path) == 0
    assert np.array_equal(pictures(tmp_path)["seed0004.png"], seed_pictures(network, [4])[0])


# -- command line --------------------------------------------------------------------------------------------------


def test_every_flag_has_help():
    assert not flags_without_help(generate.build_parser())


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        (["--seeds", "5-2"], 2, "--seeds 5-2"),
        (["--seeds", "0", "--interpolate"], 2, "two seeds"),
        (["--mix", "0", "x"], 2, "--mix x"),
        (["--mix", "0", "1", "--mix_layers", "a"], 2, "--mix_layers a"),
        (["--mix", "0", "1", "--mix_layers", "4-9"], 1, "layers 0-5"),
        (["--mix", "0", "1", "--interpolate"], 2, "--interpolate"),
        (["--mix", "0", "1", "--grid"], 2, "--grid"),
        (["--latents", "x", "--seeds", "1"], 2, "--seeds"),
        (["--latents", "x", "--interpolate", "z"], 2, "z"),
        (["--latents", "absent ü"], 1, "absent ü"),
        (["--video", "a.mp4"], 2, "--interpolate"),
        (["--interpolate", "--video", "a.avi"], 2, ".webp"),
        (["--export", "a.pt"], 2, ".safetensors"),
        (["--half"], 2, "--export"),
        (["--batch", "0"], 2, "--batch"),
        (["--frames", "0", "--interpolate"], 2, "--frames"),
        (["--fps", "0", "--interpolate"], 2, "--fps"),
        (["--truncation", "nan"], 2, "--truncation"),
        (["--noise_seed", "-1"], 2, "--noise_seed"),
        (["--noise", "loud"], 2, "loud"),
        (["--device", "tpu"], 1, "--device tpu"),
    ],
)
def test_mistakes(wpp_ckpt, tmp_path, capsys, flags, status, word):
    assert command("--ckpt", wpp_ckpt, "--output_dir", tmp_path / "out", *flags) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and word in error
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints(tmp_path, capsys):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>quota</html>")
    save_checkpoint(tmp_path / "other.pt", {"weight": torch.zeros(3)})
    for name, word in (("absent.pt", "no such"), ("page.pt", "web page"), ("other.pt", "not a StyleGAN2 generator")):
        assert command("--ckpt", tmp_path / name) == 1
        error = capsys.readouterr().err.strip()
        assert word in error and len(error.splitlines()) == 1
    assert command("--seeds", "0") == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(wpp_ckpt, tmp_path, precision):
    folder = tmp_path / precision
    assert command("--ckpt", wpp_ckpt, "--seeds", "0-1", "--precision", precision, "--output_dir", folder) == 0
    full = seed_pictures(load_generator(wpp_ckpt), [0, 1])
    low = np.stack(list(pictures(folder).values()))
    assert 0 < np.abs(full.astype(int) - low).max() < 24


COMMANDS = (
    "--seeds 0-4 --grid --save_latents --noise random --trunc 0.5 --truncation_mean 20",
    "--mix 0-2 3",
    "--seeds 0-2 --interpolate --frames 3 --batch 2 --video {out}/a.gif",
    "--export {out}/a.safetensors",
)
IN_ONE_GROUP = """
import sys
import generate
from common.cli import run
from common.distributed import setup, shutdown

place = setup("cpu", timeout=240)
generate.setup, generate.shutdown = lambda device: place, lambda: None  # one process group for all commands
for command in sys.argv[1:]:
    assert run(generate.main, generate.build_parser(), command.split("|")) == 0
shutdown()
"""


@pytest.mark.slow
def test_two_processes_share_the_work(wpp_ckpt, root, tmp_path):
    """torchrun, gloo: the same files as one process writes; frames and mixtures in the same order."""
    script = tmp_path / "all.py"
    script.write_text(IN_ONE_GROUP, encoding="utf-8")
    written, commands = {}, {}
    for name in ("one", "two"):
        out = str(tmp_path / name)
        first = ["--ckpt", str(wpp_ckpt), "--output_dir", out, "--device", "cpu"]
        commands[name] = [[*first, *text.replace("{out}", out).split(" ")] for text in COMMANDS]

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    process = subprocess.Popen([*launch, *("|".join(flags) for flags in commands["two"])], text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # their number, too, may change the order of a sum
        assert [command(*flags) for flags in commands["one"]] == [0, 0, 0, 0]
        _, errors = process.communicate(timeout=400)
    finally:
        torch.set_num_threads(threads)
        process.terminate()  # torchrun takes its workers along; a kill would orphan them
    assert process.returncode == 0, errors[-3000:]

    for name in commands:
        folder = tmp_path / name
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        written[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        assert load_generator(folder / "a.safetensors").fingerprint == load_generator(wpp_ckpt).fingerprint
        del written[name]["a.safetensors"]  # whose header lists its entries in any order
    assert len(written["one"]) == 10 and written["one"] == written["two"]
    assert json.loads(written["one"]["latents/latents.json"])["names"][-1] == "seed0004"
