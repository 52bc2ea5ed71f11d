"""common/cli.py: spelling of flags, help texts, and the exit status and message of every kind of ending."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import ArgumentParser, UsageError, UserError, positive, positive_int, run, several, whole


def build_parser():
    parser = ArgumentParser(prog="tool", description="first line\nsecond line")
    parser.add_argument("path", nargs="?", help="positional")
    parser.add_argument("--exp_name", default="test", help="name of the run")
    parser.add_argument("--max-bad", type=int, default=0, help="bad files allowed")
    parser.add_argument("--start_distance", type=float, default=-30.0, help="first distance")
    parser.add_argument("--w_space", action="store_true", help="train in W")
    return parser


@pytest.mark.parametrize("spelling", ["--exp_name", "--exp-name"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings(spelling, joined):
    args = build_parser().parse_args([f"{spelling}=a-b_c"] if joined else [spelling, "a-b_c"])
    assert args.exp_name == "a-b_c"


def test_declared_with_dash_and_mixed_spellings():
    args = build_parser().parse_args(["--max_bad", "3", "--w-space", "--start-distance", "-5"])
    assert (args.max_bad, args.w_space, args.start_distance) == (3, True, -5.0)


def test_values_are_left_alone():
    assert build_parser().parse_args(["--exp-name=--max_bad=1"]).exp_name == "--max_bad=1"
    assert build_parser().parse_args(["--", "--exp-name"]).path == "--exp-name"
    assert build_parser().parse_args(["-"]).path == "-"


def test_no_abbreviations():
    assert run(lambda args: None, build_parser(), ["--exp", "x"]) == 2


def test_help_keeps_lines_and_shows_defaults(capsys):
    assert run(lambda args: None, build_parser(), ["--help"]) == 0
    text = capsys.readouterr().out
    assert "first line\nsecond line" in text
    assert "(default: test)" in text and "(default: -30.0)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def raiser(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--size 100: expected a power of two"), "error: --size 100: expected a power of two"),
        (ValueError("two\n  lines"), "error: two lines"),
        (FileNotFoundError("a.pt: no such checkpoint"), "error: a.pt: no such checkpoint"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a b.pt"),
            "error: a b.pt: No such file or directory",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "out"), "error: out: File exists"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (MemoryError(), "error: out of memory: the machine has no more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        ),
    ],
)
def test_user_errors_are_one_line(error, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WPP_TRACEBACK", raising=False)
    assert run(raiser(error), build_parser(), []) == 1
    captured = capsys.readouterr()
    assert captured.err == message + "\n" and captured.out == ""


def test_other_ranks_say_who_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run(raiser(ValueError("no")), build_parser(), []) == 1
    assert capsys.readouterr().err == "error: no (rank 3)\n"


@pytest.mark.parametrize("error", [TypeError("bug"), KeyError("bug"), AssertionError("bug"), RuntimeError("bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(raiser(error), build_parser(), [])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("WPP_TRACEBACK", "1")
    with pytest.raises(UserError):
        run(raiser(UserError("x")), build_parser(), [])


def test_other_endings(capsys):
    assert run(lambda args: None, build_parser(), []) == 0
    assert run(lambda args: 7, build_parser(), []) == 7
    assert run(raiser(KeyboardInterrupt()), build_parser(), []) == 130
    assert run(raiser(UsageError("--a and --b")), build_parser(), []) == 2
    assert run(lambda args: None, build_parser(), ["--unknown"]) == 2


@pytest.mark.parametrize("package, file", [("cv2", "requirements.txt"), ("gradio", "requirements-extra.txt")])
def test_a_missing_package_is_named_with_the_file_that_lists_it(package, file, capsys):
    assert run(raiser(ModuleNotFoundError(name=package)), build_parser(), []) == 1
    assert f"needs the package {package}: pip install -r {file}\n" in capsys.readouterr().err


def test_another_pipe_that_breaks_is_an_error(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run(raiser(BrokenPipeError(errno.EPIPE, "Broken pipe")), build_parser(), []) == 1
    assert capsys.readouterr().err == "error: Broken pipe\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_is_no_error(stream, root):
    program = (
        "import sys; from common.cli import ArgumentParser, run_script\n"
        f"run_script(lambda args: print('line', file=sys.{stream}, flush=True), ArgumentParser())"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, **{"stderr": subprocess.PIPE, stream: writer})
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


def test_out_of_memory_of_torch(capsys):
    import torch

    assert run(raiser(torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore")), build_parser(), []) == 1
    assert capsys.readouterr().err == "error: out of memory: CUDA out of memory. Tried ...\n"


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_exit_process(world_size):
    """The status arrives, what was printed too, and what was to be done at exit is done; also for one of several."""
    program = (
        "import atexit, sys; from common.cli import exit_process\n"
        "atexit.register(lambda: print('at exit'))\nprint('out'); print('err', file=sys.stderr)\nexit_process(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "WORLD_SIZE": world_size},
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\nat exit\n", "err\n")


def test_a_flag_given_by_hand_wins_over_stored_settings():
    parser = ArgumentParser()
    parser.add_argument("path", nargs="?", help="h")
    parser.add_argument("--r1", type=float, default=10, help="h")
    parser.add_argument("--batch_size", type=int, default=4, help="h")
    parser.add_argument("--augment", action="store_true", help="h")
    args = parser.parse_args(["faces", "--batch-size=4"])  # the default's value, given by hand
    assert args.given == {"path", "batch_size"} and "given" not in vars(args)
    changed = args.fill({"r1": 0.1, "batch_size": 8, "augment": True, "path": "other", "of_another_version": 1})
    assert changed == {"r1": 0.1, "augment": True}
    assert (args.r1, args.batch_size, args.augment, args.path) == (0.1, 4, True, "faces")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x"])
@pytest.mark.parametrize("in_group", [False, True])
def test_no_number_is_other_than_finite(in_group, text, capsys):
    parser = ArgumentParser(prog="tool")
    holder = parser.add_argument_group("g").add_mutually_exclusive_group() if in_group else parser
    holder.add_argument("--lr", type=float, help="h")
    assert run(lambda args: pytest.fail("ran"), parser, [f"--lr={text}"]) == 2
    assert f"argument --lr: expected a finite number, not {text!r}" in capsys.readouterr().err
    assert parser.parse_args(["--lr=-1e-3"]).lr == -0.001


def test_what_is_wrong_in_a_list_is_named(capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--size", type=several(whole(1, 64)), default="8,16", help="h")
    assert parser.parse_args([]).size == (8, 16) and parser.parse_args(["--size", "4"]).size == (4,)
    parser.add_argument("--window", type=several(float), help="h")
    for flag, text, complaint in (
        ("--size", "4,x", "expected a whole number from 1 to 64, not 'x'"),
        ("--size", "65,4", "expected a whole number from 1 to 64, not '65'"),
        ("--size", "4,,8", "expected a whole number from 1 to 64, not ''"),
        ("--window", "0,nan", "expected a finite number, not 'nan'"),
    ):
        assert run(lambda args: pytest.fail("ran"), parser, [flag, text]) == 2
        assert f"argument {flag}: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, text", [("--fps", "0"), ("--fps", "-1"), ("--fps", "nan"), ("--n", "0"), ("--n", "1.5"), ("--n", "9" * 400)]
)
def test_positive_numbers(flag, text, capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--fps", type=positive, default=30, help="h")
    parser.add_argument("--n", type=positive_int, default=1, help="h")
    parser.add_argument("--seed", type=int, help="h")
    assert run(lambda args: pytest.fail("ran"), parser, [f"{flag}={text}"]) == 2
    assert f"argument {flag}" in capsys.readouterr().err
    assert run(lambda args: pytest.fail("ran"), parser, ["--seed", str(2**63)]) == 2
    args = parser.parse_args(["--fps", "0.5", "--n", "3", "--seed", str(2**63 - 1)])
    assert (args.fps, args.n, args.seed) == (0.5, 3, 2**63 - 1)


def test_a_hidden_alias_sets_the_new_flag_and_stands_in_no_help(capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--vision_aided", choices=("vgg", "squeeze"), help="h")
    parser.add_hidden_alias("--aid", "--vision_aided")
    args = parser.parse_args(["--aid", "vgg"])
    assert args.vision_aided == "vgg" and args.given == {"vision_aided"}
    assert parser.parse_args(["--vision-aided=squeeze"]).vision_aided == "squeeze"
    assert "--aid" not in parser.format_help()


@pytest.mark.parametrize("waiting", ["time.sleep(60)", "threading.Event().wait()"])
def test_sigterm_ends_with_a_line_after_the_cleaning_up(tmp_path, waiting):
    program = f"""
import threading, time
from pathlib import Path
from common.cli import ArgumentParser, run_script
def main(args):
    try:
        print("waiting", flush=True)
        {waiting}
    except Exception:
        print("taken for a failure")
    finally:
        print("cleaned up")
run_script(main, ArgumentParser())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "waiting\n"
    process.terminate()
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (143, "cleaned up\n", "terminated\n")


@pytest.mark.parametrize("folder", ["faces", "faces/", "./common/../op", ".", "tests/common"])
def test_no_result_goes_into_the_projects_own_folders(folder, root, tmp_path, monkeypatch, capsys):
    import align_faces
    import train

    monkeypatch.chdir(root)
    for script, flags in ((align_faces, ["--photos", "x", "--output_dir"]), (train, ["--path", "x", "--exp_name"])):
        assert run(lambda args: pytest.fail("ran"), script.build_parser(), [*flags, folder]) == 2
        assert f"{flags[-1]} {Path(folder)} is a folder of this project's code" in capsys.readouterr().err
        assert run(lambda args: None, script.build_parser(), [*flags, "faces_of_mine/"]) == 0
        monkeypatch.chdir(tmp_path)  # there the name is anybody's
        assert run(lambda args: None, script.build_parser(), [*flags, "faces"]) == 0
        monkeypatch.chdir(root)


def test_any_file_name_can_be_printed(root):
    program = (
        "from common.cli import ArgumentParser, run_script\n"
        "run_script(lambda args: print('caf\\udce9 \u4e2d'), ArgumentParser())"
    )
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith(b"caf\\udce9 "), done.stderr


def test_a_line_in_a_log_file_shows_at_once(root):
    """Not at the end of a training of days, nor never where it is killed."""
    program = (
        "import os; from common.cli import ArgumentParser, run_script\n"
        "run_script(lambda args: print('a new run') or os._exit(9), ArgumentParser())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (9, b"a new run\n")
