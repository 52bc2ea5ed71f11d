"""The pSp encoders, the network around them, their losses and optimiser: names, shapes, numbers, refusals."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import CheckpointError, fingerprint, save_checkpoint, save_safetensors
from common.cli import UserError
from faces.arcface import ArcFace, Unit, arcface_state
from model import Generator, GeneratorConfig
from pSp import data_configs, losses
from pSp.encoders import ENCODERS, GRADUAL, INTO_W, INTO_W_PLUS, EncoderConfig, build_encoder, infer_encoder_config
from pSp.losses import EncoderLoss, LossWeights
from pSp.psp import export_encoder, load_psp, pSp, psp_state
from pSp.ranger import Ranger

# sha256 over "name:shape" of every tensor, sorted, of eladrich/pixel2style2pixel at commit 5cfff38 (its own classes,
# built for 50 layers, ir_se, the number of styles given); the count is that of the tensors.
UPSTREAM = {
    GRADUAL: (14, 565, "694e7b9b4605364b627200d3942dd53d"),
    INTO_W: (18, 387, "b0c43296d9c29127137a94d0c96872a1"),
    INTO_W_PLUS: (14, 394, "1775a0954e296ab664af1a0930fc7fba"),
}
UPSTREAM_ARCFACE = (397, "0924528f7e8ffaf24bffd496ec78af4e")
LIGHT = {"width": 2, "depth": 18}


def digest(state) -> tuple[int, str]:
    text = ";".join(f"{name}:{','.join(map(str, value.shape))}" for name, value in sorted(state.items()))
    return len(state), hashlib.sha256(text.encode()).hexdigest()[:32]


def tiny_generator(**options) -> Generator:
    torch.manual_seed(1)
    config = GeneratorConfig(**{"size": 32, "style_dim": 32, "n_mlp": 2, "channel_max": 8} | options)
    return Generator(config).eval().requires_grad_(False)


def tiny_net(encoder_type=GRADUAL, generator=None, **options) -> pSp:
    generator = generator or tiny_generator(w_space=encoder_type == INTO_W)
    torch.manual_seed(2)
    config = EncoderConfig.for_generator(generator.config, encoder_type=encoder_type, **LIGHT)
    return pSp(config, generator, generator.mean_latent(50), **options)


# -- encoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_tensor_names_and_shapes_are_upstreams(kind):
    n_styles, count, expected = UPSTREAM[kind]
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(kind, n_styles))
    assert digest(encoder.state_dict()) == (count, expected)


def test_arcface_names_are_upstreams_and_begin_the_encoders():
    with torch.device("meta"):
        arcface, encoder = ArcFace(), build_encoder(EncoderConfig())
    assert digest(arcface.state_dict()) == UPSTREAM_ARCFACE
    own = encoder.state_dict()
    for name, value in arcface.state_dict().items():
        assert name.startswith("output_layer.") or own[name].shape == value.shape


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512, 1024])
def test_style_count_and_taps_follow_the_generator(size):
    config = EncoderConfig.for_generator(GeneratorConfig(size))
    assert config.n_styles == 2 * (int(math.log2(size)) - 1)
    assert config.input_size == min(256, size)
    if size >= 256:  # the published network
        assert (config.width, config.depth, config.taps, config.tap_sizes) == (64, 50, (6, 20, 23), (64, 32, 16))
    with torch.device("meta"):
        encoder = build_encoder(config)
        codes = encoder(torch.empty(2, 3, config.input_size, config.input_size))
    assert codes.shape == (2, config.n_styles, 512) and len(encoder.styles) == config.n_styles
    strided = [len(style.convs) // 2 for style in encoder.styles]  # each style block ends at one pixel
    fine, middle, coarse = (int(math.log2(side)) for side in config.tap_sizes)
    assert strided == [coarse] * 3 + [middle] * 4 + [fine] * (config.n_styles - 7)
    assert coarse >= 2


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("size", [16, 32, 128])
def test_output_shapes_and_gradients(kind, size):
    torch.manual_seed(0)
    config = EncoderConfig(kind, n_styles=8, style_dim=24, input_size=size, **LIGHT)
    encoder = build_encoder(config)
    codes = encoder(torch.randn(3, 3, size, size))
    assert codes.shape == ((3, 24) if kind == INTO_W else (3, 8, 24))
    codes.square().sum().backward()
    unused = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert unused == []


def test_encoder_refuses_another_size_in_words():
    encoder = build_encoder(EncoderConfig(input_size=32, **LIGHT))
    with pytest.raises(ValueError, match=r"takes images \[N, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        encoder(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("wrong", [{"depth": 34}, {"mode": "se"}, {"input_size": 100}, {"width": 0},
                                   {"encoder_type": "Encoder4Editing"}])  # fmt: skip
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        EncoderConfig(**wrong)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("mode", ["ir", "ir_se"])
def test_config_is_inferred_from_published_tensors(kind, mode):
    n_styles = 1 if kind == INTO_W else 18
    config = EncoderConfig(kind, n_styles, width=4, depth=50, mode=mode)
    with torch.device("meta"):
        assert infer_encoder_config(build_encoder(config).state_dict()) == config


def test_other_tensors_are_no_encoder():
    with pytest.raises(CheckpointError, match="no pSp encoder's"):
        infer_encoder_config(tiny_generator().state_dict())


def test_shortcut_equals_the_published_strided_convolution():
    torch.manual_seed(0)
    unit = Unit(4, 6, 2, "ir").eval()
    x = torch.randn(2, 4, 9, 9)
    conv, norm = unit.shortcut_layer
    published = norm(F.conv2d(x, conv.weight, stride=2)) + unit.res_layer(x)
    torch.testing.assert_close(unit(x), published)
    same = Unit(4, 4, 2, "ir").eval()
    torch.testing.assert_close(same(x), F.max_pool2d(x, 1, 2) + same.res_layer(x))


def test_arcface_file_without_batch_counters_loads(tmp_path):
    state = {name: torch.zeros(1) for name in ("input_layer.0.weight", "body.0.res_layer.1.weight",
                                               "input_layer.1.running_var")}  # fmt: skip
    save_checkpoint(tmp_path / "model_ir_se50.pth", state)
    assert int(arcface_state(tmp_path / "model_ir_se50.pth")["input_layer.1.num_batches_tracked"]) == 0
    save_checkpoint(tmp_path / "other.pth", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no IR-SE50 ArcFace"):
        arcface_state(tmp_path / "other.pth")


# -- the network around ---------------------------------------------------------------------------------------------


def test_spaces_and_codes():
    images = torch.randn(2, 3, 32, 32)
    net = tiny_net().eval()
    assert net.space == "w++" and net.latent_avg.shape == (1, 8, 32)
    assert torch.equal(net.encode(images), net.encoder(images) + net.latent_avg)
    assert torch.equal(tiny_net(start_from_latent_avg=False).eval().encode(images), net.encoder(images))
    plus = tiny_net(generator=tiny_generator(w_space=True)).eval()
    assert plus.space == "w+"
    single = tiny_net(INTO_W).eval()
    codes = single.encode(images)
    assert single.space == "w" and codes.shape == (2, 8, 32)
    assert torch.equal(codes, codes[:, :1].expand(-1, 8, -1))


def test_wrong_pairs_are_refused():
    with pytest.raises(ValueError, match="needs a W generator, this one is W\\+\\+"):
        tiny_net(INTO_W, tiny_generator())
    generator = tiny_generator()
    with pytest.raises(ValueError, match="14 codes of width 512.*32 px.*8 of 32"):
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
        images, codes = net(torch.zeros(1, 3, 256, 256))
        whole, _ = net(torch.zeros(1, 3, 256, 256), resize=False)
    assert images.shape == (1, 3, 256, 256) and whole.shape == (1, 3, 512, 512) and codes.shape[1] == 16
    torch.testing.assert_close(net.face_pool(whole), F.avg_pool2d(whole, 2))
    assert tiny_net().eval()(torch.zeros(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)
    assert tiny_net().fit(torch.zeros(1, 3, 100, 100)).shape == (1, 3, 32, 32)


def test_checkpoint_round_trip(tmp_path):
    net = tiny_net(INTO_W_PLUS).eval()
    net.step = 7
    save_checkpoint(tmp_path / "ü.pt", psp_state(net, {"dataset_type": "ffhq_encode"}))
    read = load_psp(tmp_path / "ü.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(net(images, randomize_noise=False), read(images, randomize_noise=False), strict=True):
            assert torch.equal(ours, theirs)
    assert read.step == 7 and read.config == net.config
    assert read.decoder.fingerprint == fingerprint(net.decoder.state_dict())


@pytest.mark.parametrize("w_space", [True, False])
def test_published_checkpoints_are_read(tmp_path, w_space):
    """eladrich's: a W generator without `token`, latent_avg [L, D]; TransStyleGAN's: W++, [1, L, D]. No configs."""
    generator = tiny_generator(w_space=w_space)
    config = EncoderConfig(GRADUAL, 8, 32, 256, **LIGHT)  # the published input size, which the file does not tell
    net = pSp(config, generator, generator.mean_latent(10)).eval()
    state = net.state_dict()
    if w_space:
        del state["decoder.token"]
    average = net.latent_avg[0] if w_space else net.latent_avg
    opts = {"device": "cuda:0", "start_from_latent_avg": True, "label_nc": 0, "encoder_type": GRADUAL}
    save_checkpoint(tmp_path / "best_model.pt", {"state_dict": state, "opts": opts, "latent_avg": average})
    read = load_psp(tmp_path / "best_model.pt")
    assert read.config == config and read.step == 0 and read.space == ("w+" if w_space else "w++")
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(read(images, randomize_noise=False)[0], net(images, randomize_noise=False)[0])
    save_checkpoint(tmp_path / "no_average.pt", {"state_dict": state, "opts": opts})
    with pytest.raises(CheckpointError, match="no_average.pt.*lacks latent_avg"):
        load_psp(tmp_path / "no_average.pt")


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
    net.step, net.decoder.fingerprint = 7, fingerprint(net.decoder.state_dict())
    config = net.decoder.config.to_dict()
    save_safetensors(tmp_path / "faces.safetensors", net.decoder.state_dict(), {"config": config})
    export_encoder(net, tmp_path / "encoder.safetensors", "faces.safetensors")
    read = load_psp(tmp_path / "encoder.safetensors")
    assert read.step == 7 and read.config == net.config and read.start_from_latent_avg and not read.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        codes = read.encode(images)
        torch.testing.assert_close(codes, net.encode(images), atol=5e-3, rtol=5e-3)
        given = load_psp(tmp_path / "encoder.safetensors", generator=net.decoder)
        assert given.decoder is net.decoder and torch.equal(given.encode(images), codes)
    assert torch.equal(read.encoder.input_layer[1].running_var, net.encoder.input_layer[1].running_var), "not rounded"

    other = tiny_generator()
    with torch.no_grad():
        other.input.input.add_(1)
    save_safetensors(tmp_path / "faces.safetensors", other.state_dict(), {"config": config})
    with pytest.raises(CheckpointError, match=rf"for the generator {net.decoder.fingerprint} \(faces.*this one is"):
        load_psp(tmp_path / "encoder.safetensors")
    (tmp_path / "faces.safetensors").rename(tmp_path / "wrong.safetensors")
    with pytest.raises(FileNotFoundError, match="encoder for the generator faces.safetensors .* not beside it"):
        load_psp(tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="wrong.safetensors is no exported pSp encoder: it has no encoder_config"):
        load_psp(tmp_path / "wrong.safetensors")


# -- losses --------------------------------------------------------------------------------------------------------


class FakePerceptual(torch.nn.Module):
    name = "fake-perceptual"

    def features(self, images):
        return [images]

    def distance(self, a, b):
        return (a[0] - b[0]).abs().mean((1, 2, 3))

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


class FakeIdentity(torch.nn.Module):
    name = "fake-identity"

    def embed(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 2).flatten(1))


@pytest.fixture
def fake_networks(monkeypatch):
    import common.perceptual

    monkeypatch.setattr(common.perceptual, "build_perceptual", lambda *_, **__: FakePerceptual())
    monkeypatch.setattr(losses, "build_identity", lambda *_, **__: FakeIdentity())


def test_a_lambda_of_zero_loads_nothing(monkeypatch):
    import common.perceptual

    def refuse(*_, **__):
        raise AssertionError("a network was built")

    monkeypatch.setattr(common.perceptual, "build_perceptual", refuse)
    monkeypatch.setattr(losses, "build_identity", refuse)
    criterion = EncoderLoss(LossWeights(lpips=0, id=0, w_norm=0.1, l2_crop=1))
    assert criterion.perceptual is None and criterion.identity is None
    for weights in (LossWeights(lpips=0.1, id=0), LossWeights(lpips=0, id=0.1), LossWeights(0, 1, 0, lpips_crop=1)):
        with pytest.raises(AssertionError, match="a network was built"):
            EncoderLoss(weights)


def test_absent_backbone_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("common.weights.find", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="alexnet.*--lpips_net auto.*--lpips_lambda 0"):
        EncoderLoss(LossWeights(id=0), weights_dir=tmp_path)


def test_parts_of_the_loss(fake_networks):
    torch.manual_seed(0)
    output, target, source = (torch.rand(2, 3, 64, 64) for _ in range(3))
    codes, average = torch.randn(2, 8, 32), torch.randn(1, 8, 32)
    weights = LossWeights(lpips=0.8, l2=1, id=0.1, w_norm=0.01, lpips_crop=0.5, l2_crop=2)
    total, parts = EncoderLoss(weights)(output, target, source, codes, average)
    inner = (slice(None), slice(None), slice(9, 56), slice(8, 55))  # [35:223, 32:220] of 256, a quarter
    assert torch.isclose(parts["loss_l2"], (output - target).square().mean())
    assert torch.isclose(parts["loss_l2_crop"], (output - target)[inner].square().mean())
    assert torch.isclose(parts["loss_lpips_crop"], (output - target)[inner].abs().mean())
    assert torch.isclose(parts["loss_w_norm"], (codes - average).square().sum((1, 2)).sqrt().mean())
    identity = FakeIdentity()
    alike = (identity.embed(output) * identity.embed(target)).sum(1)
    assert torch.isclose(parts["loss_id"], (1 - alike).mean())
    before = (identity.embed(source) * identity.embed(target)).sum(1)
    assert torch.isclose(parts["id_improve"], (alike - before).mean())
    expected = 0.8 * parts["loss_lpips"] + parts["loss_l2"] + 0.1 * parts["loss_id"] + 0.01 * parts["loss_w_norm"] \
        + 0.5 * parts["loss_lpips_crop"] + 2 * parts["loss_l2_crop"]  # fmt: skip
    assert torch.isclose(total, expected) and torch.equal(total, parts["loss"])


def test_crop_is_the_published_one():
    images = torch.rand(1, 3, 256, 256)
    assert torch.equal(losses.crop(images), images[:, :, 35:223, 32:220])


def test_weights_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        LossWeights(lpips=0, l2=0, id=0, w_norm=1)
    with pytest.raises(ValueError, match="--lpips_lambda_crop must not be negative"):
        LossWeights(lpips_crop=-1)


# -- optimiser -----------------------------------------------------------------------------------------------------


def published_ranger(p, slow, mean, square, grad, step, lr, alpha=0.5, k=6, betas=(0.95, 0.999), eps=1e-5):
    """One update by the formulas of the three papers, on one tensor."""
    if grad.ndim > 1:
        grad = grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True)
    mean = betas[0] * mean + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad**2
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * step * betas[1] ** step / (1 - betas[1] ** step)
    move = mean / (1 - betas[0] ** step)
    if length > 5:
        rectify = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        move = move * rectify * math.sqrt(1 - betas[1] ** step) / (square.sqrt() + eps)
    p = p - lr * move
    if step % k == 0:
        slow = slow + alpha * (p - slow)
        p = slow
    return p, slow, mean, square


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 4), (6,)])
def test_ranger_is_the_published_one(shape):
    draw = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    optimiser = Ranger([p], lr=1e-2)
    ours = (p.detach().clone(), p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p))
    for step in range(1, 20):
        grad = torch.randn(shape, generator=draw, dtype=torch.float64)
        p.grad = grad.clone()
        optimiser.step()
        ours = published_ranger(*ours, grad, step, 1e-2)
        torch.testing.assert_close(p.detach(), ours[0].detach(), rtol=1e-9, atol=1e-12)


def test_ranger_goes_on_exactly():
    def run(optimiser, p, steps):
        for step in steps:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimiser.step()

    whole = torch.nn.Parameter(torch.ones(3, 4))
    run(Ranger([whole], lr=0.1), whole, range(16))
    half = torch.nn.Parameter(torch.ones(3, 4))
    first = Ranger([half], lr=0.1)
    run(first, half, range(8))
    other = torch.nn.Parameter(half.detach().clone())
    second = Ranger([other], lr=0.1)
    second.load_state_dict(first.state_dict())
    run(second, other, range(8, 16))
    assert torch.equal(whole, other)


# -- data ----------------------------------------------------------------------------------------------------------


def test_where_paths_come_from(monkeypatch, tmp_path):
    monkeypatch.delenv("WPP_FFHQ", raising=False)
    with pytest.raises(UserError, match=r"--train_path.*\$WPP_FFHQ.*data_configs.py"):
        data_configs.training_path(None, "ffhq_encode")
    monkeypatch.setenv("WPP_FFHQ", "from the environment")
    assert data_configs.training_path(None, "ffhq_encode") == "from the environment"
    assert data_configs.training_path("flag", "ffhq_encode") == "flag"
    monkeypatch.delenv("WPP_STYLEGAN", raising=False)
    with pytest.raises(UserError, match="--stylegan_weights.*generator.safetensors"):
        data_configs.generator_path(None, tmp_path)
    (tmp_path / "generator.pt").touch()
    assert data_configs.generator_path(None, tmp_path) == tmp_path / "generator.pt"


def test_dataset_types():
    with pytest.raises(UserError, match="celebs_seg_to_face is not supported"):
        data_configs.dataset_type("celebs_seg_to_face")
    with pytest.raises(UserError, match="expected one of ffhq_encode"):
        data_configs.dataset_type("cars")
    assert data_configs.resize_factors("4, 8") == (4, 8)
    with pytest.raises(UserError, match="--resize_factors 0"):
        data_configs.resize_factors("0")


def test_sources():
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    torch.manual_seed(0)
    source, target = data_configs.make_pair(images, "same", training=True)
    assert source is target
    mirrored = (target == images.flip(3)).flatten(1).all(1)
    assert 16 < mirrored.sum() < 48 and torch.equal(target[~mirrored], images[~mirrored])
    source, target = data_configs.make_pair(images, "mirrored", training=False)
    assert torch.equal(target, images) and torch.equal(source, images.flip(3))
    source, target = data_configs.make_pair(images, "shrunk", factors=(1, 2, 16), training=False)
    assert torch.equal(source[::3], images[::3]) and torch.equal(target, images)
    assert source[1].std() < images[1].std()
    flat = source[2] - source[2].mean((1, 2), keepdim=True)
    assert flat.abs().max() < 1e-5  # one pixel is left
