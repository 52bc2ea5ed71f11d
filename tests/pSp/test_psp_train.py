"""Training a pSp encoder and inverting folders with it: the published commands, exact resuming, what is written."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from psp_networks import FakeIdentity, FakePerceptual, tiny_generator, tiny_net

import generate
from common.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
from common.cli import run
from common.distributed import setup
from common.latents import load_latents
from common.runs import read_log
from model import Generator, GeneratorConfig, load_generator
from perceptual.image_metrics import read_measures
from pSp.coach import Coach, TrainSettings
from pSp.inference import retrieval
from pSp.losses import EncoderLoss, LossWeights
from pSp.psp import export_encoder, load_psp
from pSp.scripts import export as export_script
from pSp.scripts import inference as inference_script
from pSp.scripts import train as train_script

# The commands of the published README, word for word (E, C and I are filled in)
TRAIN = """--dataset_type ffhq_encode --exp_dir E --workers 8 --batch_size 8 --test_batch_size 8 --test_workers 8
    --val_interval 2500 --save_interval 5000 --encoder_type GradualStyleEncoder --start_from_latent_avg
    --lpips_lambda 0.8 --l2_lambda 1 --id_lambda 0.1"""
INFERENCE = """--exp_dir E --checkpoint_path C --data_path I --test_batch_size 1 --test_workers 4 --resize_outputs
    --couple_outputs"""
SMALL = ["--encoder_width", "2", "--workers", "0", "--test_workers", "0", "--board_interval", "1", "--device", "cpu"]
PLAIN = ["--lpips_lambda", "0", "--id_lambda", "0", "--start_from_latent_avg", "--batch_size", "3"]


@pytest.fixture(autouse=True)
def no_paths(monkeypatch):
    for name in ("WPP_FFHQ", "WPP_CELEBA_TEST", "WPP_CELEBA_TRAIN", "WPP_STYLEGAN"):
        monkeypatch.delenv(name, raising=False)


class FakeMeasure(FakeIdentity):
    def similarity(self, a, b):
        return F.cosine_similarity(self.embed(a), self.embed(b))


@pytest.fixture(autouse=True)
def fake_measures(monkeypatch):
    """Of the inference script: no weights needed, and no seconds for SqueezeNet."""
    monkeypatch.setattr(inference_script, "build_perceptual", lambda *_, **__: FakePerceptual())
    monkeypatch.setattr("perceptual.identity.build_identity", lambda *_, **__: FakeMeasure())


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """{"w++" and "w": file of a tiny 32 px generator}."""
    folder = tmp_path_factory.mktemp("generators")
    files = {}
    for w_space in (False, True):
        generator = tiny_generator(w_space=w_space)
        files[generator.config.space] = folder / f"{'w' if w_space else 'wpp'}.pt"
        state = {"g_ema": generator.state_dict(), "config": generator.config.to_dict()}
        save_checkpoint(files[generator.config.space], state)
    return files


def train(*flags) -> int:
    return run(train_script.main, train_script.build_parser(), [str(flag) for flag in flags])


def infer(*flags) -> int:
    return run(inference_script.main, inference_script.build_parser(), [str(flag) for flag in flags])


def words(text: str, **values) -> list[str]:
    return [str(values.get(word, word)) for word in text.split()]


@pytest.fixture(scope="module")
def trained(generators, face_folder, tmp_path_factory):
    """The folder of a run of four steps on the W++ generator."""
    folder = tmp_path_factory.mktemp("runs") / "trained ü"
    assert (
        train(
            "--exp_dir",
            folder,
            "--stylegan_weights",
            generators["w++"],
            "--train_path",
            face_folder,
            *SMALL,
            *PLAIN,
            "--max_steps",
            4,
            "--save_interval",
            2,
            "--val_interval",
            2,
        )
        == 0
    )
    return folder


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_decoder", [False, True])
def test_gradients_reach_the_encoder_and_a_decoder_only_on_request(train_decoder):
    net = tiny_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    criterion = EncoderLoss(LossWeights(lpips=0, id=0))
    settings = TrainSettings(batch_size=4, learning_rate=0.01, optim_name="adam", train_decoder=train_decoder)
    coach = Coach(net, criterion, settings, setup("cpu"))
    for _ in range(2):
        coach.train_step(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    weights = {f"encoder.{name}" for name, _ in net.encoder.named_parameters()}
    assert weights <= moved
    synthesis = {name for name in moved if name.startswith("decoder.")}
    assert bool(synthesis) is train_decoder
    assert not any(name.startswith("decoder.style.") for name in moved)  # codes are given: no mapping
    assert all(p.grad is None for p in net.parameters())


def test_steps_do_not_depend_on_the_global_random_state():
    losses = []
    for seed in (1, 2):
        coach = Coach(tiny_net(), EncoderLoss(LossWeights(lpips=0, id=0)), TrainSettings(), setup("cpu"))
        torch.manual_seed(seed)
        coach.train_step(torch.arange(4 * 3 * 32 * 32, dtype=torch.uint8).view(4, 3, 32, 32))
        losses.append(coach.read_metrics()["loss"])
    assert losses[0] == losses[1]


# -- the command line of training ----------------------------------------------------------------------------------


def test_what_a_run_writes(trained):
    checkpoints = trained / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "best_model.pt",
        "iteration_2.pt",
        "iteration_4.pt",
        "timestamp.txt",
    ]
    assert not (trained / "checkpoint").exists() and not (trained / "similarity").exists()
    opts = json.loads((trained / "opt.json").read_text())
    assert opts["dataset_type"] == "ffhq_encode" and opts["output_size"] == 32
    notes = (checkpoints / "timestamp.txt").read_text()
    assert notes.startswith("**Best**: Step - 0, Loss - ") and "Step - 4, \n{" in notes
    log = read_log(trained / "log.jsonl")
    assert [line["step"] for line in log if line["group"] == "train"] == [1, 2, 3, 4]
    tests = [line for line in log if line["group"] == "test"]
    assert [line["step"] for line in tests] == [0, 2, 4]
    best = load_checkpoint(checkpoints / "best_model.pt")
    assert best["best_val_loss"] == min(line["loss"] for line in tests) and "optimiser" not in best
    assert best["step"] == min(tests, key=lambda line: line["loss"])["step"]
    assert {"000000.png", "000002.png", "000004.png"} <= {p.name for p in (trained / "sample").iterdir()}
    state = load_checkpoint(checkpoints / "iteration_4.pt")
    assert set(state) >= {"state_dict", "latent_avg", "opts", "step", "optimiser", "sampler", "config"}


def test_resuming_is_exact(trained, generators, face_folder, tmp_path):
    half = tmp_path / "half"
    flags = (
        "--exp_dir",
        half,
        "--stylegan_weights",
        generators["w++"],
        "--train_path",
        face_folder,
        *SMALL,
        *PLAIN,
        "--save_interval",
        2,
        "--val_interval",
        2,
    )
    assert train(*flags, "--max_steps", 2) == 0
    assert train(*flags, "--max_steps", 4, "--resume", "auto") == 0
    whole, resumed = (load_checkpoint(folder / "checkpoints" / "iteration_4.pt") for folder in (trained, half))
    assert_same({k: v for k, v in whole.items() if k != "opts"}, {k: v for k, v in resumed.items() if k != "opts"})
    lines = [
        {k: v for k, v in line.items() if k != "time"}
        for folder in (trained, half)
        for line in read_log(folder / "log.jsonl")
        if line["group"] != "Speed"
    ]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_resuming_keeps_the_options_and_a_finished_run_is_left_alone(trained, face_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train("--exp_dir", folder, "--resume", "auto", "--device", "cpu") == 0
    assert "step 4 of 4, nothing was left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    more = ("--resume", "auto", "--max_steps", 5, "--workers", 0, "--test_workers", 0, "--device", "cpu")
    assert train("--exp_dir", folder, *more) == 0  # data, losses, batch and intervals as they were
    assert "--max_steps 5 (was 4)" in capsys.readouterr().out
    opts = load_checkpoint(folder / "checkpoints" / "iteration_5.pt")["opts"]
    assert opts["lpips_lambda"] == 0 and opts["batch_size"] == 3 and opts["train_path"] == str(face_folder)


def test_a_refining_encoder_is_trained_and_used(generators, face_folder, tmp_path, capsys):
    flags = ("--exp_dir", tmp_path, "--stylegan_weights", generators["w++"], "--train_path", face_folder)
    assert train(*flags, *SMALL, *PLAIN, "--n_iters_per_batch", 3, "--max_steps", 2) == 0
    assert "3 passes" in capsys.readouterr().out
    net = load_psp(tmp_path / "checkpoints" / "iteration_2.pt")
    assert net.config.input_nc == 6 and net.n_iters == 3
    assert train("--exp_dir", tmp_path, "--resume", "auto", "--max_steps", 3, "--workers", 0, "--device", "cpu") == 0
    assert load_psp(tmp_path / "checkpoints" / "iteration_3.pt").n_iters == 3
    assert infer("--exp_dir", tmp_path, "--data_path", face_folder, "--n_images", 2, "--test_workers", 0) == 0
    assert load_latents(tmp_path).latents.shape == (2, 8, 32)


def test_passes_add_their_gradients_and_are_data_to_each_other():
    """Gradient of a step = sum over passes of the gradient of each pass's loss with the one before held fixed."""
    net = tiny_net(input_nc=6, n_iters=2)
    coach = Coach(net, EncoderLoss(LossWeights(lpips=0, id=0)), TrainSettings(), setup("cpu"))
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


def assert_same(a, b, name="state"):
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


def test_published_command(fake_networks, generators, face_folder, tmp_path, monkeypatch):
    """As written in the README: paths from the environment, the generator from --exp_dir. Only the network and the
    number of steps are made small (flags of the published parser but for the width)."""
    folder = tmp_path / "E"
    folder.mkdir()
    shutil.copy(generators["w++"], folder / "generator.pt")
    monkeypatch.setenv("WPP_FFHQ", str(face_folder))
    monkeypatch.setenv("WPP_CELEBA_TEST", str(face_folder))
    few = "--max_steps 1 --train_decoder False --encoder_width 2".split()
    monkeypatch.setattr(train_script, "data_loader", lambda *a, workers, **k: load_here(*a, **k))
    monkeypatch.setattr("pSp.coach.DataLoader", lambda *a, num_workers, **k: torch.utils.data.DataLoader(*a, **k))
    assert train(*words(TRAIN, E=folder), *few) == 0
    net = load_psp(folder / "checkpoints" / "best_model.pt")
    assert net.start_from_latent_avg and net.config.encoder_type == "GradualStyleEncoder"
    assert infer(*words(INFERENCE, E=folder, C=folder / "checkpoints/best_model.pt", I=face_folder)) == 0
    assert len(list((folder / "inference_results").rglob("*.png"))) == 24


def load_here(*args, **options):
    """The loader without its worker processes, eight of which are slow to start on one core."""
    from dataset import data_loader

    return data_loader(*args, workers=0, **options)


def test_continue_with_the_published_flag_or_begin_from_weights(trained, generators, face_folder, tmp_path):
    flags = ("--stylegan_weights", generators["w++"], "--train_path", face_folder, *SMALL, *PLAIN, "--max_steps", 5)
    newest, best = trained / "checkpoints" / "iteration_4.pt", trained / "checkpoints" / "best_model.pt"
    assert train("--exp_dir", tmp_path / "a", "--checkpoint_path", newest, *flags) == 0
    assert [line["step"] for line in read_log(tmp_path / "a" / "log.jsonl") if line["group"] == "train"] == [5]
    assert train("--exp_dir", tmp_path / "b", "--checkpoint_path", best, *flags, "--max_steps", 1) == 0
    assert load_checkpoint(tmp_path / "b" / "checkpoints" / "iteration_1.pt")["step"] == 1


def test_w_space(generators, face_folder, tmp_path):
    assert (
        train(
            "--exp_dir",
            tmp_path,
            "--stylegan_weights",
            generators["w"],
            "--train_path",
            face_folder,
            *SMALL,
            *PLAIN,
            "--learn_in_w",
            "--max_steps",
            1,
            "--val_images",
            1,
            "--optim_name",
            "adam",
        )
        == 0
    )
    assert infer("--exp_dir", tmp_path, "--data_path", face_folder, "--n_images", 3, "--test_workers", 0) == 0
    latents = load_latents(tmp_path, expect_space="w")
    assert latents.latents.shape == (3, 8, 32) and (latents.latents == latents.latents[:, :1]).all()


def test_super_resolution_and_frontalisation(generators, face_folder, tmp_path):
    for kind, extra in (("celebs_super_resolution", ["--resize_factors", "4"]), ("ffhq_frontalize", [])):
        assert (
            train(
                "--exp_dir",
                tmp_path / kind,
                "--dataset_type",
                kind,
                "--stylegan_weights",
                generators["w++"],
                "--train_path",
                face_folder,
                *SMALL,
                *PLAIN,
                *extra,
                "--max_steps",
                1,
            )
            == 0
        )
    folder = tmp_path / "celebs_super_resolution"
    assert (
        infer(
            "--exp_dir",
            folder,
            "--data_path",
            face_folder,
            "--n_images",
            2,
            "--test_workers",
            0,
            "--resize_factors",
            "4",
            "--couple_outputs",
        )
        == 0
    )
    coupled = sorted((folder / "inference_coupled" / "downsampling_4").rglob("*.png"))
    assert len(coupled) == 2 and Image.open(coupled[0]).size == (96, 32)  # original, shrunk, output


ERRORS = [
    (["--stylegan_weights", "G"], r"--train_path FOLDER|LMDB", 1),
    (["--stylegan_weights", "G", "--output_size", "1024"], "is a generator of 32 px", 1),
    (["--stylegan_weights", "G", "--learn_in_w"], "needs a W generator, this one is W++", 1),
    (["--stylegan_weights", "absent.pt"], "absent.pt: no such checkpoint", 1),
    (["--learn_in_w", "--encoder_type", "GradualStyleEncoder"], "--learn_in_w is one code for all layers", 2),
    (["--label_nc", "19"], "--label_nc 19 is not supported", 1),
    (["--input_nc", "1"], "--input_nc 1 is not supported", 1),
    (["--moco_lambda", "0.5"], "--moco_lambda 0.5 is not supported", 1),
    (["--dataset_type", "celebs_sketch_to_face"], "celebs_sketch_to_face is not supported", 1),
    (["--train_decoder", "perhaps"], "expected True or False", 2),
    (["--resume", "auto", "--checkpoint_path", "x.pt"], "exclude each other", 2),
    (["--resume", "y.pt", "--init_from", "x.pt"], "exclude each other", 2),
    (["--resume", "auto", "--init_from", "x.pt"], "x.pt: no such checkpoint", 1),
    (["--val_interval", "0"], "--val_interval must be at least 1", 1),
    (["--l2_lambda", "0"], "there is nothing to learn from", 1),
]


@pytest.mark.parametrize("flags, message, status", ERRORS)
def test_mistakes_are_one_line(flags, message, status, generators, tmp_path, capsys):
    flags = [str(generators["w++"]) if flag == "G" else flag for flag in flags]
    assert train("--exp_dir", tmp_path / "E", *SMALL, *PLAIN, *flags) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert status == 2 or len(error.strip().splitlines()) == 1
    assert not (tmp_path / "E").exists()  # nothing was begun


def test_an_earlier_run_is_not_overwritten_and_keeps_its_networks(trained, generators, face_folder, tmp_path, capsys):
    flags = ("--exp_dir", trained, "--train_path", face_folder, *SMALL, *PLAIN)
    assert train(*flags, "--stylegan_weights", generators["w++"]) == 1
    assert "already holds a run (iteration_4.pt)" in capsys.readouterr().err
    assert train(*flags, "--resume", "auto", "--encoder_width", 4) == 1
    assert "--encoder_width 4 here, 2 in the file" in capsys.readouterr().err
    assert train(*flags, "--resume", "auto", "--stylegan_weights", generators["w"]) == 1
    assert "trained on another generator" in capsys.readouterr().err
    assert train(*flags, "--resume", trained / "checkpoints" / "best_model.pt") == 1
    assert "holds no optimiser state" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(generators, face_folder, tmp_path, capsys):
    flags = ("--exp_dir", tmp_path, "--stylegan_weights", generators["w++"], "--train_path", face_folder)
    assert train(*flags, *SMALL, *PLAIN, "--max_steps", 9, "--learning_rate", 1e30, "--optim_name", "adam") == 1
    assert "is not finite at step" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("iteration_*.pt"))


def test_older_checkpoints_lose_their_optimiser(trained, generators, face_folder, tmp_path):
    flags = ("--exp_dir", tmp_path, "--stylegan_weights", generators["w++"], "--train_path", face_folder)
    assert train(*flags, *SMALL, *PLAIN, "--max_steps", 3, "--save_interval", 1, "--keep", 1) == 0
    has = {n: "optimiser" in load_checkpoint(tmp_path / "checkpoints" / f"iteration_{n}.pt") for n in (1, 2, 3)}
    assert has == {1: False, 2: False, 3: True}
    load_psp(tmp_path / "checkpoints" / "iteration_1.pt")


def test_two_processes_agree_with_one(generators, face_folder, tmp_path):
    """Two ranks with half the batch each: the same images, and, where nothing is normalised over the batch, the same
    losses; the encoder normalises, so only the first validation is compared to rounding, the second for closeness."""
    flags = [
        "--stylegan_weights",
        generators["w++"],
        "--train_path",
        face_folder,
        "--test_path",
        face_folder,
        "--val_images",
        5,
        *SMALL,
        *PLAIN,
        "--max_steps",
        2,
        "--val_interval",
        2,
    ]
    assert train("--exp_dir", tmp_path / "one", *flags, "--batch_size", 4) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, train_script.__file__, "--exp_dir", tmp_path / "two", *flags, "--batch_size", 2]
    ranks = [
        subprocess.Popen(
            [str(part) for part in command],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    one, two = (
        [line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if line["group"] == "test"]
        for name in ("one", "two")
    )
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1] == pytest.approx(two[1], rel=0.2)


# -- the command line of inference ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces_to_invert(face_folder, tmp_path_factory):
    """Five pictures, one in a folder, one called like a picture but none, and a folder called like a picture."""
    folder = tmp_path_factory.mktemp("to invert")
    sources = sorted(p for p in face_folder.rglob("*") if p.is_file())[:5]
    for i, source in enumerate(sources):
        target = folder / ("in/ü 中.png" if i == 4 else f"face {i}.png")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "folder.png").mkdir()
    return folder


def test_inference_keeps_every_picture_and_its_name(trained, faces_to_invert, generators, tmp_path, capsys):
    checkpoint = trained / "checkpoints" / "best_model.pt"
    assert (
        infer(
            "--exp_dir",
            tmp_path,
            "--checkpoint_path",
            checkpoint,
            "--data_path",
            faces_to_invert,
            "--test_batch_size",
            2,
            "--test_workers",
            0,
            "--resize_outputs",
            "--couple_outputs",
        )
        == 0
    )
    names = ["face 0.png", "face 1.png", "face 2.png", "face 3.png", "in/ü 中.png"]
    for kind, size in (("inference_results", (32, 32)), ("inference_coupled", (64, 32))):
        found = sorted((tmp_path / kind).rglob("*.png"))
        assert [p.relative_to(tmp_path / kind).as_posix() for p in found] == names
        assert all(Image.open(p).size == size for p in found)
    generator = load_generator(generators["w++"])
    latents = load_latents(tmp_path, expect_space="w++", expect_shape=(8, 32), expect_fingerprint=generator.fingerprint)
    assert latents.names == names and latents.size == 32 and latents.extra["method"] == "pSp"
    table = read_measures(tmp_path / "reconstruction.csv")
    assert table.names == names and table.perceptual == "fake-perceptual" and table.identity == "fake-identity"
    for name in ("perceptual", "mse"):
        assert np.load(tmp_path / f"{name}.npy") == pytest.approx(latents.losses[name])
        assert table.values[name] == pytest.approx(latents.losses[name], rel=1e-4)
    assert (tmp_path / "stats.txt").read_text().startswith("Runtime ")
    rows = list(csv.reader((tmp_path / "skipped.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["path", "broken.jpg"]
    assert Image.open(tmp_path / "grid_000.png").size[0] > 5 * 128
    assert "5 images inverted into w++" in capsys.readouterr().out

    rendered = tmp_path / "rendered"  # generate.py makes the same images of the saved w
    flags = ["--ckpt", str(generators["w++"]), "--latents", str(tmp_path), "--output_dir", str(rendered)]
    assert run(generate.main, generate.build_parser(), [*flags, "--device", "cpu"]) == 0
    for name in names:
        ours, theirs = (np.asarray(Image.open(folder / name)) for folder in (tmp_path / "inference_results", rendered))
        assert np.abs(ours.astype(int) - theirs).max() <= 1, name  # batches of another size round differently


def test_no_image_ends_a_folder(trained, face_folder, tmp_path, monkeypatch):
    """Decoders raise more than ImageError (Pillow's AVIF: RuntimeError): each such image is listed, the rest done."""
    read = inference_script.open_faces

    def some_fail(*args, **options):
        images = read(*args, **options)
        load = images.load

        def failing(position):
            errors = {1: RuntimeError("Failed to decode frame 0"), 3: OSError("broken data stream"), 4: MemoryError()}
            if position in errors:
                raise errors[position]
            return load(position)

        images.load = failing
        return images

    monkeypatch.setattr(inference_script, "open_faces", some_fail)
    checkpoint = trained / "checkpoints" / "best_model.pt"
    flags = ("--exp_dir", tmp_path, "--checkpoint_path", checkpoint, "--data_path", face_folder, "--n_images", 6)
    assert infer(*flags, "--test_workers", 0) == 0
    assert len(load_latents(tmp_path).names) == 3
    rows = list(csv.reader((tmp_path / "skipped.csv").read_text().splitlines()))
    assert [row[1] for row in rows] == ["reason", "Failed to decode frame 0", "broken data stream", "MemoryError"]


def test_settings_in_the_generators_file_are_used_and_named(face_folder, tmp_path, capsys):
    generator = tiny_generator()
    header = {"config": generator.config.to_dict(), "recommended": {"encoder": {"max_steps": 1, "batch_size": 2}}}
    save_safetensors(tmp_path / "g.safetensors", generator.state_dict(), header)
    flags = ("--stylegan_weights", tmp_path / "g.safetensors", "--train_path", face_folder, *SMALL)
    flags += ("--lpips_lambda", 0, "--id_lambda", 0, "--val_images", 1)
    assert train("--exp_dir", tmp_path / "a", *flags) == 0
    captured = capsys.readouterr()
    assert "recommends --batch_size 2 --max_steps 1" in captured.err and "step 0 of 1, batch 2" in captured.out
    assert train("--exp_dir", tmp_path / "b", *flags, "--preset", "published", "--max_steps", 1) == 0
    assert "batch 4" in capsys.readouterr().out


def test_inference_does_not_depend_on_the_batch(trained, faces_to_invert, tmp_path):
    flags = ("--checkpoint_path", trained / "checkpoints" / "iteration_4.pt", "--data_path", faces_to_invert)
    assert infer("--exp_dir", tmp_path / "1", *flags, "--test_batch_size", 1, "--test_workers", 0) == 0
    assert infer("--exp_dir", tmp_path / "8", *flags, "--test_batch_size", 8, "--test_workers", 1) == 0
    one, eight = (load_latents(tmp_path / name).latents for name in ("1", "8"))
    torch.testing.assert_close(one, eight, atol=1e-5, rtol=1e-5)


def test_style_mixing(trained, faces_to_invert, tmp_path):
    flags = (
        "--checkpoint_path",
        trained / "checkpoints" / "iteration_4.pt",
        "--data_path",
        faces_to_invert,
        "--test_workers",
        0,
    )
    assert infer("--exp_dir", tmp_path / "plain", *flags) == 0
    assert infer("--exp_dir", tmp_path / "mixed", *flags, "--latent_mask", "6,7", "--mix_alpha", "0.5") == 0
    plain, mixed = (load_latents(tmp_path / name).latents for name in ("plain", "mixed"))
    assert torch.equal(plain[:, :6], mixed[:, :6]) and not torch.equal(plain[:, 6:], mixed[:, 6:])
    assert not torch.equal(mixed[0, 6:] - plain[0, 6:], mixed[1, 6:] - plain[1, 6:])  # each picture has its sample


def test_outputs_at_the_generators_size_or_256(face_folder, tmp_path):
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(512, style_dim=16, n_mlp=1, channel_max=2)).eval()
    net = tiny_net(generator=generator)
    from pSp.psp import psp_state

    save_checkpoint(tmp_path / "big.pt", psp_state(net, {}))
    for flags, size in (([], 512), (["--resize_outputs"], 256)):
        folder = tmp_path / str(size)
        assert (
            infer(
                "--exp_dir",
                folder,
                "--checkpoint_path",
                tmp_path / "big.pt",
                "--data_path",
                face_folder,
                "--n_images",
                1,
                "--test_workers",
                0,
                *flags,
            )
            == 0
        )
        (result,) = (folder / "inference_results").rglob("*.png")
        (coupled,) = (folder / "inference_coupled").rglob("*.png")  # the first of every hundred, as published
        assert Image.open(result).size == (size, size) and Image.open(coupled).size == (2 * size, size)


def test_retrieval():
    """Pictures near their originals are found; one face for all is not; and a swapped pair counts against it."""
    draw = np.random.RandomState(0)
    originals = [draw.randint(0, 256, (8, 8, 3), np.uint8) for _ in range(6)]
    alike = [(o, np.clip(o.astype(int) + draw.randint(-9, 10, o.shape), 0, 255).astype(np.uint8)) for o in originals]
    mean = np.mean(originals, 0).astype(np.uint8)

    def share(pairs):
        return retrieval(pairs, lambda x: [x], lambda a, b: (a[0] - b[0]).square().mean((1, 2, 3)), "cpu")

    assert share(alike) == 1
    assert share([(o, mean) for o in originals]) == pytest.approx(1 / 6)
    swapped = [(alike[0][0], alike[1][1]), (alike[1][0], alike[0][1]), *alike[2:]]
    assert share(swapped) == pytest.approx(4 / 6)


def test_exported_encoder_gives_the_same_pictures(trained, generators, faces_to_invert, tmp_path, capsys):
    """By the command lines of export and inference: half precision moves a pixel by a little at most."""

    def export(*flags):
        return run(export_script.main, export_script.build_parser(), [str(flag) for flag in flags])

    checkpoint, out = trained / "checkpoints" / "best_model.pt", tmp_path / "ü.safetensors"
    flags = ("--checkpoint_path", checkpoint, "--output", out)
    assert export(*flags, "--stylegan_weights", generators["w++"]) == 0
    assert "keep it beside wpp.pt" in capsys.readouterr().out
    data = ("--data_path", faces_to_invert, "--test_workers", 0)
    assert infer("--exp_dir", tmp_path / "a", "--checkpoint_path", out, *data) == 1
    assert "an encoder for the generator wpp.pt" in capsys.readouterr().err
    assert (
        infer(
            "--exp_dir",
            tmp_path / "a",
            "--checkpoint_path",
            out,
            *data,
            "--stylegan_weights",
            generators["w++"],
            "--retrieval",
            5,
            "--id_net",
            "none",
        )
        == 0
    )
    assert "its own for" in capsys.readouterr().out
    assert infer("--exp_dir", tmp_path / "b", "--checkpoint_path", checkpoint, *data) == 0
    exported, whole = (load_latents(tmp_path / name) for name in "ab")
    assert exported.names == whole.names and exported.fingerprint == whole.fingerprint
    torch.testing.assert_close(exported.latents, whole.latents, atol=1e-2, rtol=1e-2)
    shares = json.loads((tmp_path / "a" / "reconstruction.json").read_text())["retrieval"]
    assert set(shares) == {"perceptual"} and 0 <= shares["perceptual"] <= 1

    assert export(*flags, "--stylegan_weights", generators["w"]) == 1
    assert "was trained for" in capsys.readouterr().err
    assert export("--checkpoint_path", checkpoint, "--output", "x.pt", "--stylegan_weights", generators["w"]) == 2


def test_a_new_run_begins_from_an_exported_encoder(trained, generators, face_folder, tmp_path, capsys):
    """As for a bundled encoder and a generator trained on: a step of 1e-30 shows where the weights begin."""
    export_encoder(load_psp(trained / "checkpoints" / "best_model.pt"), tmp_path / "e.safetensors", "wpp.pt")
    flags = (
        "--exp_dir",
        tmp_path / "new",
        "--stylegan_weights",
        generators["w++"],
        "--train_path",
        face_folder,
        *SMALL,
        *PLAIN,
        "--max_steps",
        1,
        "--learning_rate",
        1e-30,
    )
    assert train(*flags, "--init_from", tmp_path / "e.safetensors") == 1
    assert "an encoder for the generator wpp.pt" in capsys.readouterr().err and not (tmp_path / "new").exists()
    shutil.copy(generators["w++"], tmp_path / "wpp.pt")
    assert train(*flags, "--init_from", tmp_path / "e.safetensors") == 0
    assert f"a new run from the encoder of {tmp_path / 'e.safetensors'}" in capsys.readouterr().out
    begun, net = (load_psp(path) for path in (tmp_path / "e.safetensors", tmp_path / "new/checkpoints/iteration_1.pt"))
    assert net.step == 1
    for a, b in zip(net.encoder.parameters(), begun.encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-20, rtol=0)
    (tmp_path / "e.safetensors").unlink()
    assert train(*flags[:-4], "--max_steps", 2, "--resume", "auto", "--init_from", tmp_path / "e.safetensors") == 0
    assert "step 1 of 2" in capsys.readouterr().out


INFERENCE_ERRORS = [
    (["--data_path", "absent"], "absent does not exist", 1),
    (["--data_path", "EMPTY"], "holds no images", 1),
    (["--data_path", "BROKEN"], "none of 1 images could be read", 1),
    (["--checkpoint_path", "GENERATOR"], "is no pSp checkpoint", 1),
    (["--latent_mask", "99"], "this generator has the layers 0-7", 1),
    (["--latent_mask", "a"], "expected layers such as 8,9,10", 2),
    (["--mix_alpha", "0.5"], "goes with --latent_mask", 2),
    (["--resize_factors", "2,4"], "inference takes one factor", 2),
    (["--retrieval", "1"], "expected at least two images", 2),
    (["--stylegan_weights", "W"], "best_model.pt was trained for", 1),
    (["--n_outputs_to_generate", "5"], "--n_outputs_to_generate is not supported", 1),
]


@pytest.mark.parametrize("flags, message, status", INFERENCE_ERRORS)
def test_mistakes_of_inference_are_one_line(flags, message, status, trained, generators, face_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    places = {
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken",
        "GENERATOR": generators["w++"],
        "W": generators["w"],
    }
    flags = [str(places.get(flag, flag)) for flag in flags]
    checkpoint = trained / "checkpoints" / "best_model.pt"
    assert (
        infer(
            "--exp_dir",
            tmp_path / "E",
            "--checkpoint_path",
            checkpoint,
            "--data_path",
            face_folder,
            "--test_workers",
            0,
            *flags,
        )
        == status
    )
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
