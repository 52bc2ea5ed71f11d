"""train.py: losses that are not finite, batches, folders, precisions, mappings."""

import shutil
import sys

import pytest
import torch
from train_runs import assert_same_training_state, checkpoint, error_line, good
from trainers import make_trainer, random_images

from common.checkpoint import load_checkpoint
from common.runs import read_log
from model import GeneratorConfig, load_generator
from training.trainer import Trainer

# -- losses that are not finite ------------------------------------------------------------------------------------


def poison(monkeypatch, where, step, *, always=False):
    """NaN in the loss of a phase, or only in its gradients, at a step (after a rollback only if `always`)."""
    poisoned = "path" if where == "last weights" else "g"  # path comes last: no later loss can show it
    original = Trainer.run_phase

    def run_phase(self, phase, images, **options):
        original(self, phase, images, **options)
        if phase.name == poisoned and self.n_steps == step and (always or self.rng_offset == 0):
            if where == "loss":
                self.stats.report(g=torch.tensor(float("nan")))
            with torch.no_grad():
                for parameter in self.g.parameters():
                    parameter.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "run_phase", run_phase)


def finite(path):
    state = load_checkpoint(path)
    return all(torch.isfinite(t).all() for part in ("g", "d", "g_ema") for t in state[part].values())


@pytest.mark.parametrize("log_every", [1, 50])
def test_nan_stops_before_the_checkpoint(face_lmdb, start_run, tmp_path, monkeypatch, log_every):
    poison(monkeypatch, "loss", 2)
    ending = start_run(face_lmdb, "--iter", 9, "--save_every", 2, "--log_every", log_every)
    assert ending.status == 1
    line = error_line(ending)
    assert "the loss " in line and "loss g" in line and "--on_nan rollback" in line
    assert f"is not finite at step {3 if log_every == 1 else 4}" in line
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir())
    assert names == ["000000.pt", "000002.pt"]
    assert finite(tmp_path / "run" / "checkpoint" / "000002.pt")


@pytest.mark.parametrize(
    "where, save_every", [("loss", 1), ("weights", 1), ("weights", 2), ("last weights", 1), ("last weights", 2)]
)
def test_no_checkpoint_holds_a_nan(face_lmdb, start_run, tmp_path, monkeypatch, where, save_every):
    """Weights that a last gradient broke show in no loss until the next step: they must not be saved either."""
    poison(monkeypatch, where, 3)
    rare = ("--keep", 0, "--g_reg_every", 1, "--log_every", 100)
    ending = start_run(face_lmdb, "--iter", 8, "--save_every", save_every, *rare)
    assert ending.status == 1 and "not finite" in error_line(ending)
    for path in (tmp_path / "run" / "checkpoint").glob("*.pt"):
        assert int(path.stem) <= 3 and finite(path), path


@pytest.mark.parametrize("where", ["loss", "last weights"])
def test_rollback_goes_on_with_fresh_draws(face_lmdb, start_run, tmp_path, monkeypatch, where):
    poison(monkeypatch, where, 3)
    good(start_run(face_lmdb, "--iter", 6, "--save_every", 2, "--on_nan", "rollback", "--g_reg_every", 1))
    state = checkpoint(tmp_path / "run", 6)
    assert state["rng_offset"] == 1 and state["step"] == 6 and finite(tmp_path / "run" / "checkpoint" / "000006.pt")
    assert state["sampler"]["position"] == 6 * 4, "the images after the rollback are those of the steps"
    (line,) = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["group"] == "Rollback"]
    assert line["step"] == 2 and line["checkpoint"] == "000002.pt"
    speeds = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["group"] == "Speed"]
    assert all(line["eta_s"] >= 0 and line["images_per_s"] > 0 for line in speeds)


def test_rollback_of_a_continued_run(face_lmdb, start_run, published_file, tmp_path, monkeypatch):
    """Continued in a new folder, it goes back to where it began."""
    poison(monkeypatch, "loss", 21)
    good(start_run(face_lmdb, "--ckpt", published_file, "--iter", 24, "--on_nan", "rollback"))
    assert checkpoint(tmp_path / "run", 24)["rng_offset"] == 1
    assert (tmp_path / "run" / "checkpoint" / "000020.pt").exists()
    assert (tmp_path / "run" / "sample" / "000020.png").exists()


def test_rollbacks_are_not_endless(face_lmdb, start_run, monkeypatch):
    poison(monkeypatch, "loss", 1, always=True)
    ending = start_run(face_lmdb, "--iter", 4, "--on_nan", "rollback")
    assert ending.status == 1 and "not finite" in error_line(ending) and "--on_nan" not in error_line(ending)


# -- batches and variants ------------------------------------------------------------------------------------------


def test_every_batch_size():
    for batch in range(1, 10):
        trainer = make_trainer(GeneratorConfig(8, 32, 2, channel_max=8), batch=batch)
        trainer.step(random_images(batch, size=8))
        assert all(torch.isfinite(p).all() for p in trainer.g.parameters()), batch


def test_data_set_smaller_than_the_batch(face_folder, start_run, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(face_folder.rglob("*.png"))[:3]:
        shutil.copy(path, few)
    good(start_run(few, "--size", 8, "--batch", 8, "--iter", 2))
    assert checkpoint(tmp_path / "run", 2)["sampler"]["position"] == 16


def test_folder_of_images(face_folder, start_run):
    ending = good(start_run("--path", face_folder, "--iter", 1))
    assert "24 images" in ending.out


def test_w_space_with_mixing(face_lmdb, start_run, tmp_path):
    good(start_run(face_lmdb, "--w_space", "--mixing", 1.0, "--iter", 1))
    generator = load_generator(tmp_path / "run" / "checkpoint" / "000001.pt")
    assert generator.config.space == "w" and generator.config.w_space
    assert not list((tmp_path / "run" / "similarity").iterdir()), "W has no attention"
    assert len(list((tmp_path / "run" / "sample").iterdir())) == 2


def test_independent_mappings_go_on(face_lmdb, start_run, tmp_path):
    """The ablation of W++ without attention: no attention maps, and its kind is read from the checkpoint."""
    good(start_run(face_lmdb, "--independent", "--iter", 1))
    good(start_run(face_lmdb, "--resume", "auto", "--iter", 2))
    config = load_generator(tmp_path / "run" / "checkpoint" / "000002.pt").config
    assert config.independent and config.space == "w++"
    assert not list((tmp_path / "run" / "similarity").iterdir())
    ending = start_run(face_lmdb, "--independent", "--w_space", "--exp_name", tmp_path / "x")
    assert ending.status == 2 and "independent mappings belong to W++" in ending.err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(face_lmdb, start_run, tmp_path, precision):
    good(start_run(face_lmdb, "--precision", precision, "--iter", 2, "--augment"))
    state = checkpoint(tmp_path / "run", 2)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in state["g"].values())


def test_auto_micro_batch_halves_until_it_fits(face_lmdb, start_run, tmp_path, monkeypatch):
    """The probes leave nothing behind: the same weights as with the micro-batch given."""
    original, limit = Trainer.run_phase, 2

    def run_phase(self, phase, images, **options):
        original(self, phase, images, **options)
        if self.settings.micro_batch > limit:
            raise torch.OutOfMemoryError("no memory")

    good(start_run(face_lmdb, "--augment", "--micro_batch", 2, "--iter", 2, "--exp_name", tmp_path / "given"))
    assert checkpoint(tmp_path / "given", 2)["sampler"]["position"] == 8
    monkeypatch.setattr(Trainer, "run_phase", run_phase)
    good(start_run(face_lmdb, "--augment", "--micro_batch", "auto", "--iter", 2, "--exp_name", tmp_path / "found"))
    assert_same_training_state(*(tmp_path / name / "checkpoint" / "000002.pt" for name in ("given", "found")))
    assert checkpoint(tmp_path / "found", 2)["options"]["micro_batch"] == "2"
    limit = 0
    ending = start_run(face_lmdb, "--micro_batch", "auto", "--iter", 2, "--exp_name", tmp_path / "never")
    assert ending.status == 1 and "memory" in error_line(ending)


def test_weights_and_biases_flag(face_lmdb, start_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    ending = start_run(face_lmdb, "--wandb", "--iter", 1)
    assert ending.status == 1 and "pip install wandb" in error_line(ending)
