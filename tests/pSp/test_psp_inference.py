"""Inverting folders with a trained encoder: the command line, what is written, exported encoders."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from psp_commands import start
from psp_networks import tiny_net

import convert
import generate
import inversion.inputs
from common.checkpoint import save_checkpoint
from common.latents import load_latents
from model import Generator, GeneratorConfig, load_generator
from perceptual.image_metrics import read_measures
from pSp.inference import retrieval
from pSp.psp import psp_state

pytestmark = pytest.mark.usefixtures("quick")


def test_inference_keeps_every_image_and_its_name(infer, best, faces_to_invert, generators, tmp_path, capsys):
    flags = ("--checkpoint_path", best, "--data_path", faces_to_invert, "--resize_outputs", "--couple_outputs")
    assert infer(tmp_path, *flags, "--test_batch_size", 2) == 0
    names = ["face 0.png", "face 1.png", "face 2.png", "face 3.png", "in/ü 中.png"]
    for kind, size in (("inference_results", (32, 32)), ("inference_coupled", (64, 32))):
        files = sorted((tmp_path / kind).rglob("*.png"))
        assert [p.relative_to(tmp_path / kind).as_posix() for p in files] == names
        assert all(Image.open(p).size == size for p in files)
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
    flags = ("--ckpt", generators["w++"], "--latents", tmp_path, "--output_dir", rendered, "--device", "cpu")
    assert start(generate, *flags) == 0
    for name in names:
        ours, theirs = (np.asarray(Image.open(folder / name)) for folder in (tmp_path / "inference_results", rendered))
        assert np.abs(ours.astype(int) - theirs).max() <= 1, name  # batches of another size round differently


def test_no_image_ends_a_folder(infer, best, tmp_path, monkeypatch):
    """Decoders raise more than ImageError (Pillow's AVIF: RuntimeError): each such image is listed, the rest done."""
    errors = {1: RuntimeError("Failed to decode frame 0"), 3: OSError("broken data stream"), 4: MemoryError()}
    read = inversion.inputs.read_file

    def failing(paths, size, fit, resample, position):
        if position in errors:
            raise errors[position]
        return read(paths, size, fit, resample, position)

    monkeypatch.setattr(inversion.inputs, "read_file", failing)
    assert infer(tmp_path, "--checkpoint_path", best, "--n_images", 6) == 0
    assert len(load_latents(tmp_path).names) == 3
    rows = list(csv.reader((tmp_path / "skipped.csv").read_text().splitlines()))
    assert [row[1] for row in rows] == ["reason", "Failed to decode frame 0", "broken data stream", "MemoryError"]


def test_batches_and_style_mixing_change_only_their_part(infer, newest, faces_to_invert, tmp_path):
    latents = {}
    for name, flags in (
        ("plain", ("--test_batch_size", 1)),
        ("batch", ("--test_batch_size", 8, "--test_workers", 1)),
        ("mixed", ("--latent_mask", "6,7", "--mix_alpha", "0.5")),
    ):
        data = ("--checkpoint_path", newest, "--data_path", faces_to_invert)
        assert infer(tmp_path / name, *data, *flags) == 0
        latents[name] = load_latents(tmp_path / name).latents
    plain, mixed = latents["plain"], latents["mixed"]
    torch.testing.assert_close(plain, latents["batch"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain[:, :6], mixed[:, :6], atol=1e-5, rtol=1e-5)
    change = mixed[:, 6:] - plain[:, 6:]
    assert change.abs().mean() > 0.01 and not torch.allclose(change[0], change[1], atol=1e-3)  # each has its own sample


def test_outputs_at_the_generators_size_or_256(infer, tmp_path):
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(512, style_dim=16, n_mlp=1, channel_max=2)).eval()
    save_checkpoint(tmp_path / "big.pt", psp_state(tiny_net(generator=generator), {}))
    for flags, size in (((), 512), (("--resize_outputs",), 256)):
        folder = tmp_path / str(size)
        assert infer(folder, "--checkpoint_path", tmp_path / "big.pt", "--n_images", 1, *flags) == 0
        (result,) = (folder / "inference_results").rglob("*.png")
        (coupled,) = (folder / "inference_coupled").rglob("*.png")  # the first of every hundred, as published
        assert Image.open(result).size == (size, size) and Image.open(coupled).size == (2 * size, size)


def test_retrieval():
    """Images near their originals are found; one face for all is not; and a swapped pair counts against it."""

    class Pixels:
        def embed(self, images):
            return torch.nn.functional.normalize(images.flatten(1), dim=1)

    draw = np.random.RandomState(0)
    originals = [draw.randint(0, 256, (8, 8, 3), np.uint8) for _ in range(6)]
    alike = [(o, np.clip(o.astype(int) + draw.randint(-9, 10, o.shape), 0, 255).astype(np.uint8)) for o in originals]
    mean = np.mean(originals, 0).astype(np.uint8)
    assert retrieval(alike, Pixels(), "cpu") == 1
    assert retrieval([(o, mean) for o in originals], Pixels(), "cpu") == pytest.approx(1 / 6)
    swapped = [(alike[0][0], alike[1][1]), (alike[1][0], alike[0][1]), *alike[2:]]
    assert retrieval(swapped, Pixels(), "cpu") == pytest.approx(4 / 6)


def test_exported_encoder_gives_the_same_images(infer, best, generators, faces_to_invert, tmp_path, capsys):
    """By the command lines of convert.py and inference: half precision moves w by a little at most."""
    out, a, b = tmp_path / "ü.safetensors", tmp_path / "a", tmp_path / "b"
    data = ("--data_path", faces_to_invert)
    assert start(convert, best, out, "--stylegan_weights", generators["w++"]) == 0
    assert "keep it beside wpp.pt" in capsys.readouterr().out
    assert infer(a, "--checkpoint_path", out, *data) == 1
    assert "an encoder for the generator wpp.pt" in capsys.readouterr().err
    more = ("--stylegan_weights", generators["w++"], "--id_net", "none")
    assert infer(a, "--checkpoint_path", out, *data, *more) == 0
    assert infer(b, "--checkpoint_path", best, *data) == 0
    exported, whole = load_latents(a), load_latents(b)
    assert exported.names == whole.names and exported.fingerprint == whole.fingerprint
    torch.testing.assert_close(exported.latents, whole.latents, atol=1e-2, rtol=1e-2)

    assert start(convert, best, out, "--stylegan_weights", generators["w"]) == 1
    assert "was trained for" in capsys.readouterr().err
    assert start(convert, best, "x.pt", "--stylegan_weights", generators["w"]) == 2


INFERENCE_ERRORS = [
    ("--data_path absent", "absent does not exist", 1),
    ("--data_path EMPTY", "holds no images", 1),
    ("--data_path BROKEN", "none of the 1 images could be inverted", 1),
    ("--checkpoint_path GENERATOR", "is no pSp checkpoint", 1),
    ("--latent_mask 99", "this generator has the layers 0-7", 1),
    ("--latent_mask a", "expected layers such as 0-3", 2),
    ("--mix_alpha 0.5", "goes with --latent_mask", 2),
    ("--resize_factors 2,4", "inference takes one factor", 2),
    ("--stylegan_weights W", "best_model.pt was trained for", 1),
    ("--n_outputs_to_generate 5", "argument --n_outputs_to_generate: invalid choice: '5'", 2),
]


@pytest.mark.parametrize("flags, message, status", INFERENCE_ERRORS)
def test_mistakes_of_inference_are_one_line(flags, message, status, infer, best, generators, tmp_path, capsys):
    paths = {"GENERATOR": generators["w++"], "W": generators["w"]}
    paths |= {"EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    for name in ("EMPTY", "BROKEN"):
        paths[name].mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    flags = [paths.get(flag, flag) for flag in flags.split()]
    assert infer(tmp_path / "E", "--checkpoint_path", best, *flags) == status
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
