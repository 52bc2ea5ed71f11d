"""model.py: mapping networks, means, truncation, noise and conditions, against straight formulations."""

import math

import pytest
import torch
import torch.nn.functional as F
from straight import grouped_modulated_conv, loud, straight_resample

from common.generator_file import infer_config
from model import STATISTICS_STREAM, Discriminator, Generator, GeneratorConfig, load_generator


def straight_mapping(state, z, heads=4, lr_mul=0.01):
    """The published mapping network, from a state dict. Returns w [N, T, C] and attention maps."""
    n, tokens, dim = z.shape
    n_blocks = len([name for name in state if name.endswith("atten.proj.weight")])

    def linear(x, name):
        weight, bias = state[f"style.{name}.weight"], state[f"style.{name}.bias"]
        return x @ (weight * (lr_mul / math.sqrt(weight.shape[1]))).t() + bias * lr_mul

    def layer_norm(x):  # over token and channel axes jointly
        mean = x.mean((1, 2), keepdim=True)
        variance = (x - mean).pow(2).mean((1, 2), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt()

    one_hot = torch.eye(tokens, dtype=z.dtype).expand(n, tokens, tokens)
    x = torch.cat((z, one_hot), 2)
    x = x / (x.pow(2).mean(2, keepdim=True) + 1e-8).sqrt()
    maps = []
    inner = dim // 4
    width = inner // heads
    for i in range(1, n_blocks + 1):
        normed = layer_norm(x)
        q, k, v = (linear(normed, f"{i}.atten.{name}_transform") for name in "qkv")
        parts, per_head = [], []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = torch.einsum("nqc,nkc->nqk", q[:, :, own], k[:, :, own]) / math.sqrt(inner)
            attention = scores.exp() / scores.exp().sum(2, keepdim=True)
            per_head.append(attention)
            parts.append(torch.einsum("nqk,nkc->nqc", attention, v[:, :, own]))
        maps.append(torch.stack(per_head, 1))
        shortcut = linear(x, f"{i}.proj") if f"style.{i}.proj.weight" in state else x
        x = shortcut + linear(torch.cat(parts, 2), f"{i}.atten.proj")
        hidden = linear(layer_norm(x), f"{i}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{i}.mlp.2")
    return x, torch.stack(maps)


def test_wpp_mapping_equals_a_straight_one(tiny_config):
    generator = loud(Generator(tiny_config)).double()
    z = torch.randn(3, tiny_config.n_tokens, 32).double()
    codes, maps = straight_mapping(generator.state_dict(), z)
    assert torch.allclose(generator.get_latent(z), codes, atol=1e-10)
    similarity = generator.get_similarity(z)
    assert similarity.shape == (2, 4, 6, 6)
    assert torch.allclose(similarity, maps.mean(1), atol=1e-12)
    assert similarity.std(-1).max() > 0.01, "the maps are uniform: nothing was tested"
    assert torch.allclose(similarity.sum(-1), torch.ones(2, 4, 6).double())
    single = generator.float().get_latent(z.float())
    assert torch.allclose(single.double(), codes, rtol=1e-4, atol=1e-4)


def test_wpp_mapping_at_the_published_size():
    generator = Generator(GeneratorConfig(256, channel_max=1))
    z = torch.randn(2, 14, 512)
    codes, maps = straight_mapping(generator.state_dict(), z)
    assert torch.allclose(generator.get_latent(z), codes, rtol=1e-4, atol=1e-3)
    assert generator.get_similarity(z).shape == (8, 4, 14, 14)
    assert torch.allclose(generator.get_similarity(z), maps.mean(1), atol=1e-5)


def test_wpp_mapping_has_a_second_derivative(tiny_config):
    generator = loud(Generator(tiny_config)).double()
    z = torch.randn(1, 6, 32).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: generator.get_latent(z).pow(2), z, fast_mode=True)


def test_initial_statistics():
    """Statistics of the untrained published mapping network (there over 2000 samples)."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(256, channel_max=1))
    z = generator.draw_z(400, torch.Generator().manual_seed(1))
    with torch.no_grad():
        w = generator.get_latent(z)
        changed = z.clone()
        changed[:, 0].normal_()
        moved = (generator.get_latent(changed[:100]) - w[:100]).norm(dim=2).mean(0)
    assert w.std(0).mean() == pytest.approx(2.27, rel=0.05)
    assert w.var(0).sum(1).sqrt().mean() == pytest.approx(51.5, rel=0.05)
    assert w.mean(0).norm(dim=1).mean() == pytest.approx(34, rel=0.15)
    assert moved[0] == pytest.approx(56, rel=0.1)
    assert moved[1:].mean() == pytest.approx(14.4, rel=0.2)
    similarity = generator.get_similarity(z[:64])
    assert similarity.diagonal(dim1=2, dim2=3).mean() == pytest.approx(1 / 14, rel=0.1)


def straight_w_mapping(state, z, lr_mul=0.01):
    x = z / (z.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, 1 + len([name for name in state if name.startswith("style.") and name.endswith("weight")])):
        weight, bias = state[f"style.{i}.weight"], state[f"style.{i}.bias"]
        x = F.leaky_relu(x @ (weight * (lr_mul / math.sqrt(weight.shape[1]))).t() + bias * lr_mul, 0.2) * 2**0.5
    return x


def test_w_mapping_accepts_vectors_and_rows(tiny_w_config):
    generator = loud(Generator(tiny_w_config)).double()
    z = torch.randn(3, 32).double()
    expected = straight_w_mapping(generator.state_dict(), z)
    codes = generator.get_latent(z)
    assert codes.shape == (3, 6, 32)
    for token in range(6):
        assert torch.allclose(codes[:, token], expected, atol=1e-10)
    rows = torch.randn(3, 6, 32).double()
    expected = straight_w_mapping(generator.state_dict(), rows)
    assert torch.allclose(generator.get_latent(rows), expected, atol=1e-10)
    # rosinality's bias belongs to the channel; the original's CUDA kernel took it per row
    assert torch.allclose(generator.get_latent(z[:, None].expand(-1, 6, -1)), codes, atol=1e-10)
    image, latents = generator(z, randomize_noise=False)
    again, _ = generator(z[:, None].expand(-1, 6, -1), randomize_noise=False)
    assert latents.shape == (3, 6, 32) and torch.allclose(image, again, atol=1e-10)


def test_shapes_that_do_not_fit_are_refused(tiny_config, tiny_w_config):
    plus, plain = Generator(tiny_config), Generator(tiny_w_config)
    for generator, z in (
        (plus, torch.randn(2, 32)),
        (plus, torch.randn(2, 5, 32)),
        (plus, torch.randn(2, 6, 31)),
        (plain, torch.randn(2, 31)),
        (plain, torch.randn(2, 5, 32)),
        (plain, torch.randn(2, 6, 31)),
        (plain, torch.randn(32)),
    ):
        with pytest.raises(ValueError, match="32"):
            generator(z)
    for codes in (torch.randn(2, 5, 32), torch.randn(2, 31), torch.randn(2, 6, 33)):
        with pytest.raises(ValueError, match=r"\[N, 6, 32\]"):
            plus(codes, input_is_latent=True)
    maps = plus.fixed_noise()
    for noise in (maps[:-1], maps[::-1], [*maps, None]):
        with pytest.raises(ValueError, match="noise"):
            plus(torch.randn(2, 6, 32), noise=noise)
    with pytest.raises(ValueError, match="truncation_latent"):
        plus(torch.randn(2, 6, 32), truncation=0.7)
    with pytest.raises(ValueError, match="W"):
        plain.get_similarity(torch.randn(2, 32))


def test_mean_latent(tiny_config, tiny_w_config):
    for config in (tiny_config, tiny_w_config):
        generator = loud(Generator(config))
        mean, std = generator.latent_statistics(200, seed=3, batch=64)
        draw = torch.Generator().manual_seed(3 ^ STATISTICS_STREAM)
        codes = generator.get_latent(generator.draw_z(200, draw)).detach()
        assert mean.shape == (1, 6, 32) and std.shape == (6,)
        assert torch.allclose(mean[0], codes.mean(0), atol=1e-4)
        assert torch.allclose(std, codes.var(0, unbiased=False).sum(1).sqrt(), rtol=1e-4)
        for batch in (1, 7, 200, 500):
            again = generator.latent_statistics(200, seed=3, batch=batch)
            assert torch.allclose(again[0], mean, atol=1e-5) and torch.allclose(again[1], std, rtol=1e-5)
        assert torch.allclose(generator.mean_latent(200), generator.latent_statistics(200, seed=0)[0], atol=1e-5)
        assert not torch.allclose(generator.mean_latent(200), mean, atol=1e-3)


def test_truncation_is_per_token(tiny_config):
    generator = Generator(tiny_config)
    z = torch.randn(3, 6, 32)
    mean = generator.mean_latent(64)
    codes = generator.get_latent(z)
    for psi in (0.0, 0.3, 1.0, 1.2):
        image, used = generator(z, truncation=psi, truncation_latent=mean, randomize_noise=False)
        assert torch.allclose(used, mean + psi * (codes - mean), atol=1e-5)
        again, _ = generator(used, input_is_latent=True, randomize_noise=False)
        assert torch.allclose(image, again, atol=1e-6)


def test_each_layer_reads_its_published_code(tiny_config):
    """conv1 reads latent 0, to_rgb1 1; the up-convolution of block i 2i+1, conv 2i+2, ToRGB 2i+3."""
    generator = Generator(tiny_config)
    codes = torch.randn(1, 6, 32, requires_grad=True)
    expected = {0: "conv1", 1: "to_rgb1 convs.0", 2: "convs.1", 3: "to_rgbs.0 convs.2", 4: "convs.3", 5: "to_rgbs.1"}
    modulations = {
        name.removesuffix(".conv.modulation"): module
        for name, module in generator.named_modules()
        if name.endswith("modulation")
    }
    seen = {name: [] for name in modulations}
    for name, module in modulations.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    generator(codes, input_is_latent=True)
    for token, names in expected.items():
        readers = [name for name, styles in seen.items() if any(torch.equal(s, codes[:, token]) for s in styles)]
        assert sorted(readers) == sorted(names.split()), token


def test_generator_equals_a_straight_synthesis(tiny_config):
    """Whole network in float64: constant, noise order, skip connections, against the grouped formulation."""
    generator = loud(Generator(tiny_config)).double()
    generator.compute_dtype = torch.float64
    w = torch.randn(2, 6, 32).double()
    noise = [torch.randn(2, 1, n.shape[-1], n.shape[-1]).double() for n in generator.fixed_noise()]

    def styled(layer, x, code, n):
        x = grouped_modulated_conv(layer.conv, x, code, True) + layer.noise.weight * n
        return F.leaky_relu(x + layer.activate.bias.view(1, -1, 1, 1), 0.2) * 2**0.5

    def to_rgb(layer, x, code):
        return grouped_modulated_conv(layer.conv, x, code, False) + layer.bias

    x = styled(generator.conv1, generator.input.input.repeat(2, 1, 1, 1), w[:, 0], noise[0])
    image = to_rgb(generator.to_rgb1, x, w[:, 1])
    for block in range(2):
        code = 2 * block + 1
        x = styled(generator.convs[2 * block], x, w[:, code], noise[code])
        x = styled(generator.convs[2 * block + 1], x, w[:, code + 1], noise[code + 1])
        skip = straight_resample(image, up=2, pad=(2, 1), gain=4)
        image = skip + to_rgb(generator.to_rgbs[block], x, w[:, code + 2])
    found, _ = generator(w, input_is_latent=True, noise=noise)
    assert torch.allclose(found.double(), image, rtol=1e-5, atol=1e-5)  # ToRGB sums in float32


def test_noise_fixed_random_and_seeded(tiny_config):
    generator = loud(Generator(tiny_config)).eval()
    w = torch.randn(1, 6, 32).expand(4, -1, -1)
    with torch.no_grad():
        fixed, _ = generator(w, input_is_latent=True, randomize_noise=False)
        assert torch.allclose(fixed[0], fixed[3], atol=1e-5)
        random, _ = generator(w, input_is_latent=True)
        assert not torch.allclose(random[0], random[3], atol=1e-2)
        together, _ = generator(w, input_is_latent=True, noise=generator.seeded_noise([5, 6, 7, 8]))
        alone, _ = generator(w[:1], input_is_latent=True, noise=generator.seeded_noise([7]))
        assert torch.allclose(together[2], alone[0], atol=1e-5)
        assert not torch.allclose(together[1], alone[0], atol=1e-2)
    maps = generator.seeded_noise([7, 2**32 - 1])
    assert [tuple(m.shape) for m in maps] == [(2, 1, side, side) for side in (4, 8, 8, 16, 16)]
    assert torch.equal(maps[0][0], generator.seeded_noise([7])[0][0])


def test_noise_without_strength_is_left_out(tiny_config, tmp_path):
    """Zero strengths give the same image with and without the sum; only then does a loaded generator leave it out."""
    generator = loud(Generator(tiny_config)).eval().requires_grad_(False)
    w = torch.randn(2, 6, 32)
    for strength in generator.noise_strengths:
        torch.nn.init.zeros_(strength)
    summed, _ = generator(w, input_is_latent=True)
    generator.uses_noise = False
    assert torch.allclose(generator(w, input_is_latent=True)[0], summed, atol=1e-5)
    for file, strength in ("silent.pt", 0.0), ("loud.pt", 0.1):
        torch.nn.init.constant_(generator.noise_strengths[-1], strength)
        torch.save({"g_ema": generator.state_dict(), "config": tiny_config.to_dict()}, tmp_path / file)
        assert load_generator(tmp_path / file).uses_noise == bool(strength)


def test_seeded_noise_is_not_the_seeded_latent(tiny_config):
    """The noise of a seed must be independent of its z, which common.latents draws from the same number."""
    from common.latents import draw_z

    z = draw_z([7], 6, 32).flatten()
    for noise in Generator(tiny_config).seeded_noise([7]):
        values = noise.flatten()[:16]
        windows = z.unfold(0, len(values), 1)
        assert (windows - values).abs().amax(1).min() > 0.1


def test_condition(tiny_config):
    config = GeneratorConfig(**{**tiny_config.to_dict(), "condition_dim": 3})
    conditional = Generator(config).eval()
    plain = Generator(tiny_config).eval()
    z = torch.randn(2, 6, 32)
    with torch.no_grad():
        neutral, latents = conditional(z, randomize_noise=False)
        half, _ = conditional(z, randomize_noise=False, condition=torch.full((2, 3), 0.5))
        other, _ = conditional(z, randomize_noise=False, condition=torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5]]))
    assert latents.shape == (2, 6, 32), "path length and inversion act on the codes without the condition"
    assert torch.equal(neutral, half) and torch.allclose(other[0], half[0], atol=1e-6)
    assert not torch.allclose(other[1], half[1], atol=1e-3)
    with torch.no_grad():  # per token
        asked = torch.full((2, 6, 3), 0.5)
        asked[1, :, 0] = 1.0
        same, _ = conditional(z, randomize_noise=False, condition=asked)
        asked[1, :5, 0] = 0.5
        last, _ = conditional(z, randomize_noise=False, condition=asked)
    assert torch.equal(same, other) and not torch.equal(last[1], half[1]) and not torch.equal(last[1], other[1])
    assert conditional.conv1.conv.modulation.weight.shape == (8, 35)
    for wrong in ((2, 2), (2, 5, 3)):
        with pytest.raises(ValueError, match="condition must be"):
            conditional(z, condition=torch.zeros(wrong))
    with pytest.raises(ValueError, match="unconditional"):
        plain(z, condition=torch.zeros(2, 3))
    assert infer_config(conditional.state_dict()) == config


def test_low_precision_stays_close(tiny_config):
    generator, discriminator = Generator(tiny_config), Discriminator(tiny_config)
    w = generator.get_latent(torch.randn(4, 6, 32))
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.02)):
        full, _ = generator(w, input_is_latent=True, randomize_noise=False)
        low, _ = generator(w, input_is_latent=True, randomize_noise=False, dtype=dtype)
        assert low.dtype == torch.float32
        assert (low - full).norm() < tolerance * full.norm()
        logits, low_logits = discriminator(full), discriminator(full, dtype=dtype)
        assert low_logits.dtype == torch.float32
        assert (low_logits - logits).abs().max() < tolerance * max(1.0, logits.abs().max())
