"""The network around the encoder: spaces, average code, files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from psp_networks import LIGHT, tiny_generator, tiny_net

from common.checkpoint import CheckpointError, save_checkpoint, save_safetensors
from common.generator_file import generator_fingerprint
from pSp.encoders import E4E, GRADUAL, INTO_W, INTO_W_PLUS, EncoderConfig
from pSp.psp import export_encoder, load_psp, pSp, psp_state

# -- the network around ---------------------------------------------------------------------------------------------


def test_spaces_and_ws():
    images = torch.randn(2, 3, 32, 32)
    net = tiny_net().eval()
    assert net.space == "w++" and net.latent_avg.shape == (1, 8, 32)
    assert torch.equal(net.encode(images), net.encoder(images) + net.latent_avg)
    assert torch.equal(tiny_net(start_from_latent_avg=False).eval().encode(images), net.encoder(images))
    plus = tiny_net(generator=tiny_generator(w_space=True)).eval()
    assert plus.space == "w+"
    single = tiny_net(INTO_W).eval()
    ws = single.encode(images)
    assert single.space == "w" and ws.shape == (2, 8, 32)
    assert torch.equal(ws, ws[:, :1].expand(-1, 8, -1))


def test_wrong_pairs_are_refused():
    with pytest.raises(ValueError, match="needs a W generator, this one is W\\+\\+"):
        tiny_net(INTO_W, tiny_generator())
    generator = tiny_generator()
    with pytest.raises(ValueError, match="14 tokens of width 512.*32 px.*8 of 32"):
        pSp(EncoderConfig(**LIGHT), generator, generator.mean_latent(10))
    with pytest.raises(ValueError, match=r"latent_avg \[1, 5, 32\] does not fit"):
        pSp(EncoderConfig.for_generator(generator.config, **LIGHT), generator, torch.zeros(1, 5, 32))


def test_latent_avg_is_a_buffer_outside_the_state_dict():
    net = tiny_net()
    assert "latent_avg" in dict(net.named_buffers())
    assert {name.partition(".")[0] for name in net.state_dict()} == {"encoder", "decoder"}
    assert net.double().latent_avg.dtype == torch.float64  # moves with the module


def test_face_pool_shrinks_and_never_enlarges():
    net = tiny_net(generator=tiny_generator(size=512, channel_max=2)).eval()
    with torch.no_grad():
        ws = net.encode(torch.zeros(1, 3, 256, 256))
        whole = net.render(ws)
    assert net.face_pool(whole).shape == (1, 3, 256, 256) and whole.shape == (1, 3, 512, 512) and ws.shape[1] == 16
    torch.testing.assert_close(net.face_pool(whole), F.avg_pool2d(whole, 2))
    assert torch.equal(tiny_net().face_pool(whole[..., :32, :32]), whole[..., :32, :32])
    assert tiny_net().fit(torch.zeros(1, 3, 100, 100)).shape == (1, 3, 32, 32)


def test_checkpoint_round_trip(tmp_path):
    net = tiny_net(INTO_W_PLUS).eval()
    net.step = 7
    save_checkpoint(tmp_path / "ü.pt", psp_state(net, {"dataset_type": "ffhq_encode"}))
    read = load_psp(tmp_path / "ü.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        w = net.encode(images)
        assert torch.equal(w, read.encode(images)) and torch.equal(net.render(w), read.render(w))
    assert read.step == 7 and read.config == net.config
    assert read.decoder.fingerprint == generator_fingerprint(net.decoder.state_dict())


@pytest.mark.parametrize("w_space", [True, False])
def test_published_checkpoints_are_read(tmp_path, w_space):
    """eladrich's: a W generator without `token`, latent_avg [L, D]; TransStyleGAN's: W++, [1, L, D]. No configs."""
    generator = tiny_generator(w_space=w_space)
    config = EncoderConfig(GRADUAL, 8, 32, 256, **LIGHT)  # the published input size, which the file does not tell
    net = pSp(config, generator, generator.mean_latent(10)).eval()
    state = net.state_dict()
    assert ("decoder.token" in state) != w_space
    average = net.latent_avg[0] if w_space else net.latent_avg
    opts = {"device": "cuda:0", "start_from_latent_avg": True, "label_nc": 0, "encoder_type": GRADUAL}
    save_checkpoint(tmp_path / "best_model.pt", {"state_dict": state, "opts": opts, "latent_avg": average})
    read = load_psp(tmp_path / "best_model.pt")
    assert read.config == config and read.step == 0 and read.space == ("w+" if w_space else "w++")
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        w = net.encode(images)
        assert torch.equal(w, read.encode(images)) and torch.equal(net.render(w), read.render(w))
    save_checkpoint(tmp_path / "no_average.pt", {"state_dict": state, "opts": opts})
    with pytest.raises(CheckpointError, match="no_average.pt.*lacks latent_avg"):
        load_psp(tmp_path / "no_average.pt")


def test_e4e_files_are_read_as_such(tmp_path):
    """omertov's: the tensors of a GradualStyleEncoder, told by opts alone."""
    generator = tiny_generator(w_space=True)
    net = pSp(EncoderConfig(E4E, 8, 32, 256, **LIGHT), generator, generator.mean_latent(10)).eval()
    opts = {"stylegan_size": 32, "start_from_latent_avg": True, "encoder_type": E4E}
    file = {"state_dict": net.state_dict(), "opts": opts, "latent_avg": net.latent_avg[0]}
    save_checkpoint(tmp_path / "e4e.pt", file)
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(load_psp(tmp_path / "e4e.pt").encode(images), net.encode(images))
        save_checkpoint(tmp_path / "psp.pt", file | {"opts": opts | {"encoder_type": GRADUAL}})
        assert not torch.allclose(load_psp(tmp_path / "psp.pt").encode(images), net.encode(images), atol=0.01)
    save_checkpoint(tmp_path / "other.pt", file | {"opts": opts | {"encoder_type": "ResNetBackboneEncoder"}})
    with pytest.raises(CheckpointError, match="other.pt: .*type 'ResNetBackboneEncoder'; supported are"):
        load_psp(tmp_path / "other.pt")


def test_fit_is_upstreams_resize():
    """transforms.Resize((256, 256)) of a PIL image: bilinear with antialiasing, which rounds to 8 bits."""
    net = pSp(EncoderConfig(GRADUAL, 8, 32, 256, **LIGHT), tiny_generator(), torch.zeros(1, 32))
    pixels = np.random.RandomState(0).randint(0, 256, (300, 300, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((1024, 1024), Image.Resampling.BICUBIC))
    published = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR), np.float32)
    ours = net.fit(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert (ours - (torch.from_numpy(published).permute(2, 0, 1)[None] / 127.5 - 1)).abs().max() < 1.05 / 127.5


# -- iterative refinement -----------------------------------------------------------------------------------------


def test_each_pass_sees_the_reconstruction_of_the_one_before():
    net = tiny_net(input_nc=6, n_iters=3, start_from_latent_avg=False).eval()
    assert net.start_from_latent_avg and "3 passes" in net.description
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        w = net.latent_avg.expand(2, -1, -1)
        for _ in range(3):  # w <- w + E(x, G(w)), from the average w
            seen = net.decoder(w, input_is_latent=True, randomize_noise=False)[0]
            w = w + net.encoder(torch.cat([images, seen], 1))
        torch.testing.assert_close(net.encode(images), w)
        net.n_iters = 1
        assert not torch.allclose(net.encode(images), w)
    assert tiny_net(n_iters=3).n_iters == 1  # an encoder that sees the image alone has nothing to refine


def test_refining_encoders_round_trip(tmp_path):
    net = tiny_net(input_nc=6, n_iters=4).eval()
    net.decoder.fingerprint = generator_fingerprint(net.decoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    save_checkpoint(tmp_path / "a.pt", psp_state(net, {}))
    save_safetensors(tmp_path / "g.safetensors", net.decoder.state_dict(), {"config": net.decoder.config.to_dict()})
    export_encoder(net, tmp_path / "a.safetensors", "g.safetensors")
    with torch.no_grad():
        expected = net.encode(images)
        assert load_psp(tmp_path / "a.pt").n_iters == 4
        assert torch.equal(load_psp(tmp_path / "a.pt").encode(images), expected)
        torch.testing.assert_close(load_psp(tmp_path / "a.safetensors").encode(images), expected, atol=0.02, rtol=0.02)


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, value",
    [
        ("encoder_config", [1]),
        ("encoder_config", {"width": 10**12}),
        ("config", {"size": "large"}),
        ("config", 7),
        ("latent_avg", "none"),
        ("latent_avg", torch.zeros(3, 3)),
        ("step", "many"),
        ("opts", {"n_iters_per_batch": "x"}),
        ("state_dict", {"encoder.a": torch.zeros(1)}),
    ],
)
def test_entries_that_are_something_else_are_one_sentence(tmp_path, entry, value):
    state = psp_state(tiny_net(input_nc=6), {}) | {entry: value}
    save_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises(CheckpointError, match="x.pt"):
        load_psp(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_torn_files_are_one_sentence(tmp_path, name):
    net = tiny_net().eval()
    net.decoder.fingerprint = generator_fingerprint(net.decoder.state_dict())
    if name == "x.pt":
        save_checkpoint(tmp_path / name, psp_state(net, {}))
    else:
        export_encoder(net, tmp_path / name, "g.safetensors")
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:9], b"garbage" * 99, b"\0" * 4096):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_psp(tmp_path / name)


def test_files_that_are_no_encoders(tmp_path):
    generator = tiny_generator()
    save_checkpoint(tmp_path / "g.pt", {"g_ema": generator.state_dict(), "config": generator.config.to_dict()})
    with pytest.raises(CheckpointError, match="g.pt is no pSp checkpoint.*holds a generator"):
        load_psp(tmp_path / "g.pt")
    state = psp_state(tiny_net(), {})
    del state["state_dict"]["encoder.latlayer1.bias"]
    save_checkpoint(tmp_path / "torn.pt", state)
    with pytest.raises(CheckpointError, match=r"torn.pt \(encoder\) holds another.*latlayer1.bias is absent"):
        load_psp(tmp_path / "torn.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_psp(tmp_path / "absent.pt")


def test_exported_encoder(tmp_path):
    """The encoder alone, in half precision; its generator is found beside it, or given, and must be the right one."""
    net = tiny_net().eval()
    net.step, net.decoder.fingerprint = 7, generator_fingerprint(net.decoder.state_dict())
    config = net.decoder.config.to_dict()
    save_safetensors(tmp_path / "faces.safetensors", net.decoder.state_dict(), {"config": config})
    export_encoder(net, tmp_path / "encoder.safetensors", "faces.safetensors")
    read = load_psp(tmp_path / "encoder.safetensors")
    assert read.step == 7 and read.config == net.config and read.start_from_latent_avg and not read.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ws = read.encode(images)
        torch.testing.assert_close(ws, net.encode(images), atol=5e-3, rtol=5e-3)
        given = load_psp(tmp_path / "encoder.safetensors", generator=net.decoder)
        assert given.decoder is net.decoder and torch.equal(given.encode(images), ws)
    assert torch.equal(read.encoder.input_layer[1].running_var, net.encoder.input_layer[1].running_var), "not rounded"

    other = tiny_generator()
    with torch.no_grad():
        other.input.input.add_(1)
    save_safetensors(tmp_path / "faces.safetensors", other.state_dict(), {"config": config})
    with pytest.raises(CheckpointError, match=f"for the generator {net.decoder.fingerprint}, not "):
        load_psp(tmp_path / "encoder.safetensors")
    (tmp_path / "faces.safetensors").rename(tmp_path / "wrong.safetensors")
    with pytest.raises(FileNotFoundError, match="encoder for the generator faces.safetensors .* not beside it"):
        load_psp(tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="wrong.safetensors is no exported pSp encoder: it has no encoder_config"):
        load_psp(tmp_path / "wrong.safetensors")
