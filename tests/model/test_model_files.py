"""model.py: generators read from files of ours and of others, and what is refused."""

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from straight import meta

from common.checkpoint import CheckpointError, fingerprint, save_checkpoint, save_safetensors
from common.cli import UserError
from common.generator_file import export_ema, infer_config, read_generator
from model import Discriminator, Generator, GeneratorConfig, load_generator


def published_checkpoint(config):
    """A checkpoint as TransStyleGAN's train.py writes it: five state dicts and nothing else."""
    g, g_ema, d = Generator(config), Generator(config), Discriminator(config)
    return {
        "g": g.state_dict(),
        "d": d.state_dict(),
        "g_ema": g_ema.state_dict(),
        "g_optim": torch.optim.Adam(g.parameters()).state_dict(),
        "d_optim": torch.optim.Adam(d.parameters()).state_dict(),
    }, g_ema


def assert_same_network(loaded, original):
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    z = original.draw_z(2)
    with torch.no_grad():
        expected, found = original(z, randomize_noise=False)[0], loaded(z, randomize_noise=False)[0]
    assert torch.allclose(expected, found, atol=1e-6)


@pytest.mark.parametrize("w_space", [False, True])
@pytest.mark.parametrize("kind", ["own", "published", "bare", "parallel", "wrapped"])
def test_load_generator_from_checkpoints(kind, w_space, tmp_path, tiny_config):
    config = GeneratorConfig(**{**tiny_config.to_dict(), "w_space": w_space})
    state, g_ema = published_checkpoint(config)
    if kind == "own":
        state |= {"config": config.to_dict(), "step": 3}
    if kind == "bare":
        state = g_ema.state_dict()
    if kind == "parallel":  # saved from DataParallel
        state = {"g_ema": {f"module.{name}": tensor for name, tensor in g_ema.state_dict().items()}}
    if kind == "wrapped":
        state = {"state_dict": g_ema.state_dict(), "epoch": 3}
    path = tmp_path / "230000 ü.pt"
    torch.save(state, path)
    loaded = load_generator(path)
    assert loaded.config == config and loaded.config.space == ("w" if w_space else "w++")
    assert_same_network(loaded, g_ema)
    assert len(loaded.fingerprint) == 16


@pytest.mark.parametrize("size, multiplier, channel_max", [(64, 2, 512), (64, 1, 512), (64, 0.5, 24), (8, 2, 5)])
def test_architecture_is_inferred_from_the_tensors(size, multiplier, channel_max):
    config = GeneratorConfig(size, 16, 3, False, multiplier, channel_max)
    found = infer_config(meta(lambda: Generator(config)).state_dict())
    assert [found.channels(2**r) for r in range(2, 1 + int(math.log2(size)))] == [
        config.channels(2**r) for r in range(2, 1 + int(math.log2(size)))
    ]
    assert (found.size, found.style_dim, found.n_mlp, found.w_space) == (size, 16, 3, False)


@pytest.mark.parametrize("base, channel_max, widths", [(256, 24, [24, 24, 16, 8, 4]), (64, 512, [16, 8, 4, 2, 1])])
def test_widths_by_resolution(base, channel_max, widths):
    """channel_base / resolution, as in NVIDIA's implementation, at most channel_max; read back from the tensors."""
    config = GeneratorConfig(64, 16, 1, channel_max=channel_max, channel_base=base)
    assert config.widths == widths
    assert infer_config(meta(lambda: Generator(config)).state_dict()).widths == widths
    state = meta(lambda: Discriminator(config)).state_dict()
    assert state["convs.0.0.weight"].shape[0] == widths[-1] and state["final_conv.0.weight"].shape[1] == widths[0] + 1
    with pytest.raises(ValueError, match="channel_base must be from 0 to"):
        GeneratorConfig(channel_base=-1)


@pytest.mark.parametrize("size", [256, 1024])
def test_published_architectures_are_inferred(size):
    for w_space in (False, True):
        for multiplier in (1, 2):
            config = GeneratorConfig(size, w_space=w_space, channel_multiplier=multiplier)
            assert infer_config(meta(lambda c=config: Generator(c)).state_dict()) == config


def test_load_generator_from_rosinality(tmp_path, tiny_w_config):
    """rosinality's files have no `token`; converted ones have `latent_avg` beside g_ema."""
    generator = Generator(tiny_w_config)
    state = {name: tensor for name, tensor in generator.state_dict().items() if name != "token"}
    torch.save({"g_ema": state, "latent_avg": torch.zeros(32)}, tmp_path / "550000.pt")
    assert_same_network(load_generator(tmp_path / "550000.pt"), generator)


def test_w_has_no_token_in_files_and_takes_those_that_have(tmp_path, tiny_w_config):
    """rosinality's strict load refuses the name; latents keep the fingerprint of files written with it."""
    generator = Generator(tiny_w_config)
    older = {"token": torch.eye(6), **generator.state_dict()}
    assert "token" not in generator.state_dict() and generator.token.shape == (6, 6)
    for name, state in (("older", older), ("newer", generator.state_dict())):
        torch.save({"g_ema": state}, tmp_path / f"{name}.pt")
        assert load_generator(tmp_path / f"{name}.pt").fingerprint == fingerprint(older)
        generator.load_state_dict(state)
    with pytest.raises(RuntimeError, match="other"):
        generator.load_state_dict({**older, "other": torch.zeros(1)})


def test_load_generator_from_safetensors(tmp_path, tiny_config):
    generator = Generator(GeneratorConfig(**{**tiny_config.to_dict(), "lr_mlp": 0.1}))
    metadata = {"config": generator.config.to_dict(), "step": 7}
    save_safetensors(tmp_path / "g.safetensors", generator.state_dict(), metadata)
    loaded = load_generator(tmp_path / "g.safetensors", "cpu")
    assert loaded.config.lr_mlp == 0.1, "what the tensors cannot tell comes from the header"
    assert_same_network(loaded, generator)
    save_checkpoint(tmp_path / "g.pt", {"g_ema": generator.state_dict(), "config": generator.config.to_dict()})
    assert load_generator(tmp_path / "g.pt").fingerprint == loaded.fingerprint


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def bad_files(folder, config):
    """Files that are no generator, each with what the refusal must say."""
    good, _ = published_checkpoint(config)
    torch.save(good["d"], folder / "discriminator.pt")
    yield "discriminator.pt", "generator"
    torch.save({"state_dict": {"encoder.input_layer.0.weight": torch.zeros(2)}, "opts": {}}, folder / "psp.pt")
    yield "psp.pt", "generator"
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    yield "linear.pt", "generator"
    torch.save({"g_ema": "not tensors"}, folder / "words.pt")
    yield "words.pt", "generator"
    torch.save({"g_ema": {**good["g_ema"], "note": "text"}}, folder / "mixed.pt")
    yield "mixed.pt", "note"
    other = {name: tensor for name, tensor in good["g_ema"].items() if name != "to_rgbs.0.bias"}
    torch.save({"g_ema": other, "config": config.to_dict()}, folder / "lacking.pt")
    yield "lacking.pt", "to_rgbs.0.bias is absent"
    torch.save({"g_ema": {**good["g_ema"], "extra": torch.zeros(1)}}, folder / "extra.pt")
    yield "extra.pt", "extra is unknown"
    torch.save({"g_ema": good["g_ema"], "config": {**config.to_dict(), "style_dim": 48}}, folder / "config.pt")
    yield "config.pt", "config says style_dim 48, its tensors have 32"
    for name, value in (("n_mlp", 10**9), ("size", 64), ("w_space", True), ("lr_mlp", "0.01"), ("n_mlp", 2.0)):
        torch.save({"g_ema": good["g_ema"], "config": {**config.to_dict(), name: value}}, folder / f"{name}-{value}.pt")
        yield f"{name}-{value}.pt", name
    torch.save({"g_ema": good["g_ema"], "config": [1]}, folder / "list.pt")
    yield "list.pt", "`config` is a list"
    torch.save({"g": good["g"], "d": good["d"]}, folder / "unaveraged.pt")
    yield "unaveraged.pt", "holds `g`, `d`, but no `g_ema`"
    wide = {**good["g_ema"], "style.1.mlp.0.weight": torch.zeros(1).expand(32, 1 << 20)}
    torch.save({"g_ema": wide}, folder / "wide.pt")
    yield "wide.pt", "claim more numbers than are in the file"
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    yield "bomb.pt", "claims more than its"
    os.mkfifo(folder / "pipe.pt")
    yield "pipe.pt", "a device or a pipe"
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    yield "zero.safetensors", "a device or a pipe"
    save_safetensors(folder / "base.safetensors", {"x": torch.zeros(1)}, {"base": {"file": 3}})
    yield "base.safetensors", "does not name a file"
    save_safetensors(folder / "deep.safetensors", good["g_ema"], {"config": {"size": 10**400}})
    yield "deep.safetensors", "`config` is a|size"
    torch.save({"g_ema": good["g_ema"], "config": {**config.to_dict(), "later": 1}}, folder / "newer.pt")
    yield "newer.pt", "later"
    widths = {**good["g_ema"], "convs.2.conv.weight": torch.zeros(1, 11, 8, 3, 3)}
    torch.save({"g_ema": widths}, folder / "widths.pt")
    yield "widths.pt", "widths|expected"
    (folder / "page.pt").write_text("<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    yield "page.pt", "web page"
    (folder / "evil.pt").write_bytes(pickle.dumps({"g_ema": RunsCode(folder / "was run")}))
    yield "evil.pt", "refused|not a PyTorch"
    torch.save({"g_ema": RunsCode(folder / "was run")}, folder / "evil2.pt")
    yield "evil2.pt", "could run code"
    (folder / "short.pt").write_bytes((folder / "extra.pt").read_bytes()[:5000])
    yield "short.pt", "truncated"
    (folder / "empty.pt").touch()
    yield "empty.pt", "empty"
    (folder / "g.safetensors").write_bytes(b"nonsense")
    yield "g.safetensors", "not a safetensors"
    (folder / "folder.pt").mkdir()
    yield "folder.pt", "folder"


def test_what_load_generator_refuses(tmp_path, tiny_config):
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_generator(tmp_path / "absent.pt")
    for name, words in bad_files(tmp_path, tiny_config):
        with pytest.raises((CheckpointError, UserError), match=words) as refusal:
            load_generator(tmp_path / name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value).strip(), str(refusal.value)
    assert not (tmp_path / "was run").exists()


def exported(config, folder, **options):
    torch.manual_seed(0)
    generator = Generator(config)
    path = folder / "face.safetensors"
    export_ema({"g_ema": generator.state_dict(), "config": config.to_dict()}, path, **options)
    return path, generator


def test_settings_and_statistics_come_with_the_file(tmp_path, tiny_config):
    settings = {"projector": {"step": 300, "init": "mean"}, "generate": {"truncation": 0.7}}
    mean, std = torch.ones(1, 6, 32), torch.arange(6.0)
    path, generator = exported(tiny_config, tmp_path, recommended=settings, statistics=(mean, std, 500))
    loaded = load_generator(path, dtype=torch.bfloat16)
    assert (loaded.recommended, loaded.path, loaded.compute_dtype) == (settings, path, torch.bfloat16)
    assert_same_network(load_generator(path), generator)
    found = loaded.latent_statistics(500)
    assert torch.equal(found[0], mean) and torch.equal(found[1], std), "stored ones are read, not computed"
    assert not torch.allclose(loaded.latent_statistics(501)[0], mean), "more samples than the file's: computed"
    assert read_generator(path)[0].keys() == generator.state_dict().keys(), "training starts from weights alone"
    bare, _ = exported(tiny_config, tmp_path)
    assert load_generator(bare).recommended == {} and load_generator(bare).statistics is None


def test_a_flipped_bit_is_refused(tmp_path, tiny_config):
    """In any weight, and in the stored statistics."""
    path, _ = exported(tiny_config, tmp_path, statistics=(torch.ones(1, 6, 32), torch.ones(6), 500))
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    entries = {name: entry for name, entry in json.loads(whole[8:header]).items() if name != "__metadata__"}
    for name in ("convs.1.conv.weight", "style.1.mlp.0.bias", "noises.noise_2", "latent_mean"):
        damaged = bytearray(whole)
        damaged[header + entries[name]["data_offsets"][0] + 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="face.safetensors is damaged"):
            load_generator(path)
