"""Training a pSp encoder: gradients of a step, the published commands, exact resuming, what is written."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import run_ranks
from psp_commands import PLAIN, SMALL, start
from psp_networks import tiny_generator, tiny_net
from trainers import assert_equal_states

from common.checkpoint import CheckpointError, load_checkpoint, save_safetensors
from common.distributed import Distributed, setup
from common.generator_file import Statistics
from common.latents import load_latents
from common.runs import read_log
from model import load_generator
from perceptual.identity import build_identity
from pSp.coach import Coach
from pSp.encoders import GRADUAL, IDENTITY, INTO_W, INTO_W_PLUS
from pSp.losses import EncoderLoss
from pSp.psp import export_encoder, load_psp, pSp, psp_state
from pSp.scripts import inference as inference_script
from pSp.scripts import train as train_script
from pSp.settings import EncoderFlags, LossWeights, TrainSettings
from pSp.start import Start, build_network

pytestmark = pytest.mark.usefixtures("quick")
# The commands of the published README, word for word (E, C and I are filled in)
TRAIN = """--dataset_type ffhq_encode --exp_dir E --workers 8 --batch_size 8 --test_batch_size 8 --test_workers 8
    --val_interval 2500 --save_interval 5000 --encoder_type GradualStyleEncoder --start_from_latent_avg
    --lpips_lambda 0.8 --l2_lambda 1 --id_lambda 0.1"""
INFERENCE = """--exp_dir E --checkpoint_path C --data_path I --test_batch_size 1 --test_workers 4 --resize_outputs
    --couple_outputs"""
MSE = LossWeights(lpips_lambda=0, id_lambda=0)


@pytest.mark.parametrize("train_decoder", [False, True])
def test_gradients_reach_the_encoder_and_a_decoder_only_on_request(train_decoder):
    net = tiny_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = TrainSettings(batch_size=4, learning_rate=0.01, optim_name="adam", train_decoder=train_decoder)
    coach = Coach(net, EncoderLoss(MSE), settings, setup("cpu"))
    for _ in range(2):
        coach.train_step(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"encoder.{name}" for name, _ in net.encoder.named_parameters()} <= moved
    assert any(name.startswith("decoder.") for name in moved) is train_decoder
    assert not any(name.startswith("decoder.style.") for name in moved)  # w is given: no mapping
    assert all(p.grad is None for p in net.parameters())


def test_steps_do_not_depend_on_the_global_random_state():
    losses = []
    for seed in (1, 2):
        coach = Coach(tiny_net(), EncoderLoss(MSE), TrainSettings(), setup("cpu"))
        torch.manual_seed(seed)
        coach.train_step(torch.arange(4 * 3 * 32 * 32, dtype=torch.uint8).view(4, 3, 32, 32))
        losses.append(coach.stats.read()["loss"])
    assert losses[0] == losses[1]


def test_passes_add_their_gradients_and_are_data_to_each_other():
    """Gradient of a step = sum over passes of the gradient of each pass's loss with the one before held fixed."""
    net = tiny_net(input_nc=6, n_iters=2)
    coach = Coach(net, EncoderLoss(MSE), TrainSettings(), setup("cpu"))
    net.eval()  # running statistics: the passes are comparable one by one
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    for loss, _ in coach.passes(images, images, randomize_noise=False):
        loss.backward()
    ours = net.encoder.input_layer[0].weight.grad.clone()
    net.zero_grad()
    seen = net.render(net.latent_avg).expand_as(images)
    first = net.encoder(torch.cat([images, seen], 1)) + net.latent_avg
    output = net.render(first)
    second = net.encoder(torch.cat([images, output.detach()], 1)) + first.detach()
    (F.mse_loss(output, images) + F.mse_loss(net.render(second), images)).backward()
    torch.testing.assert_close(ours, net.encoder.input_layer[0].weight.grad, atol=1e-6, rtol=1e-4)


def test_files_of_a_run(trained, best, newest):
    names = ["best_model.pt", "iteration_2.pt", "iteration_4.pt"]
    assert sorted(p.name for p in best.parent.iterdir()) == names
    assert not (trained / "checkpoint").exists() and not (trained / "similarity").exists()
    opts = json.loads((trained / "opt.json").read_text())
    assert opts["dataset_type"] == "ffhq_encode" and opts["output_size"] == 32
    log = read_log(trained / "log.jsonl")
    assert [line["step"] for line in log if line["group"] == "train"] == [1, 2, 3, 4]
    tests = [line for line in log if line["group"] == "test"]
    assert [line["step"] for line in tests] == [0, 2, 4]
    state = load_checkpoint(best)
    assert state["best_val_loss"] == min(line["loss"] for line in tests) and "optimiser" not in state
    assert state["step"] == min(tests, key=lambda line: line["loss"])["step"]
    assert {"000000.png", "000002.png", "000004.png"} <= {p.name for p in (trained / "sample").iterdir()}
    parts = {"state_dict", "latent_avg", "opts", "step", "optimiser", "sampler", "config"}
    assert set(load_checkpoint(newest)) >= parts


def test_resuming_is_exact(trained, train, newest, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "log.jsonl").write_text('{"step": 0, "group": "test", "loss": 9}\n')  # killed before its first checkpoint
    assert train(half, "--save_interval", 2, "--val_interval", 2, "--max_steps", 2) == 0
    assert train(half, "--save_interval", 2, "--val_interval", 2, "--max_steps", 4, "--resume", "auto") == 0
    whole, resumed = load_checkpoint(newest), load_checkpoint(half / "checkpoints" / "iteration_4.pt")
    assert_equal_states(*({k: v for k, v in state.items() if k != "opts"} for state in (whole, resumed)))
    logs = (read_log(folder / "log.jsonl") for folder in (trained, half))
    lines = [[line | {"time": 0} for line in log if line["group"] != "Speed"] for log in logs]
    assert lines[0] == lines[1]


def test_resuming_keeps_the_options_and_a_finished_run_is_left_alone(trained, face_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = ("--exp_dir", folder, "--resume", "auto", "--device", "cpu")
    assert start(train_script, *flags) == 0
    assert "step 4 of 4, nothing was left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert start(train_script, *flags, "--max_steps", 5, "--workers", 0, "--test_workers", 0) == 0  # all else is kept
    assert "--max_steps 5 (was 4)" in capsys.readouterr().out
    opts = load_checkpoint(folder / "checkpoints" / "iteration_5.pt")["opts"]
    assert opts["lpips_lambda"] == 0 and opts["batch_size"] == 3 and opts["train_path"] == str(face_folder)


def test_a_refining_encoder_is_trained_and_used(train, infer, tmp_path, capsys):
    assert train(tmp_path, "--n_iters_per_batch", 3, "--max_steps", 1) == 0
    assert "3 passes" in capsys.readouterr().out
    net = load_psp(tmp_path / "checkpoints" / "iteration_1.pt")
    assert net.config.input_nc == 6 and net.n_iters == 3
    again = "--resume auto --max_steps 2 --workers 0 --device cpu".split()
    assert start(train_script, "--exp_dir", tmp_path, *again) == 0
    assert load_psp(tmp_path / "checkpoints" / "iteration_2.pt").n_iters == 3
    assert infer(tmp_path, "--n_images", 2) == 0
    assert load_latents(tmp_path).latents.shape == (2, 8, 32)


def single_pass(**options) -> tuple[pSp, Start]:
    """A trained encoder of one pass, and its checkpoint as the start of a new run."""
    net = tiny_net(**options).eval()
    return net, Start(psp_state(net, {}), Path("one.pt"), continues=False)


@pytest.mark.parametrize("kind", [GRADUAL, INTO_W, INTO_W_PLUS])
@pytest.mark.parametrize("flags", [{"n_iters_per_batch": 4}, {"input_nc": 6}])
def test_a_refining_encoder_begins_from_one_of_a_single_pass(kind, flags):
    """All passes together give its w, each one the same share, whatever the reconstruction shows."""
    one, start = single_pass(encoder_type=kind)
    net, origin = build_network(EncoderFlags(**flags), start, None)
    assert net.config.input_nc == 6 and net.n_iters == flags.get("n_iters_per_batch", 5) and "one.pt" in origin
    images, other = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net.encode(images), one.encode(images), atol=1e-5, rtol=1e-4)
        first = net.latent_avg + (one.encode(images) - one.latent_avg) / net.n_iters
        torch.testing.assert_close(net.encode_once(images, previous=other), first, atol=1e-5, rtol=1e-4)
    net.requires_grad_(True)
    net.encode_once(images, previous=other).sum().backward()
    assert net.encoder.input_layer[0].weight.grad[:, 3:].abs().max() > 0  # the reconstruction's channels learn


def test_weights_keep_their_passes_unless_more_are_asked_for():
    one, start = single_pass()
    net, _ = build_network(EncoderFlags(), start, None)
    assert net.config.input_nc == 3 and torch.equal(net.encode(images := torch.randn(1, 3, 32, 32)), one.encode(images))
    beside, _ = build_network(EncoderFlags(), start, one.decoder)  # what the encoder gives stays offsets
    average = beside.latent_avg - one.latent_avg
    torch.testing.assert_close(beside.eval().encode(images), one.encode(images) + average)
    _, start = single_pass(start_from_latent_avg=False)
    with pytest.raises(CheckpointError, match="one.pt holds an encoder that gives w, not offsets: it cannot start"):
        build_network(EncoderFlags(n_iters_per_batch=3), start, None)
    _, start = single_pass(encoder_type=IDENTITY)
    with pytest.raises(CheckpointError, match=f"one.pt holds an {IDENTITY}, which sees a face alone: it cannot start"):
        build_network(EncoderFlags(n_iters_per_batch=3), start, None)


def test_identity_encoder_learns_around_a_fixed_recognition_network(generators, train, tmp_path, monkeypatch):
    """It begins from the generator's own faces, continues exactly, and is itself again from its export."""
    monkeypatch.setattr("pSp.start.IDENTITY_SAMPLES", 100)
    flags = ("--encoder_type", IDENTITY, "--encoder_width", 2, "--save_interval", 1, "--optim_name", "adam")
    assert train(tmp_path / "a", *flags, "--max_steps", 2) == 0
    first, last = (load_psp(tmp_path / "a" / "checkpoints" / f"iteration_{i}.pt") for i in (1, 2))
    assert last.start_from_latent_avg and last.config.encoder_type == IDENTITY
    pretrained = build_identity("mobilefacenet").network.state_dict()
    assert_equal_states(last.encoder.recognition.state_dict(), pretrained)
    moved = [
        name for name, p in last.encoder.named_parameters() if not torch.equal(p, first.encoder.get_parameter(name))
    ]
    assert moved == [name for name, _ in last.encoder.named_parameters() if not name.startswith("recognition.")]

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "iteration_2.pt").unlink()
    assert train(tmp_path / "b", "--resume", "auto", "--max_steps", 2) == 0
    again = load_psp(tmp_path / "b" / "checkpoints" / "iteration_2.pt")
    assert_equal_states(again.encoder.state_dict(), last.encoder.state_dict())

    export_encoder(last, tmp_path / "e.safetensors", "wpp.pt")
    exported = load_psp(tmp_path / "e.safetensors", generator=load_generator(generators["w++"]))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    w = last.encode(images)
    assert (exported.encode(images) - w).norm() < 0.01 * w.norm()  # in half precision


def test_identity_encoder_is_fitted_to_generated_faces(monkeypatch):
    """A function of the embedding explains the w of faces better than their mean does."""
    monkeypatch.setattr("pSp.start.IDENTITY_SAMPLES", 200)
    monkeypatch.setattr("pSp.start.MEAN_SAMPLES", 1000)
    net, origin = build_network(EncoderFlags(encoder_type=IDENTITY), Start(None, None, False), tiny_generator())
    assert "identity fitted to 200 generated faces" in origin
    draw = torch.Generator().manual_seed(0)
    w = net.decoder.get_latent(net.decoder.draw_z(20, draw))  # of the faces of the fit
    with torch.no_grad():
        error = (net.encode(net.render(w).clamp(-1, 1)) - w).square().mean()
    assert error < 0.8 * (w - net.latent_avg).square().mean()


def test_a_new_encoder_lies_on_the_generators_device(monkeypatch):
    """Where it is fitted to generated faces, before the training moves it anywhere."""
    monkeypatch.setattr("pSp.start.fit_to_samples", lambda net: None)  # the device of this test has no numbers
    generator = tiny_generator()
    generator.statistics = Statistics(*generator.latent_statistics(10), samples=10_000)
    net, _ = build_network(EncoderFlags(encoder_type=IDENTITY), Start(None, None, False), generator.to("meta"))
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}


def test_published_command(fake_networks, generators, face_folder, tmp_path, monkeypatch):
    """Word for word: paths from the environment, the generator from --exp_dir. Only the network and the number of steps
    are made small, and no loader processes are started, eight of which are slow on one core."""
    from dataset import data_loader

    folder = tmp_path / "E"
    folder.mkdir()
    shutil.copy(generators["w++"], folder / "generator.pt")
    monkeypatch.setenv("WPP_FFHQ", str(face_folder))
    monkeypatch.setenv("WPP_CELEBA_TEST", str(face_folder))
    monkeypatch.setattr("pSp.coach.data_loader", lambda *a, workers, **k: data_loader(*a, workers=0, **k))
    best = folder / "checkpoints" / "best_model.pt"
    words = {"E": folder, "C": best, "I": face_folder}
    few = "--max_steps 1 --train_decoder False --encoder_width 2".split()
    assert start(train_script, *(words.get(word, word) for word in TRAIN.split()), *few) == 0
    net = load_psp(best)
    assert net.start_from_latent_avg and net.config.encoder_type == "GradualStyleEncoder"
    assert start(inference_script, *(words.get(word, word) for word in INFERENCE.split())) == 0
    assert len(list((folder / "inference_results").rglob("*.png"))) == 24


def test_continue_with_the_published_flag_or_begin_from_weights(train, newest, best, tmp_path, capsys):
    assert train(tmp_path / "a", "--checkpoint_path", newest, "--max_steps", 5) == 0
    assert [line["step"] for line in read_log(tmp_path / "a" / "log.jsonl") if line["group"] == "train"] == [5]
    for flags, kind in (("--encoder_type", INTO_W_PLUS), INTO_W_PLUS), (("--learn_in_w",), INTO_W):
        assert train(tmp_path / "b", "--init_from", best, *flags) == 1
        assert f"another encoder: --encoder_type {kind} here, {GRADUAL} in the file" in capsys.readouterr().err
    assert train(tmp_path / "b", "--checkpoint_path", best, "--max_steps", 1) == 0
    assert load_checkpoint(tmp_path / "b" / "checkpoints" / "iteration_1.pt")["step"] == 1


def test_w_space(train, infer, generators, tmp_path):
    few = ("--max_steps", 1, "--val_images", 1, "--optim_name", "adam")
    assert train(tmp_path, "--stylegan_weights", generators["w"], "--learn_in_w", *few) == 0
    assert infer(tmp_path, "--n_images", 3) == 0
    latents = load_latents(tmp_path, expect_space="w")
    assert latents.latents.shape == (3, 8, 32) and (latents.latents == latents.latents[:, :1]).all()


def test_super_resolution_and_frontalisation(train, infer, tmp_path):
    for kind, extra in (("celebs_super_resolution", ("--resize_factors", "4")), ("ffhq_frontalize", ())):
        assert train(tmp_path / kind, "--dataset_type", kind, *extra, "--max_steps", 1) == 0
    folder = tmp_path / "celebs_super_resolution"
    assert infer(folder, "--n_images", 2, "--resize_factors", "4", "--couple_outputs") == 0
    coupled = sorted((folder / "inference_coupled" / "downsampling_4").rglob("*.png"))
    assert len(coupled) == 2 and Image.open(coupled[0]).size == (96, 32)  # original, shrunk, output


ERRORS = [
    ("--stylegan_weights G", r"--train_path FOLDER|LMDB", 1),
    ("--stylegan_weights G --output_size 1024", "is a generator of 32 px", 1),
    ("--stylegan_weights G --learn_in_w", "needs a W generator, this one is W++", 1),
    ("--stylegan_weights absent.pt", "absent.pt: no such checkpoint", 1),
    ("--learn_in_w --encoder_type GradualStyleEncoder", "--learn_in_w is one w for all layers", 2),
    ("--label_nc 19", "argument --label_nc: invalid choice: 19", 2),
    ("--input_nc 1", "argument --input_nc: invalid choice: 1", 2),
    ("--moco_lambda 0.5", "argument --moco_lambda: invalid choice: 0.5", 2),
    ("--dataset_type celebs_sketch_to_face", "--dataset_type is one of ffhq_encode", 2),
    ("--train_decoder perhaps", "invalid flag_value value: 'perhaps'", 2),
    ("--resume auto --checkpoint_path x.pt", "exclude each other", 2),
    ("--resume y.pt --init_from x.pt", "exclude each other", 2),
    ("--resume auto --init_from x.pt", "x.pt: no such checkpoint", 1),
    ("--val_interval 0", "--val_interval must be at least 1", 2),
    ("--l2_lambda 0", "there is nothing to learn from", 1),
]


@pytest.mark.parametrize("flags, message, status", ERRORS)
def test_mistakes_are_one_line(flags, message, status, generators, tmp_path, capsys):
    flags = [generators["w++"] if flag == "G" else flag for flag in flags.split()]
    assert start(train_script, "--exp_dir", tmp_path / "E", *PLAIN, *flags) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert status == 2 or len(error.strip().splitlines()) == 1
    assert not (tmp_path / "E").exists()  # nothing was begun


def test_ranks_on_processors_stop_after_any_step(train, tmp_path, monkeypatch):
    """torchrun kills them 30 seconds after SIGTERM; 50 steps to the next log line take longer."""
    step, stop = Coach.train_step, lambda self: self.net.step == 1 and os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr("common.distributed.setup", lambda *_, **__: Distributed(0, 2, torch.device("cpu")))
    monkeypatch.setattr(Coach, "train_step", lambda self, images: stop(self) or step(self, images))
    assert train(tmp_path, "--max_steps", 9, "--board_interval", 50, "--holdout", 0.1) == 1
    assert load_checkpoint(tmp_path / "checkpoints" / "iteration_2.pt")["step"] == 2


def test_an_earlier_run_is_not_overwritten_and_keeps_its_networks(train, trained, best, generators, tmp_path, capsys):
    for folder, flags, message in (
        (trained, (), "already holds a run (iteration_4.pt)"),
        (trained, ("--resume", best), "already holds a run, up to iteration_4.pt"),
        (trained, ("--resume", "auto", "--encoder_width", 4), "--encoder_width 4 here, 2 in the file"),
        (trained, ("--resume", "auto", "--stylegan_weights", generators["w"]), "was trained for the generator"),
        (tmp_path / "new", ("--resume", best), "holds no optimiser state"),
    ):
        assert train(folder, *flags, "--max_steps", 9) == 1
        assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path, capsys):
    assert train(tmp_path, "--max_steps", 9, "--learning_rate", 1e30, "--optim_name", "adam") == 1
    assert "is not finite at step" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("iteration_*.pt"))


def test_older_checkpoints_lose_their_optimiser(train, tmp_path):
    assert train(tmp_path, "--max_steps", 3, "--save_interval", 1, "--keep", 1) == 0
    has = {n: "optimiser" in load_checkpoint(tmp_path / "checkpoints" / f"iteration_{n}.pt") for n in (1, 2, 3)}
    assert has == {1: False, 2: False, 3: True}
    load_psp(tmp_path / "checkpoints" / "iteration_1.pt")


FEW_SAMPLES = """
import pSp.start
from common.cli import run_script
from pSp.scripts import train
pSp.start.MEAN_SAMPLES = 100
run_script(train.main, train.build_parser())
"""


def test_two_processes_agree_with_one(train, generators, face_folder, tmp_path):
    """Two ranks with half the batch each: the same images, and, where nothing is normalised over the batch, the same
    losses; the encoder normalises, so only the first validation is compared to rounding, the second for closeness."""
    test = ["--test_path", face_folder, "--val_images", 5, "--max_steps", 2, "--val_interval", 2]
    assert train(tmp_path / "one", *test, "--batch_size", 4) == 0
    data = ["--stylegan_weights", generators["w++"], "--train_path", face_folder]
    command = [sys.executable, "-c", FEW_SAMPLES, "--exp_dir", tmp_path / "two", *data, *PLAIN, *test]
    run_ranks([*command, "--batch_size", "2"])
    logs = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    one, two = ([line["loss"] for line in log if line["group"] == "test"] for log in logs)
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1] == pytest.approx(two[1], rel=0.2)


def test_settings_in_the_generators_file_are_used_and_named(face_folder, tmp_path, capsys):
    generator = tiny_generator()
    recommended = {"max_steps": 1, "batch_size": 2, "exp_dir": "elsewhere", "l2_lambda": "much"}
    header = {"config": generator.config.to_dict(), "recommended": {"encoder": recommended}}
    save_safetensors(tmp_path / "g.safetensors", generator.state_dict(), header)
    flags = ("--stylegan_weights", tmp_path / "g.safetensors", "--train_path", face_folder, *SMALL)
    flags += ("--lpips_lambda", 0, "--id_lambda", 0, "--val_images", 1)
    assert start(train_script, "--exp_dir", tmp_path / "a", *flags) == 0
    captured = capsys.readouterr()
    assert "recommends --batch_size 2 --max_steps 1 (" in captured.err and "step 0 of 1, batch 2" in captured.out
    assert start(train_script, "--exp_dir", tmp_path / "b", *flags, "--preset", "published", "--max_steps", 1) == 0
    assert "batch 4" in capsys.readouterr().out


def test_a_new_run_begins_from_an_exported_encoder(train, best, generators, tmp_path, capsys):
    """A step of 1e-30 shows where the weights begin."""
    exported, folder = tmp_path / "e.safetensors", tmp_path / "new"
    export_encoder(load_psp(best), exported, "wpp.pt")
    flags = ("--init_from", exported, "--learning_rate", 1e-30, "--max_steps", 1)
    assert train(folder, *flags) == 1
    assert "an encoder for the generator wpp.pt" in capsys.readouterr().err and not folder.exists()
    shutil.copy(generators["w++"], tmp_path / "wpp.pt")
    assert train(folder, *flags) == 0
    assert f"a new run from the encoder of {exported}" in capsys.readouterr().out
    begun, net = load_psp(exported), load_psp(folder / "checkpoints" / "iteration_1.pt")
    assert net.step == 1
    for a, b in zip(net.encoder.parameters(), begun.encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-20, rtol=0)
    exported.unlink()
    assert train(folder, "--max_steps", 2, "--resume", "auto", "--init_from", exported) == 0
    assert "step 1 of 2" in capsys.readouterr().out
