"""benchmarks/bench_train.py and bench_generate.py at a size that takes seconds: rows, the line of JSON, arithmetic."""

import json
from collections import Counter

import pytest
import torch

from benchmarks import bench_generate, bench_train, peers
from benchmarks.measuring import ChildError, child, flag_list, measure_or_say
from benchmarks.rounds import PHASES, Schedule, measure_schedule, seconds_per_step
from common.cli import UsageError, run

TINY = ["--channel_max", "4", "--n_mlp", "1", "--repeats", "1", "--device", "cpu", "--threads", "1"]
PEER_MODEL = """
import torch
from torch import nn
import op

class Generator(nn.Module):
    def __init__(self, size, style_dim, n_mlp, channel_multiplier):
        super().__init__()
        self.size, self.style, self.pixel = size, nn.Linear(style_dim, style_dim), nn.Linear(style_dim, 3)

    def forward(self, styles, return_latents=False, input_is_latent=False, randomize_noise=True):
        latent = styles[0] if input_is_latent else self.style(styles[0])
        latents = latent[:, None].repeat(1, 4, 1)
        image = torch.tanh(self.pixel(latents).sum(1))[:, :, None, None].repeat(1, 1, self.size, self.size)
        return image, latents if return_latents else None

class Discriminator(nn.Module):
    def __init__(self, size, channel_multiplier):
        super().__init__()
        self.score = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 4), nn.Softplus(), nn.Linear(4, 1))

    def forward(self, x):
        return self.score(x)
"""


def run_benchmark(module, flags, capsys):
    """(lines of the table, its JSON)"""
    assert run(module.main, module.build_parser(), flags) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


@pytest.mark.slow
def test_training_table(capsys, tmp_path, forks):
    """Ours, in two gloo processes too, the original formulation, and a peer whose folder is something else."""
    flags = "--sizes 8 --batches 2 --original --processes 2 --steps 2 --ops ref --augment 0.5 --peer_nvidia".split()
    flags += [str(tmp_path), *TINY]
    lines, found = run_benchmark(bench_train, flags, capsys)
    assert found["benchmark"] == "train" and found["ops"] == "ref" and found["device"] == "cpu" and found["commit"]
    rows = {(row["formulation"], row["processes"]): row for row in found["rows"]}
    assert list(rows) == [("original", 1), ("nvidia", 1), ("ours", 1), ("ours", 2)]
    reason = rows.pop(("nvidia", 1))["error"]
    assert reason.startswith(f"{tmp_path} holds no training of the peer's") and "\n" not in reason
    for (_, processes), row in rows.items():
        assert list(row["seconds"]) == list(PHASES) and min(row["seconds"].values()) > 0
        weighted = seconds_per_step(row["seconds"], {"r1": 16, "path": 4})
        assert row["images_per_s"] == pytest.approx(2 * processes / weighted)
        assert row["stepped_images_per_s"] > 0 and row["peak_bytes"] > 2**26
    ratios = {(ratio["processes"], ratio["to"]): ratio["images_per_s"] for ratio in found["ratios"]}
    one, two, original = (rows[key]["images_per_s"] for key in (("ours", 1), ("ours", 2), ("original", 1)))
    assert ratios == {(1, "original fp32"): one / original, (2, "one process"): two / one}
    table = [line for line in lines if line.startswith(("original ", "ours", "nvidia"))]
    assert len(table) == 4 and all("8" in line for line in table) and reason in table[1]


def test_generator_table(capsys, forks):
    flags = ["--sizes", "8", "--batches", "2", "--original", "--drawn", "3", "--ops", "ref", *TINY]
    lines, found = run_benchmark(bench_generate, flags, capsys)
    assert found["benchmark"] == "generate"
    original, ours = found["rows"]
    assert (original["formulation"], ours["formulation"]) == ("original", "ours")
    for row in (original, ours):
        assert set(row["seconds"]) == {"mapping", "synthesis", "forward", "latent"}
        assert min(row["seconds"].values()) > 0
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"]["forward"]) and row["peak_bytes"] > 2**26
    assert ours["drawn_per_s"] > 0 and "drawn_per_s" not in original
    (ratio,) = found["ratios"]
    assert ratio["to"] == "original fp32" and ratio["images_per_s"] == ours["images_per_s"] / original["images_per_s"]
    assert sum(line.startswith(("original ", "ours ")) for line in lines) == 2


TOO_MANY = 10**12  # images of 8 px


@pytest.mark.parametrize(
    "module, row",
    [
        (bench_train, bench_train.Row("ours", 8, TOO_MANY, "fp32")),
        (bench_generate, bench_generate.Row("ours", "w", 8, TOO_MANY, "fp32")),
    ],
)
def test_a_row_that_does_not_fit_says_so(module, row):
    args = module.build_parser().parse_args(TINY)
    assert measure_or_say(lambda: module.measure_here(row, args)) == {"error": "out of memory"}


def test_checkpoints_and_spaces(root):
    """--ckpt decides the size and the space; --spaces are rows of their own."""
    parser = bench_generate.build_parser()
    args = parser.parse_args(["--sizes", "8", "16", "--spaces", "w", "w++", "--precision", "bf16", "fp32", *TINY])
    rows = list(bench_generate.rows_of(args))
    assert len(rows) == 8 and {(row.size, row.space) for row in rows} == {(8, "w"), (8, "w++"), (16, "w"), (16, "w++")}
    args.ckpt = str(root / "checkpoints" / "face-wpp-128.safetensors")
    generator = bench_generate.make_generator(rows[0], args, torch.device("cpu"))
    assert generator.config.size == 128 and not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


# -- a peer, in place of which stands a few lines with its interface -------------------------------------------------


def test_a_peer_is_measured_by_its_own_modules(tmp_path, forks):
    """`model` and `op` must be the peer's, not ours."""
    (tmp_path / "op").mkdir()
    (tmp_path / "model.py").write_text(PEER_MODEL)
    (tmp_path / "op" / "__init__.py").write_text("from op import conv2d_gradfix\n")
    gradfix = "import contextlib\nno_weight_gradients = contextlib.nullcontext\n"
    (tmp_path / "op" / "conv2d_gradfix.py").write_text(gradfix)
    args = bench_train.build_parser().parse_args(["--peer_rosinality", str(tmp_path), "--steps", "2", *TINY])
    args.channel_max = 512
    row = bench_train.Row("rosinality", 8, 2, "fp32")
    found = bench_train.measure_apart(row, args)
    assert list(found["seconds"]) == list(PHASES) and found["images_per_s"] > 0 and found["stepped_images_per_s"] > 0
    args.channel_max = 64
    with pytest.raises(UsageError, match="rosinality's widths are fixed: --channel_max 512, not 64"):
        peers.Rosinality(args, torch.device("cpu"))


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_phases_are_weighted_by_how_often_they_run():
    seconds = {"d": 1.0, "r1": 16.0, "g": 2.0, "path": 4.0, "average": 0.5}
    assert seconds_per_step(seconds, {"r1": 16, "path": 4}) == 1 + 1 + 2 + 1 + 0.5


def test_a_schedule_runs_what_is_due():
    runs = Counter()
    phases = {name: (lambda name=name: runs.update([name])) for name in PHASES}
    Schedule(phases, {"r1": 16, "path": 4}).run(16)
    assert runs == {"d": 16, "r1": 1, "g": 16, "path": 4, "average": 16}
    steps = []
    schedule = Schedule(phases, {}, steps.append)
    result = measure_schedule(schedule, 3, repeats=2, steps=4, device=torch.device("cpu"))
    assert steps == [0, 1, 2, 3] and runs["r1"] == 1 + 3  # a warm-up and two
    assert result["images_per_s"] == 3 / sum(result["seconds"].values())


def test_ours_runs_the_schedule_of_train(monkeypatch):
    """`stepped` is Trainer.step itself, from step 0 of the schedule on."""
    made, make = [], bench_train.make_trainer
    monkeypatch.setattr(bench_train, "make_trainer", lambda *args: made.append(make(*args)) or made[-1])
    args = bench_train.build_parser().parse_args(TINY)
    dist = bench_train.Distributed(0, 1, torch.device("cpu"))
    schedule = bench_train.our_schedule(bench_train.Row("ours", 8, 2, "fp32"), args, dist)
    assert list(schedule.phases) == list(PHASES) and schedule.every == {"r1": 16, "path": 4}
    schedule.run(2)
    (trainer,) = made
    assert trainer.n_steps == 2 and set(trainer.stats.read()) == {"d", "real", "fake", "r1", "g", "path", "path_length"}


# -- the machinery ---------------------------------------------------------------------------------------------------


def test_flags_of_a_child():
    flags = {"sizes": [8, 16], "w_space": True, "original": False, "ckpt": None, "device": "cpu"}
    assert flag_list(flags) == ["--sizes", "8", "16", "--w_space", "--device", "cpu"]


def test_a_child_that_fails_says_why_in_a_line(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint('a traceback\\nerror: no such thing', file=sys.stderr)\nsys.exit(1)\n")
    with pytest.raises(ChildError, match="^no such thing$"):
        child(script, {})
    script.write_text(
        "import os, signal, time\nif os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)\n"
    )
    assert measure_or_say(lambda: child(script, {}, processes=2)) == {"error": "out of memory"}
    script.write_text("import os, json\nprint('a table')\nprint(json.dumps(os.environ['WORLD_SIZE']))\n")
    assert child(script, {}, processes=2) == "2"


def test_nothing_begins_after_the_budget(capsys):
    flags = ["--sizes", "8", "16", "--budget", "1e-9", *TINY]
    for module in (bench_train, bench_generate):
        lines, found = run_benchmark(module, flags, capsys)
        assert [row["error"] for row in found["rows"]] == ["left out: the time budget is spent"] * 2
        assert sum("left out: the time budget is spent" in line for line in lines) == 2
