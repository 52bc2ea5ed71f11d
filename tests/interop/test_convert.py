"""convert.py: NVIDIA's pickles are read without running anything in them, the networks compute what NVIDIA's compute,
and every file that comes out is one that the other scripts read.

The pickles here are written with stand-ins for NVIDIA's modules, which have the names, the layout and none of the code.
With $WPP_PEER_NVIDIA, a checkout of NVlabs/stylegan3 or NVlabs/stylegan2-ada-pytorch, NVIDIA's own code writes them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from converting import change, command
from nvidia_standins import (
    PEER,
    Module,
    convolution,
    drawing,
    expected_image,
    expected_logits,
    expected_w,
    new_nvidia_discriminator,
    new_nvidia_generator,
    snapshot,
    tensors_of,
)

import generate
from common.checkpoint import load_checkpoint, load_safetensors, load_strictly, save_checkpoint
from common.cli import run
from common.distributed import Distributed
from common.images import read_image
from model import Discriminator, Generator, GeneratorConfig, load_generator
from training.resume import init_from, read_checkpoint
from training.trainer import Trainer, TrainSettings


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), (found - expected).abs().max()


def networks_in(path):
    state = load_checkpoint(path)
    config = GeneratorConfig.from_dict(state["config"])
    made = {"g": Generator(config), "g_ema": Generator(config), "d": Discriminator(config)}
    for name in made.keys() & state.keys():
        token = {"token": made[name].token} if name != "d" else {}
        load_strictly(made[name], token | state[name], name)
    return made, state


@pytest.mark.parametrize(
    ("size", "n_mlp", "widths", "protocol"),
    [(16, 2, None, 3), (16, 2, None, 5), (64, 8, {4: 8, 8: 8, 16: 8, 32: 8, 64: 4}, 4)],
)
def test_networks_compute_what_nvidias_compute(size, n_mlp, widths, protocol, nvidia, tmp_path, capsys):
    draw = drawing(1)
    data = snapshot(
        G=new_nvidia_generator(draw, size, 16, n_mlp, widths),
        D=new_nvidia_discriminator(draw, size, widths),
        G_ema=new_nvidia_generator(draw, size, 16, n_mlp, widths),
    )
    out = tmp_path / "a ü.pt"
    assert command(nvidia("a.pkl", data, protocol), out) == 0, capsys.readouterr().err
    made, state = networks_in(out)
    assert not capsys.readouterr().out.count("note:")
    config = made["g"].config
    assert (config.size, config.n_mlp, config.w_space, config.lr_mlp) == (size, n_mlp, True, 0.02)
    z = drawing(2)(3, 16)
    for theirs, ours in (("G", "g"), ("G_ema", "g_ema")):
        t = tensors_of(data[theirs])
        w = expected_w(t, z)
        with torch.no_grad():
            images, latents = made[ours](z, randomize_noise=False)
        assert_close(latents[:, 0], w)
        assert_close(images, torch.cat([expected_image(t, row) for row in w]))
    images = drawing(3)(3, 3, size, size)
    assert_close(made["d"](images).detach(), expected_logits(tensors_of(data["D"]), images))
    assert torch.equal(state["latent_avg"], data["G_ema"].at("mapping").buffers["w_avg"])
    assert "token" not in state["g_ema"], "rosinality's strict load would refuse it"


def test_what_the_other_scripts_make_of_it(nvidia, tmp_path, capsys):
    """generate.py draws with both files, a training starts from the checkpoint, and the check tells their image."""
    data = snapshot()
    path = nvidia("a.pkl", data)
    assert (
        command(path, tmp_path / "a.pt") == 0
        and command(path, tmp_path / "a.safetensors", "--seed", "7", "--image", tmp_path / "seven.png") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    w = expected_w(tensors_of(data["G_ema"]), torch.from_numpy(np.random.RandomState(7).randn(1, 16)))
    image = expected_image(tensors_of(data["G_ema"]), w[0])
    assert f"seed 7 with the stored noise: mean {image.mean():.4f}, std {image.std():.4f}" in lines[3]
    seven = np.asarray(read_image(tmp_path / "seven.png")).astype(int)
    assert np.abs(seven - ((image[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()).max() < 0.51
    first, second = load_generator(tmp_path / "a.pt"), load_generator(tmp_path / "a.safetensors")
    assert first.fingerprint == second.fingerprint and first.fingerprint in lines[0]
    assert load_safetensors(tmp_path / "a.safetensors")[1]["fingerprint"] == first.fingerprint
    flags = ["--ckpt", str(tmp_path / "a.pt"), "--seeds", "0", "--output_dir", str(tmp_path / "drawn")]
    assert run(generate.main, generate.build_parser(), flags) == 0 and (tmp_path / "drawn/seed0000.png").is_file()
    trainer = Trainer(first.config, TrainSettings(batch=4), Distributed(0, 1, torch.device("cpu")))
    init_from(trainer, read_checkpoint(tmp_path / "a.pt", continues=False))
    made, _ = networks_in(tmp_path / "a.pt")
    for own, name in ((trainer.g, "g"), (trainer.g_ema, "g_ema"), (trainer.d, "d")):
        assert all(torch.equal(value, made[name].state_dict()[key]) for key, value in own.state_dict().items())


def test_differences_are_told(nvidia, tmp_path, capsys, monkeypatch):
    """Frozen layers are buffers; a clamp, 16 bits and other groups of the minibatch statistic are said."""
    discriminator = new_nvidia_discriminator(drawing(), group=8)
    frozen = discriminator.at("b16.fromrgb")
    frozen.buffers |= {name: frozen.parameters.pop(name) for name in ("weight", "bias")}
    data = snapshot(D=discriminator)
    data["G_ema"].at("synthesis.b16").attributes["use_fp16"] = True
    data["G_ema"].at("synthesis.b8.conv1").attributes["conv_clamp"] = 256
    assert command(nvidia("a.pkl", data), tmp_path / "a.pt") == 0
    out = capsys.readouterr().out
    assert "+-256" in out and "16 bits" in out and "groups of 8 images, ours of at most 4" in out
    made, _ = networks_in(tmp_path / "a.pt")
    images = drawing(3)(8, 3, 16, 16)
    monkeypatch.setattr("model.STDDEV_GROUP", 8)
    assert_close(made["d"](images).detach(), expected_logits(tensors_of(discriminator), images))


REFUSED = {
    "conditional on 5 labels": lambda data: change(data["G_ema"], "", c_dim=5),
    "architecture 'orig'": lambda data: change(data["G_ema"], "synthesis.b8", architecture="orig"),
    "StyleGAN3 network": lambda data: data["G_ema"].put("synthesis.input", Module("SynthesisInput")),
    "expected a Generator": lambda data: data.update(G_ema=data["D"]),
    "1 channels": lambda data: change(data["G_ema"], "", img_channels=1),
    "12 px": lambda data: change(data["G_ema"], "", img_resolution=12),
    "activation 'relu' in mapping.fc0": lambda data: change(data["G_ema"], "mapping.fc0", activation="relu"),
    "activation 'tanh' in b4.conv": lambda data: change(data["D"], "b4.conv", activation="tanh"),
    "lr_multiplier 0.1 in b4.fc": lambda data: change(data["D"], "b4.fc", bias_gain=0.1),
    "different lr_multiplier": lambda data: change(data["G_ema"], "mapping.fc1", bias_gain=0.1),
    "another filter": lambda data: data["G"].at("synthesis.b16").buffers.update(resample_filter=torch.ones(4, 4) / 16),
    "[16, 64] numbers": lambda data: data["G_ema"].at("mapping.fc0").parameters.update(weight=torch.ones(16, 64)),
    "mbstd_num_channels": lambda data: change(data["D"], "b4.mbstd", num_channels=0),
    "no synthesis.b8.conv0.noise_strength": lambda data: (
        data["G_ema"].at("synthesis.b8.conv0").parameters.pop("noise_strength")
    ),
    "has synthesis.b8.skip.weight": lambda data: data["G_ema"].put(
        "synthesis.b8.skip", convolution(8, 8, 1, drawing(), activation="linear")
    ),
    "follow no channel_max": lambda data: data.update(
        G_ema=new_nvidia_generator(drawing(), widths={4: 8, 8: 4, 16: 8})
    ),
    "convs.0.conv.weight is [1, 8, 8, 5, 5]": lambda data: (
        data["G_ema"].at("synthesis.b8.conv0").parameters.update(weight=torch.ones(8, 8, 5, 5))
    ),
    "no G_ema": lambda data: data.pop("G_ema"),
    "none of the networks": lambda data: [data.pop(name) for name in ("G", "D", "G_ema")],
    "expected NVIDIA's dictionary": lambda data: 7,
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_networks_are_refused_in_words(said, nvidia, tmp_path, capsys):
    data = snapshot()
    if REFUSED[said](data) == 7:
        data = 7
    assert command(nvidia("a.pkl", data), tmp_path / "a.pt") == 1
    message = capsys.readouterr().err
    assert said in message and "a.pkl" in message and message.count("\n") == 1
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("w_space", [False, True])
def test_our_checkpoint_to_either_file_and_back(w_space, tiny_config, tiny_w_config, tmp_path):
    config = tiny_w_config if w_space else tiny_config
    g, g_ema, d = Generator(config), Generator(config), Discriminator(config)
    state = {name: network.state_dict() for name, network in (("g", g), ("g_ema", g_ema), ("d", d))}
    run = {"step": 7, "sampler": {"position": 112, "seed": 0, "n": 9}, "options": {"noise": "none", "lr": 0.1}}
    save_checkpoint(tmp_path / "in.pt", state | run | {"config": config.to_dict(), "g_optim": {"state": {}}})
    for target in ("a.pt", "a.safetensors"):
        assert command(tmp_path / "in.pt", tmp_path / target) == 0
    assert command(tmp_path / "a.safetensors", tmp_path / "b.pt") == 0
    fingerprint = load_generator(tmp_path / "in.pt").fingerprint
    for name in ("a.pt", "a.safetensors", "b.pt"):
        assert load_generator(tmp_path / name).fingerprint == fingerprint
    written, again = load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "b.pt")
    known = {"step": 7, "images": 112, "noise": "none"}
    assert set(written) == {"g", "d", "g_ema", "config", *known} and set(again) == {"g_ema", "config", *known}
    assert ("token" in written["g"]) is not w_space
    for name, network in (("g", g), ("d", d)):
        own = network.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in written[name].items())
    for described in (written, again, load_safetensors(tmp_path / "a.safetensors")[1]):
        assert {name: described[name] for name in known} == known


def test_rosinalitys_file(tiny_w_config, tmp_path):
    """No config, no token buffer, names of DataParallel; latent_avg, which upstream pSp reads, is kept."""
    network = Generator(tiny_w_config)
    state = {name: value for name, value in network.state_dict().items() if name != "token"}
    wrapped = {f"module.{name}": value for name, value in state.items()}
    save_checkpoint(tmp_path / "550000.pt", {"g_ema": state, "g": wrapped, "latent_avg": torch.arange(32.0)})
    assert command(tmp_path / "550000.pt", tmp_path / "b.pt") == 0
    written = load_checkpoint(tmp_path / "b.pt")
    assert torch.equal(written["latent_avg"], torch.arange(32.0)) and set(written["g_ema"]) == set(state)
    assert set(written["g"]) == set(state)
    assert command(tmp_path / "550000.pt", tmp_path / "b.safetensors", "--half") == 0
    halved, full = load_generator(tmp_path / "b.safetensors"), load_generator(tmp_path / "b.pt")
    assert halved.fingerprint != full.fingerprint
    assert torch.equal(halved.input.input, full.input.input.half().float())


def test_a_broken_network_is_told(tiny_w_config, tmp_path, capsys):
    network = Generator(tiny_w_config)
    network.state_dict()["conv1.conv.weight"].fill_(float("nan"))
    save_checkpoint(tmp_path / "a.pt", {"g_ema": network.state_dict()})
    assert command(tmp_path / "a.pt", tmp_path / "b.pt") == 1 and "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        (["IN", "out.onnx"], 2, ".safetensors"),
        (["IN", "out.pt", "--half"], 2, "--half"),
        (["IN", "IN"], 2, "same file"),
        (["IN", "out.safetensors", "--stylegan_weights", "g.pt", "--base", "b.safetensors"], 2, "--base is for gen"),
        (["IN", "out.safetensors", "--stylegan_weights", "g.pt", "--image", "i.png"], 2, "--image is for gen"),
        (["IN", "out.pt", "--seed", "-1"], 2, "--seed"),
        (["absent ü.pkl", "out.pt"], 1, "absent ü.pkl"),
        (["absent.pt", "out.pt"], 1, "absent.pt"),
    ],
)
def test_misuse_and_absent_files(flags, status, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.pt").touch()
    assert command(*("in.pt" if flag == "IN" else flag for flag in flags)) == status
    assert word in capsys.readouterr().err and not Path("out.pt").exists()


def test_recommended_settings_are_stored_and_kept(tmp_path, tiny_config, capsys):
    """In 16 bits too, whose fingerprint stays; with the statistics of w."""
    network = Generator(tiny_config)
    save_checkpoint(tmp_path / "in.pt", {"g_ema": network.state_dict(), "config": tiny_config.to_dict()})
    assert command(tmp_path / "in.pt", tmp_path / "half.safetensors", "--half") == 0
    settings = {"projector": {"step": 300}, "generate": {"truncation": 0.7, "noise": "none"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    flags = ("--recommended", tmp_path / "settings.json")
    assert command(tmp_path / "half.safetensors", tmp_path / "with.safetensors", *flags) == 0
    assert command(tmp_path / "with.safetensors", tmp_path / "again.safetensors") == 0
    half, again = load_generator(tmp_path / "half.safetensors"), load_generator(tmp_path / "again.safetensors")
    assert again.recommended == settings and half.recommended == {}
    assert again.fingerprint == half.fingerprint
    assert {t.dtype for n, t in load_safetensors(tmp_path / "again.safetensors")[0].items() if "latent" not in n} == {
        torch.float16
    }
    stored, half.statistics = again.latent_statistics(), None
    for found, expected in zip(stored, half.latent_statistics(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    for text, word in (("[1]", "flags per script"), ('{"projector": 3}', "flags per script"), ("{", "not JSON")):
        (tmp_path / "settings.json").write_text(text)
        assert command(tmp_path / "half.safetensors", tmp_path / "no.safetensors", *flags) == 1
        assert word in capsys.readouterr().err and not (tmp_path / "no.safetensors").exists()


def test_nvidias_own_code_computes_the_same(tmp_path):
    peer = os.environ.get("WPP_PEER_NVIDIA")
    if not peer:
        pytest.skip("WPP_PEER_NVIDIA names no checkout of NVlabs/stylegan3 or NVlabs/stylegan2-ada-pytorch")
    environment = os.environ | {"PYTHONPATH": peer, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PEER, str(tmp_path / "peer")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    expected = torch.load(tmp_path / "peer.pt", weights_only=True)
    assert command(tmp_path / "peer.pkl", tmp_path / "ours.pt") == 0
    made, state = networks_in(tmp_path / "ours.pt")
    with torch.no_grad():
        images, latents = made["g_ema"](expected["z"], randomize_noise=False)
        half_way, _ = made["g_ema"](
            expected["z"], randomize_noise=False, truncation=0.5, truncation_latent=state["latent_avg"]
        )
        assert_close(latents, expected["w"])
        assert_close(images, expected["images"])
        assert_close(half_way, expected["truncated"])
        assert_close(made["d"](expected["images"]), expected["logits"])
