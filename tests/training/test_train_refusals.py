"""train.py: every mistake a user can make."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from train_runs import checkpoint, end, error_line, good, start

import train
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import run
from common.generator_file import export_ema
from model import Generator, GeneratorConfig, load_generator

# -- refusals ------------------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_wrong_data(face_lmdb, start_run, tmp_path):
    """No images, no such size, cut short, nothing there: said before anything is written."""
    empty, short, building = tmp_path / "empty", tmp_path / "short.lmdb", tmp_path / "absent"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    shutil.copytree(face_lmdb, short)
    data = (short / "data.mdb").read_bytes()
    (short / "data.mdb").write_bytes(data[: len(data) * 2 // 3])
    for flags, words in (
        ((empty,), ["empty", "no images"]),
        ((building,), ["absent", "does not exist"]),
        ((face_lmdb, "--size", 64), ["64", "8, 16, 32"]),
        ((short,), ["short.lmdb", "prepare_data.py"]),
    ):
        ending = start_run("--iter", 1, *flags)
        assert ending.status == 1, flags
        line = error_line(ending)
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_continued_run_reads_its_networks_from_the_file(face_lmdb, straight, tmp_path, capsys):
    """The architecture is never asked for again; a new run from weights takes theirs as well."""
    folder, ckpt = tmp_path / "again", straight / "checkpoint" / "000020.pt"
    shutil.copytree(straight, folder)
    flags = ["--path", str(face_lmdb), "--device", "cpu", "--batch", "4", "--workers", "0", "--n_sample", "4"]
    for extra in (
        ["--exp_name", str(folder), "--resume", "auto", "--iter", "21"],
        ["--exp_name", str(tmp_path / "new"), "--init_from", str(ckpt), "--iter", "1"],
    ):
        assert run(train.main, train.build_parser(), flags + extra) == 0, capsys.readouterr().err
        options = json.loads((Path(extra[1]) / "options.json").read_text(encoding="utf-8"))["options"]
        assert (options["size"], options["style_dim"], options["w_space"]) == (16, 32, False)
    assert checkpoint(folder, 21)["step"] == 21


def test_a_run_without_noise_stays_so(face_lmdb, start_run, published_file, tmp_path):
    """--noise is of the run: a resumed one has it from the file, as a new run from its weights, and none other."""
    good(start_run(face_lmdb, "--iter", 1, "--noise", "none"))
    first = tmp_path / "run" / "checkpoint" / "000001.pt"
    ending = start_run(face_lmdb, "--iter", 3, "--resume", "auto", "--noise", "random")
    assert ending.status == 1 and "was trained with --noise none, not random" in error_line(ending)
    export_ema(load_checkpoint(first), exported := tmp_path / "exported.safetensors")
    for folder, flags, noise, steps in (
        ("run", ("--resume", "auto"), "none", 2),
        ("export", ("--init_from", exported), "none", 1),
        ("warm", ("--init_from", first), "none", 1),
        ("other", ("--init_from", first, "--noise", "random"), "random", 1),
        ("old", ("--resume", published_file), "random", 21),  # of a program without the flag
    ):
        good(start_run(face_lmdb, "--iter", steps, "--exp_name", tmp_path / folder, *flags))
        options = json.loads((tmp_path / folder / "options.json").read_text(encoding="utf-8"))["options"]
        assert options["noise"] == noise, folder
        state = checkpoint(tmp_path / folder, steps)
        assert any(state["g"][name].any() for name in state["g"] if name.endswith("noise.weight")) == (noise != "none")


def test_wrong_checkpoints(face_lmdb, start_run, straight, tmp_path):
    """Another architecture, a web page, a pickle that would run code, a generator alone, a torn file."""
    state = checkpoint(straight, 20)
    published = {name: state[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
    files = {name: tmp_path / name for name in ("own.pt", "page.pt", "evil.pt", "alone.pt", "torn.pt", "published.pt")}
    save_checkpoint(files["own.pt"], state)
    torch.save(published, files["published.pt"])
    files["page.pt"].write_text("<!doctype html><html><head><title>Google Drive - Quota exceeded</title></html>")
    files["evil.pt"].write_bytes(pickle.dumps({"g": RunsCode(tmp_path / "was run")}))
    torch.save({"g_ema": state["g_ema"]}, files["alone.pt"])
    files["torn.pt"].write_bytes(files["own.pt"].read_bytes()[:-5000])
    for flag in ("--ckpt", "--init_from"):
        for name, changes, words in (
            ("own.pt", ("--w_space",), ["own.pt", "another architecture", "w_space"]),
            ("own.pt", ("--style_dim", 48), ["--style_dim 48 here, 32 in the file"]),
            ("own.pt", ("--size", 8), ["own.pt", "another architecture", "--size 8 here, 16 in the file"]),
            ("published.pt", ("--channel_max", 4), ["published.pt", "another architecture"]),
            ("page.pt", (), ["page.pt", "web page"]),
            ("evil.pt", (), ["evil.pt"]),
            ("torn.pt", (), ["torn.pt", "truncated"]),
            ("absent.pt", (), ["absent.pt", "no such"]),
        ):
            ending = start_run(face_lmdb, flag, files.get(name, tmp_path / name), "--iter", 30, *changes)
            assert ending.status == 1, (flag, name)
            line = error_line(ending)
            assert all(word in line for word in words), line
    ending = start_run(face_lmdb, "--ckpt", files["alone.pt"], "--iter", 30)
    assert ending.status == 1 and "lacks g, d, g_optim, d_optim" in error_line(ending)
    assert not (tmp_path / "was run").exists() and not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(face_lmdb, start_run, straight, tmp_path):
    good(start_run(face_lmdb, "--iter", 2, "--save_every", 1))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    first = tmp_path / "run" / "checkpoint" / "000001.pt"
    for flags in ((), ("--init_from", first), ("--ckpt", straight / "checkpoint" / "000020.pt"), ("--resume", first)):
        ending = start_run(face_lmdb, "--iter", 30, *flags)
        assert ending.status == 1, flags
        assert "already holds a run" in error_line(ending) and "--exp_name" in error_line(ending)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    newest = tmp_path / "run" / "checkpoint" / "000002.pt"
    good(start_run(face_lmdb, "--iter", 3, "--ckpt", newest))


def test_a_run_folder_that_cannot_be(face_lmdb, start_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/below"):
        ending = start_run(face_lmdb, "--iter", 1, "--exp_name", tmp_path / name)
        assert ending.status == 1 and "file" in error_line(ending)


MISUSE = """
DATA --path DATA | DATA --ckpt a.pt --init_from b.pt | DATA --resume auto --ckpt b.pt | DATA --iter 0 | DATA --batch 0 |
DATA --size 100 | DATA --style_dim 40 | DATA --micro_batch half | DATA --micro_batch -1 | DATA --micro_batch 3 |
DATA --augment_p 0.5 | DATA --keep -1 | DATA --workers -1 | DATA --precision fp8 | DATA --path_reg 2"""


@pytest.mark.parametrize("flags", ["", *MISUSE.split("|")])
def test_misuse_of_flags_is_status_2(flags, face_lmdb, start_run, tmp_path):
    ending = start_run(*(face_lmdb if flag == "DATA" else flag for flag in flags.split()))
    assert ending.status == 2 and "Traceback" not in ending.err
    assert not (tmp_path / "run").exists()


def test_a_user_error_from_the_shell(root, tmp_path):
    """Once through a real process: status 1, nothing on stdout, one line on stderr."""
    page = tmp_path / "faces.lmdb"
    page.write_text("<html>not an LMDB</html>")
    ending = end(start([sys.executable, root / "train.py", page, "--device", "cpu"], tmp_path))
    assert ending.status == 1 and ending.out == ""
    assert ending.err.count("\n") == 1 and "faces.lmdb" in error_line(ending)
    assert list(tmp_path.iterdir()) == [page]


def test_generator_of_a_run_loads_by_itself(straight):
    """The checkpoint needs no flags to be used."""
    generator = load_generator(straight / "checkpoint" / "000020.pt")
    assert generator.config == GeneratorConfig(16, 32, 2, channel_max=8)
    assert isinstance(generator, Generator) and generator(generator.draw_z(2))[0].shape == (2, 3, 16, 16)
