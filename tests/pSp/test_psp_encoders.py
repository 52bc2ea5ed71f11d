"""The pSp encoders: names, shapes, the config from the tensors, refusals."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from psp_networks import LIGHT, UPSTREAM, UPSTREAM_ARCFACE, digest, tiny_generator

from common.checkpoint import CheckpointError, save_checkpoint
from model import GeneratorConfig
from perceptual.arcface import ArcFace, Unit, arcface_state
from pSp.encoders import ENCODERS, EncoderConfig, build_encoder, infer_encoder_config
from pSp.settings import E4E, GRADUAL, IDENTITY, INTO_W

# -- encoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UPSTREAM)
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
        ws = encoder(torch.empty(2, 3, config.input_size, config.input_size))
    assert ws.shape == (2, config.n_styles, 512) and len(encoder.styles) == config.n_styles
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
    ws = encoder(torch.randn(3, 3, size, size))
    assert ws.shape == ((3, 24) if kind == INTO_W else (3, 8, 24))
    ws.square().sum().backward()
    unused = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert unused == {name for name, p in encoder.named_parameters() if name.startswith("recognition.")}


def test_encoder_refuses_another_size_in_words():
    encoder = build_encoder(EncoderConfig(input_size=32, **LIGHT))
    with pytest.raises(ValueError, match=r"takes images \[N, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        encoder(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 34},
        {"mode": "se"},
        {"input_size": 100},
        {"width": 0},
        {"width": 10**9},
        {"encoder_type": "BackboneEncoder"},
        {"input_nc": 6, "encoder_type": IDENTITY},
    ],
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("input_nc", "takes 3 channels")):
        EncoderConfig(**wrong)


@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("mode", ["ir", "ir_se"])
def test_config_is_inferred_from_published_tensors(kind, mode):
    n_styles = 1 if kind == INTO_W else 18
    config = EncoderConfig(kind, n_styles, width=4, depth=50, mode=mode)
    with torch.device("meta"):
        assert infer_encoder_config(build_encoder(config).state_dict(), kind) == config


def test_the_stated_type_decides_and_must_fit():
    """e4e's tensors are named as GradualStyleEncoder's: only the file's opts tell them apart."""
    with torch.device("meta"):
        state = build_encoder(EncoderConfig(width=4)).state_dict()
    assert infer_encoder_config(state).encoder_type == GRADUAL
    assert infer_encoder_config(state, E4E).encoder_type == E4E
    with pytest.raises(CheckpointError, match="its opts say BackboneEncoderUsingLastLayerIntoW, but.*GradualStyle"):
        infer_encoder_config(state, INTO_W)
    with pytest.raises(CheckpointError, match="type 'BackboneEncoder'; supported are GradualStyleEncoder"):
        infer_encoder_config(state, "BackboneEncoder")  # ReStyle's, which has the same names but for two


def test_e4e_adds_the_first_token_to_the_others():
    config = EncoderConfig(E4E, 8, 32, 32, width=2, depth=18)
    e4e = build_encoder(config).eval()
    gradual = build_encoder(replace(config, encoder_type=GRADUAL)).eval()
    gradual.load_state_dict(e4e.state_dict())
    images = torch.randn(2, 3, 32, 32)
    w, offsets = e4e(images), gradual(images)
    assert torch.equal(w[:, 0], offsets[:, 0])
    for i in range(1, 8):  # w_i = w_0 + delta_i
        torch.testing.assert_close(w[:, i], offsets[:, 0] + offsets[:, i])


def test_identity_encoder_starts_from_the_linear_function_of_the_embedding():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(IDENTITY, 4, 6, 32, width=2)).requires_grad_(True)
    assert not any(p.requires_grad for p in encoder.recognition.parameters())
    truth, bias, embeddings = torch.randn(128, 24), torch.randn(24), torch.randn(200, 128)
    offsets = (embeddings @ truth + bias).unflatten(1, (4, 6))
    encoder.fit(embeddings, offsets)
    units = torch.linalg.solve(encoder.basis, offsets, left=False).flatten(0, 1)
    torch.testing.assert_close(units.T @ units / len(units), torch.eye(6), atol=1e-3, rtol=0)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    expected = (encoder.embed(images) @ truth + bias).unflatten(1, (4, 6))
    torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.embed(images).norm(dim=1), torch.full((3,), 128**0.5))


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
    state = {
        name: torch.zeros(1)
        for name in ("input_layer.0.weight", "body.0.res_layer.1.weight", "input_layer.1.running_var")
    }
    save_checkpoint(tmp_path / "model_ir_se50.pth", state)
    assert int(arcface_state(tmp_path / "model_ir_se50.pth")["input_layer.1.num_batches_tracked"]) == 0
    save_checkpoint(tmp_path / "other.pth", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no IR-SE50 ArcFace"):
        arcface_state(tmp_path / "other.pth")
