"""common/runs.py: the run folder, its log after a crash and after a resume, and other ranks that stay silent."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError
from common.cli import ArgumentParser, UserError
from common.distributed import Distributed
from common.runs import Run, StepBar, format_duration, open_run, read_log, restore_options, to_plain, truncate_log


def steps(path):
    return [record["step"] for record in read_log(path)]


def test_folder_and_options(tmp_path):
    folder = tmp_path / "runs" / "erster Lauf ü"
    with Run(folder, {"size": 32, "path": Path("x/ü"), "lr": 0.002}) as run:
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
            "checkpoint",
            "sample",
            "similarity",
            "tensorboard_log",
        ]
        assert run.path("sample", "deep", "0.png").parent.is_dir()
        run.write_json("result.json", {"fid": math.nan, "n": torch.tensor(3)})
    written = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    assert written["options"] == {"size": 32, "path": "x/ü", "lr": 0.002}
    assert written["command"][1:] == sys.argv and written["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((folder / "result.json").read_text()) == {"fid": None, "n": 3}


def test_earlier_options_are_kept(tmp_path):
    for size in (1, 2, 3):
        Run(tmp_path, {"size": size}).close()
    sizes = [json.loads((tmp_path / f"options{n}.json").read_text())["options"]["size"] for n in ("", "-1", "-2")]
    assert sizes == [3, 1, 2]


def test_log(tmp_path):
    with Run(tmp_path, {}) as run:
        run.log(0, "Loss", d=torch.tensor(1.5), g=math.inf, note="ok")
        run.log(1, "Path", **{"mean path": 2})
        assert steps(tmp_path / "log.jsonl") == [0, 1]  # readable while the run goes on
    first, second = read_log(tmp_path / "log.jsonl")
    assert (first["group"], first["d"], first["g"], first["note"]) == ("Loss", 1.5, None, "ok")
    assert second["mean path"] == 2 and second["time"] >= first["time"]


def test_torn_last_line(tmp_path):
    log = tmp_path / "log.jsonl"
    with Run(tmp_path, {}) as run:
        for step in range(3):
            run.log(step, "Loss", d=1.0)
    whole = log.read_bytes()
    for torn in (b'{"step": 3, "ti', b"\0\0\0\n"):  # killed while writing; power cut
        log.write_bytes(whole + torn)
        assert steps(log) == [0, 1, 2]
        with Run(tmp_path, {}) as run:
            run.log(3, "Loss", d=1.0)
        assert steps(log) == [0, 1, 2, 3]


def test_damage_in_the_middle_is_an_error(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is no line of a log: not JSON"):
        read_log(log)
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "absent.jsonl")


def test_truncate_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"note": "ü"}\n{"step": 1}\n{"step": 2}\n{"step": 1}\n', encoding="utf-8")
    truncate_log(log, 1)
    assert [record.get("step") for record in read_log(log)] == [0, None]


def test_resume_repeats_no_step(tmp_path):
    for first, last, resume_step in ((0, 15, None), (10, 20, 10)):
        with Run(tmp_path, {}, resume_step=resume_step) as run:
            for step in range(first, last):
                run.log(step, "Loss", d=float(step))
    assert steps(tmp_path / "log.jsonl") == list(range(20))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume_step in (((0, 1, 2), None), ((1, 2, 3), 1)):
        with Run(tmp_path, {}, resume_step=resume_step) as run:
            for step in steps:
                run.log(step, "Loss", d=float(step), g=math.nan, note="text")
    board = EventAccumulator(str(tmp_path / "tensorboard_log"))
    board.Reload()
    assert board.Tags()["scalars"] == ["Loss/d"]
    assert [event.step for event in board.Scalars("Loss/d")] == [0, 1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    with Run(tmp_path / "run", {}, main=False) as run:
        run.log(0, "Loss", d=1.0)
        run.write_json("a.json", {})
        assert run.path("sample", "a.png") == tmp_path / "run" / "sample" / "a.png"
    assert not (tmp_path / "run").exists()


def test_to_plain():
    assert to_plain({1: (torch.ones(2), {"a"}, range(2), Path("p"), True)}) == {"1": [[1, 1], ["a"], [0, 1], "p", True]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (7383, "2h 03m"),
        (93600, "1d 02h"),
        (-1, "0s"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_ranks_that_begin_at_different_steps_are_refused(tmp_path, monkeypatch):
    """Each node may have a run folder of its own, or an old view of a shared one."""
    monkeypatch.setattr("common.runs.gather_list", lambda step: [11, step])
    with pytest.raises(UserError, match="different steps \\(1, 11\\): .*run is not one folder"):
        with open_run(tmp_path / "run", {}, Distributed(1, 2, "cpu"), resume_step=1):
            pytest.fail("it begins")


def test_step_bar_without_a_terminal(capsys):
    """In a log file: one line per report, nothing else, and nothing from the other ranks."""
    for main in (True, False):
        with StepBar(10, 2, main=main) as bar:
            bar.update()
            bar.report(3, "d 1.000")
    assert capsys.readouterr().err == "step 3 of 10: d 1.000\n"


# -- options of a continued run ------------------------------------------------------------------------------------


def parse(*argv):
    parser = ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--iter", type=int, default=100)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--condition")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resume")
    return parser.parse_args(argv)


def test_a_continued_run_keeps_its_options():
    stored = {"lr": 0.006, "iter": 40, "augment": True, "condition": "x", "workers": 9, "resume": None, "gone": 1}
    args = parse("--resume", "auto")
    assert restore_options(args, stored, "7.pt") == ""
    restored = {"lr": 0.006, "iter": 40, "augment": True, "condition": "x"}
    assert vars(args) == {**restored, "workers": 2, "resume": "auto"}, "machine and invocation stay"
    args = parse()
    restore_options(args, stored, "7.pt", keep=("condition",))
    assert args.condition is None and args.augment


def test_a_flag_given_by_hand_wins_and_is_announced():
    args = parse("--lr", "0.002", "--iter", "60")
    assert restore_options(args, {"lr": 0.006, "iter": 60, "augment": True}, "7.pt") == (
        "options of 7.pt, but --lr 0.002 (was 0.006)"
    )
    assert (args.lr, args.iter, args.augment) == (0.002, 60, True)


def test_an_option_of_another_type_is_refused():
    for stored in ({"lr": "high"}, {"iter": [1]}, {"augment": "yes"}):
        with pytest.raises(CheckpointError, match=f"7.pt: its option {next(iter(stored))}"):
            restore_options(parse(), stored, "7.pt")
