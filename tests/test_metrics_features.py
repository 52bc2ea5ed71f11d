"""metrics.sources and metrics.features: every kind of source, the cache, ranks, what is refused; and the scripts."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import launch
from torch import nn

from common.cli import run
from common.latents import save_latents
from common.store import DatasetError
from metrics import evaluation, extract_features, extractors, fid, prdc
from metrics.extractors import Extractor, build_extractor, register_extractor
from metrics.features import extract, load_features, require_same, save_features
from metrics.protocol import PROTOCOLS, read_records
from metrics.sources import SEED_STRIDE, Sampling, open_source
from model import Generator, load_generator
from snapshots import export_ema

DIM = 12


class Counted(nn.Module):
    """A small random network that counts the images it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Sequential(nn.Conv2d(3, DIM, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.network(x)


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch, tmp_path):
    """`tiny` in the registry; the cache in a folder of this test."""
    monkeypatch.setattr(extractors, "_builders", dict(extractors._builders))
    monkeypatch.setenv("WPP_CACHE", str(tmp_path / "cache"))

    @register_extractor("tiny")
    def build(protocol, weights_dir):
        return Extractor("tiny", Counted(), 16, DIM, (127.5,) * 3, (127.5,) * 3, "1" * 64)


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
        export_ema(state, folder / "checkpoint" / f"{step:06d}.safetensors")
    return folder / "checkpoint" / "000020.safetensors"


def values(source, tiny, n=1000, **options):
    return extract(source, tiny, n, progress=False, **options).values


# -- sources -------------------------------------------------------------------------------------------------------


def test_folder_as_it_is_and_fitted(face_folder, tiny):
    as_is = extract(open_source(face_folder), tiny, 1000, progress=False)
    assert as_is.values.shape == (24, DIM) and as_is.about["size"] == "40x40" and as_is.about["filter"] is None
    assert (as_is.about["n"], as_is.about["chosen"], as_is.about["codec"]) == (24, "all", "png")
    fitted = extract(open_source(face_folder, size=16), tiny, 1000, progress=False)
    assert (fitted.about["size"], fitted.about["filter"], fitted.about["fit"]) == (16, "lanczos", "crop")
    assert fitted.about["digest"] != as_is.about["digest"] and not torch.equal(fitted.values, as_is.values)


def test_lmdb(face_lmdb, tiny):
    found = extract(open_source(face_lmdb, size=16), tiny, 1000, progress=False)
    assert (found.about["kind"], found.about["size"], found.about["filter"], found.about["codec"]) == (
        "lmdb", 16, "lanczos", "png",
    )  # fmt: skip
    with pytest.raises(ValueError, match="has the sizes 8, 16, 32: choose one with --size"):
        open_source(face_lmdb)


def test_reals_are_drawn_without_replacement(face_lmdb, tiny):
    source = open_source(face_lmdb, size=8)
    chosen = source.choose(10, "drawn", 4)
    assert len(set(chosen)) == 10 and chosen != list(range(10)) and chosen == source.choose(10, "drawn", 4)
    assert chosen != source.choose(10, "drawn", 5) and source.choose(10, "first", 4) == list(range(10))
    assert source.choose(99, "drawn", 4) == list(range(24))
    all_of_them = values(source, tiny)
    assert torch.equal(values(source, tiny, 10, seed=4), all_of_them[chosen])
    paper = build_extractor("tiny", PROTOCOLS["paper"])
    assert extract(source, paper, 10, seed=4, progress=False).about["chosen"] == "first"


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_nothing(batch, face_lmdb, checkpoint, tiny):
    for source in (open_source(face_lmdb, size=16), open_source(checkpoint, sampling=Sampling(0.7))):
        found = values(source, tiny, 20, batch=batch)
        torch.testing.assert_close(found, values(source, tiny, 20), rtol=1e-3, atol=1e-3)


def test_generated_images_are_those_of_generate(checkpoint):
    """Image i of --seed 2 is generate.py --seeds 2000000+i --noise random."""
    from common.images import to_uint8
    from rendering import render, seed_source

    generator = load_generator(checkpoint)
    (images,) = open_source(checkpoint, sampling=Sampling(seed=2)).batches(range(3), 3, "cpu")
    seeds = [2 * SEED_STRIDE + i for i in range(3)]
    source = seed_source(generator, seeds, truncation=1, mean=None, noise="random", noise_seed=0, batch=3)
    expected = np.stack(list(render(generator, source.codes(range(3)), noise=source.noise)))
    assert np.abs(to_uint8(images).astype(int) - expected.astype(int)).max() <= 1


def test_truncation_and_noise_modes(checkpoint, tiny):
    full, half, none = (values(open_source(checkpoint, sampling=Sampling(psi)), tiny, 12) for psi in (1, 0.5, 0))
    assert full.std(0).mean() > half.std(0).mean() > none.std(0).mean()
    still = open_source(checkpoint, sampling=Sampling(0, noise="const"))
    assert values(still, tiny, 4).std(0).max() < 1e-4  # one mean code, one noise: one picture
    with pytest.raises(ValueError, match="--noise loud: expected one of const, random, none"):
        Sampling(noise="loud")


def test_facts_of_a_checkpoint(checkpoint, tmp_path):
    about = open_source(checkpoint).about
    assert (about["step"], about["images"], about["ema"]) == (20, 20 * 4 * 2, True)
    assert about["fingerprint"] == load_generator(checkpoint).fingerprint and about["space"] == "w++"
    alone = shutil.copy(checkpoint, tmp_path / "g.safetensors")
    assert open_source(alone).about["images"] is None


def test_latents(checkpoint, tiny, tmp_path):
    generator = load_generator(checkpoint)
    w = generator.get_latent(generator.draw_z(5, torch.Generator().manual_seed(0)))
    names = [f"{i}.png" for i in range(5)]
    save_latents(tmp_path / "l", w, names=names, space="w++", size=16, fingerprint=generator.fingerprint)
    source = open_source(tmp_path / "l", ckpt=checkpoint, sampling=Sampling(noise="const"))
    (images,) = source.batches(range(5), 8, "cpu")
    torch.testing.assert_close(images, generator(w, input_is_latent=True, randomize_noise=False)[0])
    assert source.n == 5 and values(source, tiny).shape == (5, DIM)
    with pytest.raises(ValueError, match="holds latents: --ckpt names the generator"):
        open_source(tmp_path / "l")
    with pytest.raises(ValueError, match="latents of the generator .*; the checkpoint given is"):
        open_source(tmp_path / "l", ckpt=checkpoint.with_name("000010.safetensors"))


# -- damaged and unfit ---------------------------------------------------------------------------------------------


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target


def test_mixed_sizes_are_refused_in_words(face_folder, tiny, tmp_path):
    folder = copy_of(face_folder, tmp_path / "mixed")
    Image.new("RGB", (30, 50)).save(folder / "zz.png")
    with pytest.raises(DatasetError, match="40x40 and zz.png 30x50 pixels: --size N fits them all"):
        values(open_source(folder), tiny)
    assert len(values(open_source(folder, size=16), tiny)) == 25


def test_damaged_images(face_folder, tiny, tmp_path):
    """No picture at all: left out, counted, listed. Sound header but cut short: refused, naming the file."""
    folder = copy_of(face_folder, tmp_path / "damaged")
    (folder / "note.png").write_text("no picture")
    with pytest.warns(UserWarning, match="1 of 25 image files are left out: .*note.png"):
        source = open_source(folder)
    found = extract(source, tiny, 1000, progress=False)
    assert (found.about["n"], found.about["skipped"]) == (24, 1)
    whole = (folder / "face 03.png").read_bytes()
    (folder / "face 03.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning), pytest.raises(DatasetError, match="face 03.png"):
        values(open_source(folder), tiny)


def test_no_such_source(tmp_path, face_folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a folder of images, LMDB, checkpoint"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "inception_ffhq.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled statistics are not read"):
        open_source(tmp_path / "inception_ffhq.pkl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        open_source(tmp_path / "empty")


def test_diverged_generator(checkpoint, tiny):
    source = open_source(checkpoint)
    source.generator.to_rgb1.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="generated images 0 to 3 are not finite: diverged weights"):
        values(source, tiny, 4)


def test_features_that_are_not_finite(face_lmdb, tiny):
    tiny.network.network[0].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="tiny gives features that are not finite"):
        values(open_source(face_lmdb, size=16), tiny)


# -- cache ---------------------------------------------------------------------------------------------------------


def test_cache_goes_by_content_and_protocol(face_folder, tmp_path):
    cache = tmp_path / "cache"

    def look(folder, n=1000, protocol="tf-compat", size=None):
        extractor = build_extractor("tiny", PROTOCOLS[protocol])
        found = extract(open_source(folder, size=size), extractor, n, cache_dir=cache, progress=False)
        return found, extractor.network.seen

    folder = copy_of(face_folder, tmp_path / "one")
    first, seen = look(folder)
    assert seen == 24 and len(list(cache.iterdir())) == 1
    moved = folder.rename(tmp_path / "elsewhere")
    again, seen = look(moved)
    assert seen == 0 and torch.equal(again.values, first.values) and again.about["path"] == str(moved)
    assert [look(moved, n=20)[1], look(moved, protocol="clean")[1], look(moved, size=16)[1]] == [20, 24, 24]
    picture = next(iter(moved.glob("face 05.png")))
    times = picture.stat()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert look(moved)[1] == 24


def test_cache_of_a_generator(checkpoint, tmp_path):
    def look(sampling, path=checkpoint):
        extractor = build_extractor("tiny", PROTOCOLS["tf-compat"])
        extract(open_source(path, sampling=sampling), extractor, 6, cache_dir=tmp_path / "cache", progress=False)
        return extractor.network.seen

    assert [look(Sampling()), look(Sampling()), look(Sampling(0.7)), look(Sampling(seed=1))] == [6, 0, 6, 6]
    assert [look(Sampling(noise="const")), look(Sampling(), checkpoint.with_name("000010.safetensors"))] == [6, 6]


def test_features_file(face_folder, tiny, tmp_path):
    found = extract(open_source(face_folder), tiny, 10, progress=False)
    path = tmp_path / "ü f.npz"
    save_features(path, found)
    again = load_features(path)
    assert torch.equal(again.values, found.values) and again.about == found.about and again.protocol == found.protocol
    assert require_same(again, tiny, path) is again
    with pytest.raises(ValueError, match=r"of tiny \(weights 11111111\), protocol tf-compat; .* protocol clean"):
        require_same(again, build_extractor("tiny", PROTOCOLS["clean"]), path)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="has no entry 'features"):
        load_features(tmp_path / "foreign.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated, damaged or no features file"):
        load_features(tmp_path / "cut.npz")


# -- ranks ---------------------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
from torch import nn
sys.path.insert(0, "tests")
from common import distributed as d
from metrics.extractors import Extractor
from metrics.features import extract
from metrics.protocol import PROTOCOLS
from metrics.sources import Sampling, open_source
place = d.setup("cpu", timeout=60)
torch.manual_seed(3)
network = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
tiny = Extractor("tiny", network, 16, 12, (127.5,) * 3, (127.5,) * 3, "1" * 64, protocol=PROTOCOLS["tf-compat"])
for path, n in (({lmdb!r}, 23), ({checkpoint!r}, 9)):
    source = open_source(path, size=16 if n == 23 else None, sampling=Sampling())
    found = extract(source, tiny, n, seed=1, batch=4, place=place, cache_dir={cache!r}, progress=False)
    assert (found.values is None) != place.is_main
    again = extract(source, tiny, n, seed=1, batch=4, place=place, cache_dir={cache!r}, progress=False)
    if place.is_main:
        assert torch.equal(again.values, found.values)
        torch.save(found.values, {out!r} + str(n))
try:
    extract(open_source({damaged!r}), tiny, 24, batch=4, place=place, progress=False)
except ValueError as error:
    print("refused", error)
d.shutdown()
"""


def test_two_ranks_give_what_one_gives(face_lmdb, face_folder, checkpoint, tiny, tmp_path):
    damaged = copy_of(face_folder, tmp_path / "damaged")
    file = sorted(damaged.glob("face *.png"))[-1]  # in the share of rank 1
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    names = {"lmdb": face_lmdb, "checkpoint": checkpoint, "cache": tmp_path / "c", "out": tmp_path / "v",
             "damaged": damaged}  # fmt: skip
    program = WORKER
    for name, value in names.items():
        program = program.replace("{" + name + "!r}", repr(str(value)))
    outputs = launch(program, 2)
    assert all("refused" in output and file.name in output for output in outputs), outputs
    for path, n in ((face_lmdb, 23), (checkpoint, 9)):
        expected = values(open_source(path, size=16 if n == 23 else None), tiny, n, seed=1, batch=4)
        torch.testing.assert_close(torch.load(f"{tmp_path}/v{n}", weights_only=True), expected, rtol=1e-3, atol=1e-3)


# -- scripts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def play(capfd, tmp_path):
    def play(script, *flags):
        argv = [*map(str, flags), "--extractor", "tiny", "--device", "cpu", "--batch", "8"]
        status = run(script.main, script.build_parser(), argv)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return play


def test_fid_of_a_folder_of_checkpoints(play, face_lmdb, checkpoint):
    """A curve in one command, into the run's metrics.jsonl."""
    status, out, err = play(fid, "--real", face_lmdb, "--ckpt", checkpoint.parent, "--n_sample", 16)
    output = checkpoint.parent.parent / "metrics.jsonl"
    records = read_records(output)
    output.unlink()
    assert status == 0, err
    assert [(r["metric"], r["step"]) for r in records] == [
        ("fid-tiny", 10), ("kid-tiny", 10), ("fid-tiny", 20), ("kid-tiny", 20),
    ]  # fmt: skip
    assert out.count("fid-tiny") == 2 and "note: KID on subsets of 16" in err
    record = records[0]
    assert (record["n_real"], record["n_fake"], record["fake"]["images"]) == (16, 16, 80)
    assert record["real"]["size"] == 16 and record["real"]["filter"] == "lanczos" and record["real"]["codec"] == "png"
    assert record["fake"]["fingerprint"] == load_generator(checkpoint.with_name("000010.safetensors")).fingerprint
    assert record["extractor"]["sha256"] == "1" * 64 and record["protocol"]["resize"] == "bilinear-tf1"
    assert {"truncation", "seed", "ema", "noise"} <= set(record["fake"]) and record["code"]["torch"]


def test_start_num_and_named_checkpoints(play, face_lmdb, checkpoint, tmp_path):
    output = tmp_path / "m.jsonl"
    flags = ["--real", face_lmdb, "--n_sample", 16, "--output", output]
    assert play(fid, *flags, "--fake", checkpoint.parent, "--start_num", 11)[0] == 0
    assert {r["step"] for r in read_records(output)} == {20}
    status, _, err = play(fid, *flags, "--fake", checkpoint.parent, "--start_num", 21)
    assert status == 1 and "no checkpoint from step 21 on (the last is 20)" in err
    shutil.copy(checkpoint, tmp_path / "best.safetensors")
    status, _, err = play(fid, *flags, "--fake", tmp_path)
    assert status == 1 and "not named by step" in err


def test_truncation_sweep(play, face_lmdb, checkpoint, tmp_path):
    output = tmp_path / "sweep.jsonl"
    flags = ["--real", face_lmdb, "--fake", checkpoint, "--n_sample", 20, "--output", output]
    status, out, err = play(prdc, *flags, "--truncation", "0.5,1", "--nearest_k", 3)
    assert status == 0 and out.count("precision-tiny") == 2, err
    records = read_records(output)
    assert [r["fake"]["truncation"] for r in records] == [0.5] * 4 + [1.0] * 4
    assert {r["nearest_k"] for r in records} == {3} and records[0]["fake"]["truncation_mean"] == 10_000
    assert play(prdc, *flags, "--truncation", "half")[0] == 2


def test_k_is_that_of_the_protocol(play, face_lmdb, checkpoint, tmp_path):
    for protocol, k in (("paper", 3), ("clean", 5)):
        output = tmp_path / f"{protocol}.jsonl"
        assert play(prdc, "--real", face_lmdb, "--fake", checkpoint, "--n_sample", 12, "--output", output, "--protocol",
                    protocol)[0] == 0  # fmt: skip
        assert {(r["nearest_k"], r["protocol"]["name"]) for r in read_records(output)} == {(k, protocol)}


def test_published_precision_draws_its_reals(play, face_lmdb, checkpoint, tmp_path):
    """Under `paper` FID takes the first real images, as its code did; precision and recall draw from all of them."""
    output = tmp_path / "m.jsonl"
    flags = ["--real", face_lmdb, "--fake", checkpoint, "--n_sample", 12, "--protocol", "paper", "--output", output]
    assert play(fid, *flags)[0] == 0 and play(prdc, *flags)[0] == 0
    assert {r["metric"]: r["real"]["chosen"] for r in read_records(output)} == {
        "fid-tiny": "first", "kid-tiny": "first", "precision-tiny": "drawn", "recall-tiny": "drawn",
        "density-tiny": "drawn", "coverage-tiny": "drawn",
    }  # fmt: skip
    flags = [face_lmdb, "--size", 16, "--n_sample", 12, "--protocol", "paper", "--seed", 1, "--out", tmp_path / "r.npz"]
    assert play(extract_features, *flags, "--order", "drawn")[0] == 0
    assert load_features(tmp_path / "r.npz").about["digest"] == read_records(output)[-1]["real"]["digest"]


def test_repeated_images_and_unlike_sizes_are_said(play, face_folder, tmp_path):
    """Copies have balls of no radius (all-equal fakes: recall 0); sides of two sizes are told apart by their resize."""
    small, output = tmp_path / "small", tmp_path / "m.jsonl"
    small.mkdir()
    with Image.open(next(face_folder.glob("face 03.png"))) as image:
        for i in range(8):
            image.resize((20, 20)).save(small / f"{i}.png")
    status, out, err = play(prdc, "--real", face_folder, "--fake", small, "--output", output, "--nearest_k", 3)
    assert status == 0, err
    assert "note: 7 of 8 generated images have the very features of another" in err
    assert "note: real images have 40x40 pixels, generated ones 20x20" in err and err.count("note: ") == 2
    assert "tf-compat, tiny features, k = 3:" in out and "truncation" not in out
    found = {r["metric"]: r for r in read_records(output)}
    assert found["recall-tiny"]["value"] == 0 and len(found["recall-tiny"]["notes"]) == 2


def test_sizes_of_the_generated_images(play, face_folder, face_lmdb, tmp_path):
    """An LMDB of several sizes gives the one of the generated images, also where those lie in a folder."""
    small, output = tmp_path / "small", tmp_path / "m.jsonl"
    small.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 9, 9)).save(small / f"{i}.png")
    assert play(prdc, "--real", face_lmdb, "--fake", small, "--output", output)[0] == 0
    assert {(r["real"]["size"], r["fake"]["size"]) for r in read_records(output)} == {(8, "8x8")}
    assert not read_records(output)[0]["notes"]


def test_features_files_stand_for_images(play, face_lmdb, checkpoint, tmp_path):
    outputs, flags = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ["--n_sample", 14]
    assert play(extract_features, face_lmdb, "--size", 16, "--out", tmp_path / "r.npz", *flags, "--seed", 1)[0] == 0
    assert play(extract_features, checkpoint, "--out", tmp_path / "f.npz", *flags)[0] == 0
    sides = [(face_lmdb, checkpoint), (tmp_path / "r.npz", tmp_path / "f.npz")]
    for (real, fake), output in zip(sides, outputs, strict=True):
        assert play(prdc, "--real", real, "--fake", fake, *flags, "--output", output)[0] == 0
    first, second = ([(r["metric"], r["value"], r["real"]["digest"]) for r in read_records(o)] for o in outputs)
    assert first == second


def test_mistakes_are_one_line(play, face_folder, checkpoint, tmp_path):
    status, _, err = play(fid, "--real", face_folder)
    assert status == 2 and "which images are to be judged?" in err
    status, _, err = play(fid, "--real", tmp_path / "none", "--fake", checkpoint, "--n_sample", 5)
    assert status == 1 and err.count("error: ") == 1 and "does not exist" in err
    status, _, err = play(prdc, "--real", face_folder, "--fake", checkpoint, "--n_sample", 4, "--cache_dir", "none")
    assert status == 1 and "nearest_k 5 needs at least 6 real points" in err
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())
    assert play(fid, "--real", face_folder, "--fake", checkpoint, "--n_sample", 0)[0] == 2
    status, _, err = play(fid, "--real", face_folder, "--fake", face_folder, "--truncation", "0.7")
    assert status == 1 and "holds images: --truncation 0.7 is for images yet to be made" in err
    assert play(prdc, "--real", face_folder, "--fake", face_folder, "--nearest_k", 0)[0] == 2


def test_unknown_metric():
    with pytest.raises(ValueError, match="--metric is: expected fid, kid, prdc"):
        from metrics.features import Features

        one = Features(torch.zeros(3, 2), {"n": 3}, {}, {"name": "clean"})
        evaluation.evaluate(one, one, ["is"])
