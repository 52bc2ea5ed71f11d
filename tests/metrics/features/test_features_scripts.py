"""metrics/fid.py and prdc.py on folders of checkpoints, features and images; several ranks."""

import shutil

import pytest
import torch
from features_of import copy_of, values
from PIL import Image
from processes import launch

from common.cli import run
from metrics import evaluation, extract_features, fid, prdc
from metrics.features import Features, load_features
from metrics.protocol import read_records
from metrics.sources import open_source
from model import load_generator

WORKER = """
import sys, torch
from torch import nn
sys.path.insert(0, "tests")
from common import distributed as d
from metrics.extractors import Extractor
from metrics.features import extract
from metrics.protocol import PROTOCOLS
from metrics.flags import Sampling
from metrics.sources import open_source
dist = d.setup("cpu", timeout=60)
torch.manual_seed(3)
network = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
tiny = Extractor("tiny", network, 16, 12, (127.5,) * 3, (127.5,) * 3, "1" * 64, protocol=PROTOCOLS["tf-compat"])
for path, n in (({lmdb!r}, 23), ({checkpoint!r}, 9)):
    source = open_source(path, size=16 if n == 23 else None, sampling=Sampling())
    result = extract(source, tiny, n, seed=1, batch=4, dist=dist, cache_dir={cache!r})
    assert (result.values is None) != dist.is_main
    again = extract(source, tiny, n, seed=1, batch=4, dist=dist, cache_dir={cache!r})
    if dist.is_main:
        assert torch.equal(again.values, result.values)
        torch.save(result.values, {out!r} + str(n))
try:
    extract(open_source({damaged!r}), tiny, 24, batch=4, dist=dist)
except ValueError as error:
    print("refused", error)
d.shutdown()
"""


def test_two_ranks_give_what_one_gives(face_lmdb, face_folder, checkpoint, tiny, tmp_path):
    damaged = copy_of(face_folder, tmp_path / "damaged")
    file = sorted(damaged.glob("face *.png"))[-1]  # in the share of rank 1
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    names = {
        "lmdb": face_lmdb,
        "checkpoint": checkpoint,
        "cache": tmp_path / "c",
        "out": tmp_path / "v",
        "damaged": damaged,
    }
    program = WORKER
    for name, value in names.items():
        program = program.replace("{" + name + "!r}", repr(str(value)))
    outputs = launch(program, 2)
    assert all("refused" in output and file.name in output for output in outputs), outputs
    for path, n in ((face_lmdb, 23), (checkpoint, 9)):
        expected = values(open_source(path, size=16 if n == 23 else None), tiny, n, seed=1, batch=4)
        torch.testing.assert_close(torch.load(f"{tmp_path}/v{n}", weights_only=True), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def command(capfd, tmp_path):
    def command(script, *flags):
        argv = [*map(str, flags), "--extractor", "tiny", "--device", "cpu", "--batch", "8"]
        status = run(script.main, script.build_parser(), argv)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return command


def test_fid_of_a_folder_of_checkpoints(command, face_lmdb, checkpoint):
    """A curve in one command, into the run's metrics.jsonl."""
    status, out, err = command(fid, "--real", face_lmdb, "--ckpt", checkpoint.parent, "--n_sample", 16)
    output = checkpoint.parent.parent / "metrics.jsonl"
    records = read_records(output)
    output.unlink()
    assert status == 0, err
    assert [(r["metric"], r["step"]) for r in records] == [
        ("fid-tiny", 10),
        ("kid-tiny", 10),
        ("fid-tiny", 20),
        ("kid-tiny", 20),
    ]
    assert out.count("fid-tiny") == 2 and "warning: KID on subsets of 16" in err
    record = records[0]
    assert (record["n_real"], record["n_fake"], record["fake"]["images"]) == (16, 16, 80)
    assert record["real"]["size"] == 16 and record["real"]["filter"] == "lanczos" and record["real"]["codec"] == "png"
    assert record["fake"]["fingerprint"] == load_generator(checkpoint.with_name("000010.safetensors")).fingerprint
    assert record["extractor"]["sha256"] == "1" * 64 and record["protocol"]["resize"] == "bilinear-tf1"
    assert {"truncation", "seed", "ema", "noise"} <= set(record["fake"]) and record["code"]["torch"]


def test_start_num_and_named_checkpoints(command, face_lmdb, checkpoint, tmp_path):
    output = tmp_path / "m.jsonl"
    flags = ["--real", face_lmdb, "--n_sample", 16, "--output", output]
    assert command(fid, *flags, "--fake", checkpoint.parent, "--start_num", 11)[0] == 0
    assert {r["step"] for r in read_records(output)} == {20}
    status, _, err = command(fid, *flags, "--fake", checkpoint.parent, "--start_num", 21)
    assert status == 1 and "no checkpoint from step 21 on (the last is 20)" in err
    shutil.copy(checkpoint, tmp_path / "best.safetensors")
    status, _, err = command(fid, *flags, "--fake", tmp_path)
    assert status == 1 and "not named by step" in err


def test_truncation_sweep(command, face_lmdb, checkpoint, tmp_path):
    output = tmp_path / "sweep.jsonl"
    flags = ["--real", face_lmdb, "--fake", checkpoint, "--n_sample", 20, "--output", output]
    status, out, err = command(prdc, *flags, "--truncation", "0.5,1", "--nearest_k", 3)
    assert status == 0 and out.count("precision-tiny") == 2, err
    records = read_records(output)
    assert [r["fake"]["truncation"] for r in records] == [0.5] * 4 + [1.0] * 4
    assert {r["nearest_k"] for r in records} == {3} and records[0]["fake"]["truncation_mean"] == 10_000
    assert command(prdc, *flags, "--truncation", "half")[0] == 2


def test_k_is_that_of_the_protocol(command, face_lmdb, checkpoint, tmp_path):
    for protocol, k in (("paper", 3), ("clean", 5)):
        output = tmp_path / f"{protocol}.jsonl"
        assert (
            command(
                prdc,
                "--real",
                face_lmdb,
                "--fake",
                checkpoint,
                "--n_sample",
                12,
                "--output",
                output,
                "--protocol",
                protocol,
            )[0]
            == 0
        )
        assert {(r["nearest_k"], r["protocol"]["name"]) for r in read_records(output)} == {(k, protocol)}


def test_published_precision_draws_its_reals(command, face_lmdb, checkpoint, tmp_path):
    """Under `paper` FID takes the first real images, as its code did; precision and recall draw from all of them."""
    output = tmp_path / "m.jsonl"
    flags = ["--real", face_lmdb, "--fake", checkpoint, "--n_sample", 12, "--protocol", "paper", "--output", output]
    assert command(fid, *flags)[0] == 0 and command(prdc, *flags)[0] == 0
    assert {r["metric"]: r["real"]["chosen"] for r in read_records(output)} == {
        "fid-tiny": "first",
        "kid-tiny": "first",
        "precision-tiny": "drawn",
        "recall-tiny": "drawn",
        "density-tiny": "drawn",
        "coverage-tiny": "drawn",
    }
    flags = [face_lmdb, "--size", 16, "--n_sample", 12, "--protocol", "paper", "--seed", 1, "--out", tmp_path / "r.npz"]
    assert command(extract_features, *flags, "--order", "drawn")[0] == 0
    assert load_features(tmp_path / "r.npz").info["digest"] == read_records(output)[-1]["real"]["digest"]


def test_repeated_images_and_unlike_sizes_are_said(command, face_folder, tmp_path):
    """Copies have balls of no radius (all-equal fakes: recall 0); sides of two sizes are told apart by their resize."""
    small, output = tmp_path / "small", tmp_path / "m.jsonl"
    small.mkdir()
    with Image.open(next(face_folder.glob("face 03.png"))) as image:
        for i in range(8):
            image.resize((20, 20)).save(small / f"{i}.png")
    status, out, err = command(prdc, "--real", face_folder, "--fake", small, "--output", output, "--nearest_k", 3)
    assert status == 0, err
    assert "warning: 7 of 8 generated images have exactly the features of another" in err
    assert "warning: real images have 40x40 pixels, generated ones 20x20" in err and err.count("warning: ") == 2
    assert "tf-compat, tiny features, k = 3:" in out and "truncation" not in out
    result = {r["metric"]: r for r in read_records(output)}
    assert result["recall-tiny"]["value"] == 0 and len(result["recall-tiny"]["notes"]) == 2


def test_sizes_of_the_generated_images(command, face_folder, face_lmdb, tmp_path):
    """An LMDB of several sizes gives the one of the generated images, also where those lie in a folder."""
    small, output = tmp_path / "small", tmp_path / "m.jsonl"
    small.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 9, 9)).save(small / f"{i}.png")
    assert command(prdc, "--real", face_lmdb, "--fake", small, "--output", output)[0] == 0
    assert {(r["real"]["size"], r["fake"]["size"]) for r in read_records(output)} == {(8, 8)}
    assert not read_records(output)[0]["notes"]


def test_features_files_stand_for_images(command, face_lmdb, checkpoint, tmp_path):
    outputs, flags = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ["--n_sample", 14]
    assert command(extract_features, face_lmdb, "--size", 16, "--out", tmp_path / "r.npz", *flags, "--seed", 1)[0] == 0
    assert command(extract_features, checkpoint, "--out", tmp_path / "f.npz", *flags)[0] == 0
    sides = [(face_lmdb, checkpoint), (tmp_path / "r.npz", tmp_path / "f.npz")]
    for (real, fake), output in zip(sides, outputs, strict=True):
        assert command(prdc, "--real", real, "--fake", fake, *flags, "--output", output)[0] == 0
    first, second = ([(r["metric"], r["value"], r["real"]["digest"]) for r in read_records(o)] for o in outputs)
    assert first == second


def test_the_published_flags(command, face_lmdb, checkpoint, tmp_path, monkeypatch):
    """calc_prdc.py --dataset, fid.py --inception, calc_inception.py PATH; --ckpt ./checkpoint where none is given."""
    monkeypatch.chdir(checkpoint.parent.parent)
    flags = ["--n_sample", 16, "--size", 16, "--output", tmp_path / "m.jsonl"]
    status, _, err = command(prdc, "--dataset", face_lmdb, *flags, "--start_num", 11)
    assert status == 0, err
    monkeypatch.chdir(tmp_path)
    assert command(extract_features, face_lmdb, "--n_sample", 16, "--size", 16, "--seed", 1)[0] == 0
    assert load_features(tmp_path / "features-faces ü.npz").values.shape[0] == 16
    assert command(fid, "--inception", "features-faces ü.npz", "--ckpt", checkpoint, *flags)[0] == 0
    assert {r["step"] for r in read_records(tmp_path / "m.jsonl")} == {20}


def test_a_checkpoint_exported_meanwhile_is_named(command, face_lmdb, checkpoint, tmp_path):
    with pytest.warns(UserWarning, match=r"000020.pt does not exist any more: .*000020.safetensors, .* is read"):
        status, out, _ = command(
            fid,
            *("--real", face_lmdb, "--fake", checkpoint.with_suffix(".pt")),
            *("--n_sample", 12, "--output", tmp_path / "m.jsonl"),
        )
    assert status == 0 and "000020.safetensors" in out
    assert read_records(tmp_path / "m.jsonl")[0]["fake"]["path"].endswith("000020.safetensors")


def test_results_that_cannot_be_kept_are_printed(command, face_lmdb, checkpoint, tmp_path):
    """Neither the cache nor the results file can be written: the number is on stdout all the same."""
    (tmp_path / "file").write_text("no folder")
    flags = ["--real", face_lmdb, "--fake", checkpoint, "--n_sample", 12]
    with pytest.warns(UserWarning, match="features are not cached"):
        status, out, err = command(
            fid, *flags, "--cache_dir", tmp_path / "file" / "cache", "--output", tmp_path / "file" / "m.jsonl"
        )
    assert status == 1 and "fid-tiny" in out and str(tmp_path / "file") in err


def test_values_that_are_not_finite_are_printed(capsys):
    features = Features(torch.zeros(8, 2), {"n": 8}, {"name": "squeeze"}, {"name": "clean"})
    (record,) = evaluation.evaluate(features, features, ["fid"])
    evaluation.report("x.pt", [record | {"value": None}])
    assert "fid-squeeze nan" in capsys.readouterr().out


def test_mistakes_are_one_line(command, face_folder, checkpoint, tmp_path):
    status, _, err = command(fid, "--real", face_folder)
    assert status == 2 and "which images are to be evaluated?" in err
    status, _, err = command(fid, "--real", tmp_path / "none", "--fake", checkpoint, "--n_sample", 5)
    assert status == 1 and err.count("error: ") == 1 and "does not exist" in err
    status, _, err = command(prdc, "--real", face_folder, "--fake", checkpoint, "--n_sample", 4, "--cache_dir", "none")
    assert status == 1 and "nearest_k 5: expected at least 1 and fewer than the 4 real points" in err
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())
    assert command(fid, "--real", face_folder, "--fake", checkpoint, "--n_sample", 0)[0] == 2
    status, _, err = command(fid, "--real", face_folder, "--fake", face_folder, "--truncation", "0.7")
    assert status == 1 and "holds images: --truncation 0.7 is for images yet to be made" in err
    status, _, err = command(extract_features, checkpoint, "--truncation", "0.5,0.7")
    assert status == 2 and "--truncation takes one value here, got 2" in err
    for flag, value in (
        ("--nearest_k", 0),
        ("--noise", "loud"),
        ("--seed", -1),
        ("--batch", 0),
        ("--workers", -1),
        ("--size", 0),
    ):
        assert command(prdc, "--real", face_folder, "--fake", face_folder, flag, value)[0] == 2
