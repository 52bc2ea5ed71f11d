"""W++ without attention, one MLP per token (the ablation of the paper's figure 6, "14 mapping")."""

from dataclasses import replace

import pytest
import torch

from common.generator_file import infer_config
from layers import EqualLinear
from model import Generator, GeneratorConfig, load_generator
from training.transfer import enlarge


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, independent=True)


def test_a_token_hears_of_no_other(config, tiny_config):
    """One changed z moves its own code alone; with attention it moves all of them."""
    torch.manual_seed(0)
    z = torch.randn(2, config.n_tokens, config.style_dim)
    other = z.clone()
    other[:, 2] = torch.randn(2, config.style_dim)
    for mapping, moved in ((config, [2]), (tiny_config, list(range(config.n_tokens)))):
        generator = Generator(mapping)
        with torch.no_grad():
            change = (generator.get_latent(z) - generator.get_latent(other)).abs().amax((0, 2))
        assert change.nonzero().flatten().tolist() == moved


def test_each_token_is_an_mlp_of_its_own(config):
    """Equal to a chain of EqualLinear with the token's weights: W's mapping network, once per token."""
    torch.manual_seed(0)
    generator = Generator(config)
    z = torch.randn(3, config.n_tokens, config.style_dim)
    with torch.no_grad():
        for layer in generator.style[1:]:
            layer.bias.normal_(0, 50)
        found = generator.get_latent(z)
        for token in range(config.n_tokens):
            x = generator.style[0](z[:, token])
            for layer in generator.style[1:]:
                linear = EqualLinear(config.style_dim, config.style_dim, lr_mul=config.lr_mlp, activation=True)
                linear.load_state_dict({"weight": layer.weight[token], "bias": layer.bias[token]})
                x = linear(x)
            assert torch.allclose(found[:, token], x, atol=1e-4)


def test_file_tells_the_mapping(config, tmp_path):
    generator = Generator(config)
    assert infer_config(generator.state_dict()) == config and config.space == "w++"
    torch.save({"g_ema": generator.state_dict(), "config": config.to_dict()}, tmp_path / "g.pt")
    assert load_generator(tmp_path / "g.pt").config == config


def test_refusals(config):
    with pytest.raises(ValueError, match="independent mappings belong to W"):
        replace(config, w_space=True)
    generator = Generator(config)
    with pytest.raises(ValueError, match=r"W\+\+ with independent mappings"):
        generator.get_similarity(generator.draw_z(2))
    with pytest.raises(ValueError, match="maps z"):
        generator(torch.randn(2, config.style_dim))


def test_new_tokens_of_a_grown_generator_start_as_the_last(config):
    large = replace(config, size=2 * config.size)
    small, grown = Generator(config), Generator(large)
    grown.load_state_dict(enlarge(small.state_dict(), config, grown))
    z = grown.draw_z(2)
    z[:, -2:] = z[:, config.n_tokens - 1 : config.n_tokens]
    with torch.no_grad():
        before, after = small.get_latent(z[:, : config.n_tokens]), grown.get_latent(z)
    assert torch.allclose(after[:, : config.n_tokens], before, atol=1e-5)
    assert torch.allclose(after[:, -2:], before[:, -1:].expand(-1, 2, -1), atol=1e-5)


def test_attention_is_a_matter_of_the_config():
    assert GeneratorConfig(32).has_attention
    assert not GeneratorConfig(32, w_space=True).has_attention
    assert not GeneratorConfig(32, independent=True).has_attention
