"""generate.py: its command line, mistakes, bad files, precision, several processes."""

import json
import sys

import numpy as np
import pytest
import torch
from generating import close, command, images_in, new_generator, seed_images
from processes import run_ranks

from common.checkpoint import save_checkpoint
from common.generator_file import export_ema
from common.latents import load_latents
from model import load_generator


@pytest.mark.parametrize(
    ("flags", "status", "word"),
    [
        (["--seeds", "5-2"], 2, "--seeds 5-2"),
        (["--seeds", "0", "--interpolate"], 2, "two seeds"),
        (["--mix", "0", "x"], 2, "--mix x"),
        (["--mix", "0", "1", "--mix_layers", "a"], 2, "--mix_layers a"),
        (["--mix", "0", "1", "--mix_layers", "4-9"], 1, "layers 0-5"),
        (["--mix", "0", "1", "--interpolate"], 2, "--interpolate"),
        (["--mix", "0", "1", "--grid"], 2, "--grid"),
        (["--latents", "x", "--seeds", "1"], 2, "--seeds"),
        (["--latents", "x", "--interpolate", "z"], 2, "z"),
        (["--latents", "absent ü"], 1, "absent ü"),
        (["--video", "a.mp4"], 2, "--interpolate"),
        (["--interpolate", "--video", "a.avi"], 2, ".webp"),
        (["--latents", "x", "--save_latents"], 2, "--save_latents"),
        (["--seeds", ""], 2, "is no seed"),
        (["--seeds", "0-4294967295"], 2, "more than 10,000,000 seeds"),
        (["--mix", "0", "1", "--mix_layers", "0-4294967295"], 2, "expected layers"),
        (["--grid", "-3"], 2, "--grid"),
        (["--mix_layers", "0-3"], 2, "--mix_layers is for --mix"),
        (["--frames", "5"], 2, "are for --interpolate"),
        (["--batch", "0"], 2, "--batch"),
        (["--frames", "0", "--interpolate"], 2, "--frames"),
        (["--fps", "0", "--interpolate"], 2, "--fps"),
        (["--truncation", "nan"], 2, "--truncation"),
        (["--noise_seed", "-1"], 2, "--noise_seed"),
        (["--noise_seed", "5"], 2, "--noise_seed is for --noise random"),
        (["--noise", "loud"], 2, "loud"),
        (["--device", "tpu"], 2, "--device tpu"),
    ],
)
def test_mistakes(wpp_ckpt, tmp_path, capsys, flags, status, word):
    assert command("--ckpt", wpp_ckpt, "--output_dir", tmp_path / "out", *flags) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and word in error
    assert not (tmp_path / "out").exists()


def test_a_seed_that_is_named_twice_is_one_image(wpp_ckpt, tmp_path, capsys):
    flags = ("--ckpt", wpp_ckpt, "--output_dir", tmp_path, "--device", "cpu", "--save_latents")
    assert command(*flags, "--seeds", "3-4,4-5,3") == 0
    assert "3 images, seed0003.png to seed0005.png" in capsys.readouterr().out
    assert load_latents(tmp_path / "latents").names == ["seed0003", "seed0004", "seed0005"]


def test_bad_checkpoints(tmp_path, capsys):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>quota</html>")
    save_checkpoint(tmp_path / "other.pt", {"weight": torch.zeros(3)})
    for name, word in (("absent.pt", "no such"), ("page.pt", "web page"), ("other.pt", "not a StyleGAN2 generator")):
        assert command("--ckpt", tmp_path / name) == 1
        error = capsys.readouterr().err.strip()
        assert word in error and len(error.splitlines()) == 1
    assert command("--seeds", "0") == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(wpp_ckpt, tmp_path, precision):
    folder = tmp_path / precision
    assert command("--ckpt", wpp_ckpt, "--seeds", "0-1", "--precision", precision, "--output_dir", folder) == 0
    full = seed_images(load_generator(wpp_ckpt), [0, 1])
    low = np.stack(list(images_in(folder).values()))
    assert 0 < np.abs(full.astype(int) - low).max() < 24


COMMANDS = (
    "--seeds 0-4 --grid --save_latents --noise random --trunc 0.5 --truncation_mean 20",
    "--mix 0-2 3",
    "--seeds 0-2 --interpolate --frames 3 --video {out}/a.gif",
)
IN_ONE_GROUP = """
import sys
import common.distributed
import generate
from common.cli import run

dist, shutdown = common.distributed.setup("cpu", timeout=240), common.distributed.shutdown
common.distributed.setup, common.distributed.shutdown = lambda *_, **__: dist, lambda: None  # one group for all
for command in sys.argv[1:]:
    assert run(generate.main, generate.build_parser(), command.split("|")) == 0
shutdown()
"""


@pytest.mark.slow
def test_two_processes_share_the_work(wpp_ckpt, root, tmp_path):
    """Over gloo: the same files as one process writes; frames and mixtures in the same order."""
    script = tmp_path / "all.py"
    script.write_text(IN_ONE_GROUP, encoding="utf-8")
    written, commands = {}, {}
    for name in ("one", "two"):
        out = str(tmp_path / name)
        first = ["--ckpt", str(wpp_ckpt), "--output_dir", out, "--device", "cpu", "--batch", "1"]  # else sums differ
        commands[name] = [[*first, *text.replace("{out}", out).split(" ")] for text in COMMANDS]

    two = [sys.executable, script, *("|".join(flags) for flags in commands["two"])]
    run_ranks(two, env={"PYTHONPATH": str(root)}, timeout=400)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # their number, too, may change the order of a sum
        assert [command(*flags) for flags in commands["one"]] == [0] * len(COMMANDS)
    finally:
        torch.set_num_threads(threads)

    for name in commands:
        folder = tmp_path / name
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        written[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    assert len(written["one"]) == 10 and written["one"] == written["two"]
    assert json.loads(written["one"]["latents/latents.json"])["names"][-1] == "seed0004"


def test_the_files_settings_hold_where_no_flag_is_given(tmp_path, capsys):
    """truncation and noise of `recommended`; --preset published leaves them out, saved latents are drawn already."""
    network, file = new_generator(), tmp_path / "face.safetensors"
    state = {"g_ema": network.state_dict(), "config": network.config.to_dict()}
    export_ema(state, file, recommended={"generate": {"truncation": 0.5, "noise": "none"}, "projector": {"step": 7}})
    for flags, truncation, noise, said in (
        ([], 0.5, "none", "--noise none --truncation 0.5"),
        (["--truncation", "0.8"], 0.8, "none", "--noise none"),
        (["--preset", "published"], 1.0, "const", ""),
    ):
        out = tmp_path / "-".join(["out", *flags])
        assert command("--ckpt", file, "--seeds", "3", "--truncation_mean", "100", "--output_dir", out, *flags) == 0
        assert said in capsys.readouterr().err
        expected = seed_images(network, [3], noise=noise, truncation=truncation)
        assert close(images_in(out)["seed0003.png"], expected[0])
