"""generate.py: names, grids, saved latents, and exports."""

import json
import shutil

import numpy as np
import pytest
import torch
from generating import close, command, export, images_in, new_generator, seed_images, write_ckpt
from PIL import Image

from common.checkpoint import CheckpointError, load_safetensors, save_checkpoint
from common.distributed import Distributed
from common.generator_file import STATISTICS
from common.latents import load_latents, save_latents
from common.runs import Run
from model import load_generator
from sampling.render import file_names, map_latents, mix, noise_maps, render, seeded_z, select_noise
from training.loop import save_and_prune
from training.trainer import Trainer, TrainSettings


def test_single_files_and_grid(ckpt, generator, tmp_path, capsys):
    flags = "--seeds 2-4,10 --trunc 0.6 --truncation-mean 100 --grid".split()
    assert command("--ckpt", ckpt, *flags, "--outdir", tmp_path / "ü out") == 0
    found = images_in(tmp_path / "ü out")
    assert list(found) == ["grid.png", "seed0002.png", "seed0003.png", "seed0004.png", "seed0010.png"]
    expected = seed_images(generator, [2, 3, 4, 10], truncation=0.6)
    assert close(np.stack(list(found.values())[1:]), expected)
    assert found["grid.png"].shape == (34, 34, 3) and close(found["grid.png"][18:, 18:], expected[3])
    assert "4 images" in capsys.readouterr().out


@pytest.mark.parametrize("noise", ["", "--noise random --noise_seed 5", "--noise none"])
def test_saved_latents_give_the_same_images(ckpt, generator, tmp_path, noise):
    """With the noise they were drawn with, which latents.json records."""
    flags = f"--seeds 3,8,1 --truncation 0.5 --truncation_mean 50 --save_latents {noise}".split()
    assert command("--ckpt", ckpt, *flags, "--output_dir", tmp_path / "a") == 0
    saved = load_latents(tmp_path / "a" / "latents", expect_fingerprint=generator.fingerprint)
    assert saved.space == generator.config.space and saved.names == ["seed0003", "seed0008", "seed0001"]
    assert command("--ckpt", ckpt, "--latents", tmp_path / "a" / "latents", "--output_dir", tmp_path / "b") == 0
    before, after = images_in(tmp_path / "a"), images_in(tmp_path / "b")
    assert before.keys() == after.keys() and all(close(before[name], after[name]) for name in before)


def test_a_record_of_other_latents_is_refused(wpp_ckpt, tmp_path, capsys):
    flags = "--seeds 1-3 --noise random --save_latents".split()
    assert command("--ckpt", wpp_ckpt, *flags, "--output_dir", tmp_path) == 0
    description = tmp_path / "latents" / "latents.json"
    text = json.dumps(json.loads(description.read_text()) | {"extra": {"rendering": {"seeds": [1], "noise": "random"}}})
    description.write_text(text)
    assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / "latents", "--output_dir", tmp_path / "b") == 1
    assert "3 latents, but 1 seeds in its record" in capsys.readouterr().err


def saved_projection(generator, folder, **changes):
    """Latents as the projector leaves them: names of photos, and optimised noise maps."""
    names = ["people/ü 1.jpg", "a.png", "a.jpg"]
    ws = torch.stack(list(map_latents(generator, seeded_z(generator, [1, 2, 3]))))
    noise = noise_maps(generator, "random", seeds=[7, 8, 9])([0, 1, 2])
    options = {
        "names": names,
        "space": generator.config.space,
        "size": 16,
        "fingerprint": generator.fingerprint,
        "noise": noise,
        **changes,
    }
    save_latents(folder, ws, **options)
    return ws, noise


def test_latents_with_saved_noise(ckpt, generator, tmp_path):
    ws, noise = saved_projection(generator, tmp_path / "p")
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--output_dir", tmp_path / "out", "--batch", 2) == 0
    found = images_in(tmp_path / "out")
    assert list(found) == ["a.jpg.png", "a.png.png", "people/ü 1.png"]
    expected = list(render(generator, ws, noise=noise))
    for image, name in zip(expected, ["people/ü 1.png", "a.png.png", "a.jpg.png"], strict=True):
        assert close(found[name], image)
    (alone,) = render(generator, ws[1:2], noise=select_noise(noise, [1]))
    assert close(alone, expected[1])
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--noise", "none", "--output_dir", tmp_path / "q") == 0
    assert not np.array_equal(images_in(tmp_path / "q")["a.jpg.png"], found["a.jpg.png"])


def test_mix_and_loop_of_latents(ckpt, generator, tmp_path, monkeypatch):
    ws, noise = saved_projection(generator, tmp_path / "p")
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--mix", "2", "0-1", "--output_dir", tmp_path) == 0
    grid = np.asarray(Image.open(tmp_path / "mix.png"))
    (expected,) = render(generator, [mix(ws[2], ws[1], range(4))], noise=select_noise(noise, [2]))
    assert close(grid[18:, 36:], expected)
    seen = []
    monkeypatch.setattr("sampling.output.save_video", lambda frames, path, fps: seen.extend(frames))
    assert command("--ckpt", ckpt, "--latents", tmp_path / "p", "--interpolate", "--frames", 2) == 0
    assert close(np.stack(seen[::2]), np.stack(list(render(generator, ws, noise=noise))))


def test_bare_array(wpp_ckpt, tmp_path):
    np.save(tmp_path / "latent.npy", np.random.RandomState(0).randn(2, 6, 32).astype(np.float32))
    assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / "latent.npy", "--output_dir", tmp_path) == 0
    assert list(images_in(tmp_path)) == ["00000.png", "00001.png"]


def test_projections_of_other_programs(wpp_ckpt, tmp_path):
    generator = load_generator(wpp_ckpt)
    ws = generator.get_latent(torch.randn(2, 6, 32)).detach()
    noise = [torch.randn(2, *layer.shape[1:]) for layer in generator.fixed_noise()]
    torch.save(
        {
            f"faces/{name}.jpg": {"latent": ws[i], "noise": [layer[i : i + 1] for layer in noise]}
            for i, name in enumerate(("anna", "ü b"))
        },
        tmp_path / "project.pt",
    )
    np.savez(tmp_path / "projected_w.npz", w=ws[:1].numpy())
    for file, names, maps in (("project.pt", ["anna", "ü b"], noise), ("projected_w.npz", ["00000"], None)):
        out = tmp_path / f"of {file}"
        assert command("--ckpt", wpp_ckpt, "--latents", tmp_path / file, "--output_dir", out) == 0
        expected = render(generator, ws[: len(names)], noise=maps)
        for name, image in zip(names, expected, strict=True):
            assert close(Image.open(out / f"{name}.png"), image)


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
        "etc/x",
        "etc/y",
        "C_/z",
        "image",
        "image-4",
    ]


def test_export_and_load_back(ckpt, generator, tmp_path, capsys):
    file = tmp_path / "faces.safetensors"
    assert export(ckpt, file) == 0
    tensors, metadata = load_safetensors(file)
    assert metadata["config"] == generator.config.to_dict() and metadata["step"] == 7
    assert metadata["fingerprint"] == generator.fingerprint == load_generator(file).fingerprint
    assert generator.fingerprint in capsys.readouterr().out
    assert all(torch.equal(tensors[name], tensor) for name, tensor in generator.state_dict().items())
    assert np.array_equal(seed_images(load_generator(file), [0, 1]), seed_images(generator, [0, 1]))


def test_half_export(ckpt, generator, tmp_path):
    file = tmp_path / "half.safetensors"
    assert export(ckpt, file, "--half") == 0
    tensors, metadata = load_safetensors(file)
    assert {tensor.dtype for name, tensor in tensors.items() if name not in STATISTICS} == {torch.float16}
    loaded = load_generator(file)
    assert metadata["fingerprint"] == loaded.fingerprint != generator.fingerprint
    full, half = seed_images(generator, [0, 1, 2]), seed_images(loaded, [0, 1, 2])
    assert np.abs(full.astype(int) - half).max() <= 4  # weights 5e-4 apart, values 0..255


def test_a_zero_of_the_other_sign_is_equal_to_that_of_the_base(tmp_path):
    """An average of weights turns -0 into 0: the file reads back, with the base's zero."""
    base, part = tmp_path / "base.safetensors", tmp_path / "part.safetensors"
    for target, zero, flags in ((base, -0.0, []), (part, 0.0, ["--base", base])):
        network = new_generator()
        network.to_rgb1.bias.data.fill_(zero)
        network.conv1.conv.modulation.weight.data.add_(bool(flags))
        assert export(write_ckpt(tmp_path / "1.pt", network), target, "--half", *flags) == 0
    assert list(load_safetensors(part)[0]) == ["conv1.conv.modulation.weight"]
    assert torch.signbit(load_generator(part).to_rgb1.bias).all()


def test_export_beside_its_base(tmp_path, capsys):
    """Equal tensors are left out; the file reads back as a whole one, and without its base says what is missing."""
    base, whole, part = (tmp_path / f"{name}.safetensors" for name in ("base", "whole", "part"))
    network = new_generator()
    assert export(write_ckpt(tmp_path / "1.pt", network), base, "--half") == 0
    network.conv1.conv.modulation.weight.add_(1)
    ckpt = write_ckpt(tmp_path / "2.pt", network)
    assert export(ckpt, whole, "--half") == 0
    assert export(ckpt, part, "--half", "--base", base) == 0
    tensors, metadata = load_safetensors(part)
    assert list(tensors) == ["conv1.conv.modulation.weight"] and metadata["base"]["file"] == "base.safetensors"
    loaded = load_generator(part)
    assert loaded.fingerprint == load_generator(whole).fingerprint == metadata["fingerprint"]
    assert np.array_equal(seed_images(loaded, [0]), seed_images(load_generator(whole), [0]))
    for target, words in ((base, "another export"), (tmp_path / "b" / "x.safetensors", "in the folder of x")):
        before = base.read_bytes()
        assert export(ckpt, target, "--half", "--base", base) == 1
        assert words in capsys.readouterr().err and base.read_bytes() == before
    assert export(whole, tmp_path / "y.safetensors", "--base", part) == 1
    shutil.copy(whole, base)
    with pytest.raises(CheckpointError, match="belongs to a base.safetensors with the fingerprint"):
        load_generator(part)
    base.unlink()
    with pytest.raises(CheckpointError, match="must lie in the same folder"):
        load_generator(part)


def test_old_checkpoints_of_a_training_become_the_same_export(tmp_path, tiny_config):
    """The export of --keep while training and that of convert.py are one; another program's file is left alone."""
    trainer = Trainer(tiny_config, TrainSettings(batch=1), Distributed(0, 1, torch.device("cpu")))
    folder = tmp_path / "run" / "checkpoint"
    with Run(tmp_path / "run", {}) as opened:
        theirs = {name: trainer.state_dict()[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
        save_checkpoint(folder / "000003.pt", theirs)
        for step in (4, 5):
            save_and_prune(opened, trainer.state_dict() | {"step": step}, keep=1)
            if step == 4:
                assert export(folder / "000004.pt", tmp_path / "a.safetensors") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["000003.pt", "000004.safetensors", "000005.pt"]
    (tensors, header), (others, other) = (
        load_safetensors(path) for path in (folder / "000004.safetensors", tmp_path / "a.safetensors")
    )
    assert other.pop("statistics")["samples"] == 10_000 and header == other and header["step"] == 4
    assert others.keys() - tensors.keys() == set(STATISTICS)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_half_export_refuses_large_weights(tmp_path, capsys):
    network = new_generator()
    network.conv1.conv.weight.mul_(1e6)
    path = write_ckpt(tmp_path / "1.pt", network)
    assert export(path, tmp_path / "a.safetensors", "--half") == 1
    assert "conv1.conv.weight" in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def test_rosinality_checkpoint(tmp_path):
    """No config, no token buffer: the architecture comes from the tensors."""
    network = new_generator(w_space=True)
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "token"}
    save_checkpoint(tmp_path / "550000.pt", {"g_ema": state})
    assert command("--ckpt", tmp_path / "550000.pt", "--seeds", "4", "--output_dir", tmp_path) == 0
    assert np.array_equal(images_in(tmp_path)["seed0004.png"], seed_images(network, [4])[0])
