"""The discriminator beside an exported generator: convert.py --with_d, train.py --init_from FILE."""

import pytest
import torch

import convert
from common.checkpoint import save_checkpoint
from common.cli import run
from common.distributed import Distributed
from common.generator_file import provenance
from training.resume import init_from, read_checkpoint
from training.trainer import Trainer, TrainSettings

ALONE = Distributed(0, 1, torch.device("cpu"))
FEATURES = "scorer:face-scorer"


def call(*flags):
    return run(convert.main, convert.build_parser(), list(map(str, flags)))


@pytest.mark.parametrize("features", ["", FEATURES])
def test_a_new_run_takes_the_discriminator_along(tiny_config, tmp_path, features):
    settings = {"batch": 4, "vision_aided": features}
    settings |= {"texture_weight": 0.5, "part_weight": 0.5, "augment": True} if features else {}
    old = Trainer(tiny_config, TrainSettings(**settings), ALONE)
    old.ada.p = 0.25
    old.mean_path_length.fill_(0.125)
    old.images_before = 100
    save_checkpoint(tmp_path / "000007.pt", old.state_dict() | {"sampler": {"position": 28}})
    export = tmp_path / "face.safetensors"
    assert call(tmp_path / "000007.pt", export, "--with_d") == 0
    assert (tmp_path / "face-d.safetensors").is_file()
    new = Trainer(tiny_config, TrainSettings(**settings, seed=1), ALONE)
    init_from(new, read_checkpoint(export, continues=False))
    assert float(new.mean_path_length) == 0.125 and new.images_before == 128
    state = new.state_dict() | {"sampler": {"position": 4}}
    assert provenance(state)["images"] == 132
    assert new.ada.p == (0.25 if features else 0.0)  # without --augment it stays at 0
    assert set(new.others) == ({"aux", "texture", "part"} if features else set())
    networks = {name: (getattr(new, name), getattr(old, name)) for name in ("g", "d", "g_ema")}
    for name, pair in (networks | {name: (new.others[name], old.others[name]) for name in new.others}).items():
        parameters = zip(*(network.parameters() for network in pair), strict=True)
        assert all(torch.equal(a, b) for a, b in parameters), name
    other = Trainer(tiny_config, TrainSettings(batch=4, seed=1), ALONE)
    init_from(other, read_checkpoint(export, continues=False))  # heads that the new run has no use for are left
    assert torch.equal(other.d.final_conv[0].weight, old.d.final_conv[0].weight)


def test_half_precision_and_a_missing_discriminator(tiny_config, tmp_path, capsys):
    old = Trainer(tiny_config, TrainSettings(batch=4), ALONE)
    save_checkpoint(tmp_path / "000007.pt", old.state_dict())
    assert call(tmp_path / "000007.pt", tmp_path / "half.safetensors", "--half", "--with_d") == 0
    new = Trainer(tiny_config, TrainSettings(batch=4, seed=1), ALONE)
    init_from(new, read_checkpoint(tmp_path / "half.safetensors", continues=False))
    for a, b in zip(new.d.parameters(), old.d.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert call(tmp_path / "half.safetensors", tmp_path / "again.safetensors", "--with_d") == 1
    assert "holds no discriminator" in capsys.readouterr().err
