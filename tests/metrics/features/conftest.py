"""Fixtures of the tests in this folder."""

import json

import pytest
import torch
from features_of import DIM, Counted

from common.generator_file import export_ema
from metrics import extractors
from metrics.extractors import Extractor, build_extractor
from metrics.protocol import PROTOCOLS
from model import Generator


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch, tmp_path):
    """`tiny` in the registry; the cache in a folder of this test."""
    monkeypatch.setenv("WPP_CACHE", str(tmp_path / "cache"))

    def build(protocol, weights_dir):
        return Extractor("tiny", Counted(), 16, DIM, (127.5,) * 3, (127.5,) * 3, "1" * 64)

    monkeypatch.setitem(extractors.EXTRACTORS, "tiny", build)


@pytest.fixture
def tiny():
    return build_extractor("tiny", PROTOCOLS["tf-compat"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run folder with two exported tiny generators, steps 10 and 20, of batch 4."""
    from model import GeneratorConfig

    folder = tmp_path_factory.mktemp("run ü")
    (folder / "options.json").write_text(json.dumps({"options": {"batch": 4}, "world_size": 2}))
    for step in (10, 20):
        torch.manual_seed(step)
        generator = Generator(GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8))
        state = {"g_ema": generator.state_dict(), "config": generator.config.to_dict(), "step": step}
        state["sampler"] = {"position": 8 * step}
        export_ema(state, folder / "checkpoint" / f"{step:06d}.safetensors")
    return folder / "checkpoint" / "000020.safetensors"
