"""The shape of the repository: who may import whom, what importing costs and does, how scripts start, and that every
command written in the README, the docs, the Makefile and the docstrings is one that the scripts understand."""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"tests", "docs", "checkpoints", "demo", "runs"}  # folders without modules of the toolkit


# -- the modules ---------------------------------------------------------------------------------------------------


def find_modules():
    """{dotted name: file} of everything that can be imported from the root."""
    files = [*ROOT.glob("*.py")]
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in OUTSIDE:
            files += [file for file in folder.rglob("*.py") if "__pycache__" not in file.parts]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return dict(sorted(names.items()))


def runs_as_main(file):
    """Has it an `if __name__ == "__main__":`?"""
    tests = [node.test for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


MODULES = find_modules()
# common/weights.py is a module that others use and a small command as well: not a stage
SCRIPTS = {n: f for n, f in MODULES.items() if runs_as_main(f) and not n.startswith(("common.", "benchmarks"))}
COMMANDS = SCRIPTS | {n: f for n, f in MODULES.items() if n.startswith("common.") and runs_as_main(f)}


# The import rule (docs/architecture.md): a module imports from its own floor and the floors before it, by any means.
FLOORS = (
    {"op"},
    {"common"},
    {"layers", "model", "dataset", "faces", "scorer"},
    {"perceptual", "sampling", "interop"},
    {"inversion", "editing"},
    {"training", "pSp", "metrics", "demo_app"},
    {"tools", "benchmarks"},  # and all scripts
)


def floor(name):
    """Index into FLOORS; scripts stand on the last one."""
    top = name.partition(".")[0]
    if name in SCRIPTS:
        return len(FLOORS) - 1
    return next(i for i, rooms in enumerate(FLOORS) if top in rooms)


def local_imports(name, file):
    """Modules of the toolkit that `file` imports, anywhere in it, a string given to importlib included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            candidates = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from (other for other in candidates if other in MODULES and other != name)


def test_there_are_modules_and_scripts():
    assert {"op", "model", "layers", "dataset", "training", "common.cli", "common.lmdb_store"} <= set(MODULES)
    assert {"train", "prepare_data"} <= set(SCRIPTS) and not {"model", "training", "common.weights"} & set(SCRIPTS)
    assert len(list(ROOT.glob("*.py"))) <= 16, "modules belong in rooms"


def test_import_rule():
    """No import runs up a floor or into a script, and the rooms of a floor do not import each other in a circle."""
    wrong, rooms = [], {}
    for name, file in MODULES.items():
        for other in local_imports(name, file):
            if other in SCRIPTS or floor(other) > floor(name):
                wrong.append(f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})")
            if name not in SCRIPTS:
                rooms.setdefault(name.partition(".")[0], set()).add(other.partition(".")[0])
    assert wrong == []
    assert circles(rooms) == []
    modules = {name: set(local_imports(name, file)) for name, file in MODULES.items() if not name.endswith("__init__")}
    assert circles(modules) == []


def circles(arrows):
    """Circles among {name: names it points at}, each as one list of names; an arrow to itself is none."""
    found, done = [], set()

    def follow(name, path):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(arrows.get(name, ())):
                if other != name:
                    follow(other, [*path, name])
            done.add(name)

    for name in sorted(arrows):
        follow(name, [])
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c", "b"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


BARE = re.compile(r"(Of|As|What|How|The same)\b")


def test_docstrings_stand_alone():
    """No docstring opens with a word that needs the line above it to be understood."""
    bare = []
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if BARE.match(text):
                    bare.append(f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}: {text[:60]}")
    assert bare == []


def test_names_of_files():
    for name, file in MODULES.items():
        assert not {"util", "utils", "misc", "helper", "helpers"} & set(name.split(".")), file


# -- importing -----------------------------------------------------------------------------------------------------

SERVER = """
import contextlib, importlib, inspect, io, json, os, runpy, sys, time, traceback
root, modules, scripts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
import torch                                   # what importing torch costs or does is not ours
import socket, subprocess

def refuse(*args, **kwargs):
    raise OSError("blocked in this test: no network and no other program at import")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
subprocess.Popen.__init__ = refuse
os.system = refuse

def import_it(name):
    sys.path.insert(0, root)
    start = time.process_time()
    module = importlib.import_module(name)
    result = {"seconds": time.process_time() - start, "cuda": torch.cuda.is_initialized()}
    if name in scripts:
        from common.cli import ArgumentParser
        parser = module.build_parser()
        shown = [action for action in parser._actions if action.help != "==SUPPRESS=="]  # without hidden aliases
        flags = [flag for action in shown for flag in action.option_strings if flag.startswith("--")]
        both = [flag for flag in flags for other in (flag.replace("_", "-"), "--" + flag[2:].replace("-", "_"))
                if parser._declared_spelling([other]) != [flag]]
        result |= {"main": list(inspect.signature(module.main).parameters), "flags": flags,
                   "without_help": [action.dest for action in shown if not action.help], "misspelt": both,
                   "ours": isinstance(parser, ArgumentParser) and not parser.allow_abbrev}
    return result

def show_help(start):
    out, status = io.StringIO(), "no exit"
    try:
        with contextlib.redirect_stdout(out):
            start()
    except SystemExit as stop:
        status = stop.code or 0
    return {"status": status, "text": out.getvalue()}

def by_path(name):
    file = scripts[name]
    sys.argv, sys.path[:] = [file, "--help"], [os.path.dirname(file), *(p for p in sys.path if p not in ("", root))]
    return show_help(lambda: runpy.run_path(file, run_name="__main__"))

def by_name(name):
    sys.argv, sys.path[:] = [name, "--help"], [root, *sys.path]
    return show_help(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))

def in_a_fork(function, name):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = function(name)
        except BaseException:
            result = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process died"}

print(json.dumps({"import": {name: in_a_fork(import_it, name) for name in modules},
                  "path": {name: in_a_fork(by_path, name) for name in scripts},
                  "name": {name: in_a_fork(by_name, name) for name in scripts}}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Every module imported, and every script asked for --help, in a process of its own (a fork of one that has only
    imported torch) in an empty folder: no compiler on the PATH, no GPU, no network, no other program."""
    empty = tmp_path_factory.mktemp("empty")
    no_programs = tmp_path_factory.mktemp("path")
    compilers = ("CC", "CXX", "CUDA_HOME", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in compilers}
    environment |= {
        "PATH": str(no_programs),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HOME": str(empty),
        "COLUMNS": "200",
    }
    scripts = {name: str(file) for name, file in COMMANDS.items()}
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(ROOT), json.dumps(list(MODULES)), json.dumps(scripts)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    result["left"] = [str(path.relative_to(empty)) for path in empty.rglob("*")]
    return result


def test_importing_needs_and_does_nothing(imported):
    triton = importlib.util.find_spec("triton") is not None
    for name, found in imported["import"].items():
        if name.startswith("op.triton") and not triton:
            continue  # the kernels are imported where Triton is installed only
        assert "error" not in found, f"{name}: {found['error']}"
        assert found["seconds"] < 3, f"{name}: {found['seconds']:.1f} s of processor time beyond torch"
        assert not found["cuda"], name


def test_importing_leaves_no_files(imported):
    assert imported["left"] == []


def test_every_script_has_the_same_face(imported):
    for name in COMMANDS:
        found = imported["import"][name]
        assert "error" not in found, f"{name}: {found['error']}"
        assert found["main"] == ["args"], name
        assert found["without_help"] == [], f"{name}: flags without help"
        assert found["misspelt"] == [] and found["ours"], f"{name}: --foo_bar and --foo-bar, no abbreviations"


@pytest.mark.parametrize("how", ["path", "name"])
def test_help_from_any_folder(how, imported):
    """By path from another folder, which nested scripts need their bootstrap line for; and with -m from the root."""
    for name in SCRIPTS if how == "path" else COMMANDS:
        found = imported[how][name]
        assert "error" not in found, f"{name}: {found['error']}"
        assert found["status"] == 0 and "usage:" in found["text"], name
        absent = [flag for flag in imported["import"][name]["flags"] if flag not in found["text"]]
        assert absent == [], f"{name}: flags that --help does not show"


def test_published_flags_of_train():
    """Names and defaults of the original; those of the networks are filled in for a new run."""
    import train
    from training.resume import Start, resolve_architecture
    from training.settings import ARCHITECTURE

    published = {
        "exp_name": "test",
        "iter": 800_000,
        "batch": 16,
        "n_sample": 64,
        "size": 256,
        "r1": 10,
        "path_regularize": 2,
        "path_batch_shrink": 2,
        "d_reg_every": 16,
        "g_reg_every": 4,
        "mixing": 0.9,
        "ckpt": None,
        "lr": 0.002,
        "channel_multiplier": 2,
        "wandb": False,
        "w_space": False,
        "local_rank": 0,
        "style_dim": 512,
        "n_mlp": 8,
    }
    args = vars(train.build_parser().parse_args(["faces.lmdb"]))
    config = resolve_architecture({}, Start())
    args |= {name: getattr(config, name) for name in ARCHITECTURE}
    assert {name: args[name] for name in published} == published
    args = train.build_parser().parse_args(["--local-rank=3", "--path", "faces.lmdb", "--exp-name", "x", "--w-space"])
    assert (args.local_rank, args.path, args.exp_name, args.w_space) == (3, "faces.lmdb", "x", True)
    new = """channel_max augment augment_p ada_target ada_length resume init_from precision workers keep save_every
             sample_every log_every seed on_nan micro_batch device"""
    assert set(new.split()) <= set(vars(args))


# -- commands in words ---------------------------------------------------------------------------------------------


def fenced_blocks(text):
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def expand_makefile(text):
    """The recipe lines of a Makefile with its own variables put in."""
    text = text.replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)[ \t]*[:?]?=[ \t]*(.*)$", text, re.MULTILINE))
    lines = "\n".join(line.lstrip("\t@-") for line in text.splitlines() if line.startswith("\t"))
    for _ in range(5):
        lines = re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], "1").strip(), lines)
    return lines.replace("$@", "target")


def docstring_commands(file):
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return "\n".join(line for line in text.replace("\\\n", " ").splitlines() if line.startswith("    "))


def commands_in(text):
    """(script or module, arguments) of every `python ...`, `python -m ...` and `torchrun ...` in a piece of shell."""
    text = re.sub(r"\\\s*\n\s*", " ", text)
    for line in text.splitlines():
        line = re.sub(r"\$\{?\w+\}?", "1", line.strip().removeprefix("$ "))
        line = re.sub(r"(^|\s)#.*", "", line)
        try:
            words = shlex.split(line)
        except ValueError:
            continue  # not a line of shell
        for command in split_commands(words):
            command = [word for i, word in enumerate(command) if not re.fullmatch(r"\w+=.*", word) or i]
            if not command or not re.fullmatch(r"(.*/)?(python[\d.]*|torchrun)", command[0]):
                continue
            target = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
            if target is None and command[1:2] == ["-m"]:
                target = 2
            if target is not None and target < len(command):
                yield command[target], command[target + 1 :]


def split_commands(words):
    command = []
    for word in words:
        if word in ("&&", "||", "|", ";", "&", ">", "2>", "<", ">>"):
            yield command
            command = []
        elif word.endswith(";"):
            yield [*command, word[:-1]]
            command = []
        else:
            command.append(word)
    yield command


def written_commands():
    """(where, script or module, arguments) of all documentation."""
    sources = {}
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "checkpoints" / "README.md"]:
        if file.is_file():
            sources[file.relative_to(ROOT).as_posix()] = "\n".join(fenced_blocks(file.read_text(encoding="utf-8")))
    if (ROOT / "Makefile").is_file():
        sources["Makefile"] = expand_makefile((ROOT / "Makefile").read_text(encoding="utf-8"))
    for file in MODULES.values():
        sources[file.relative_to(ROOT).as_posix()] = docstring_commands(file)
    found = {(where, target, *args): None for where, text in sources.items() for target, args in commands_in(text)}
    return [(where, target, args) for where, target, *args in found]


WRITTEN = written_commands()


def parser_of(target):
    """The parser of a script or module of ours; None for another's (pytest, torch, a user's)."""
    name = target.removeprefix("./").removesuffix(".py").replace("/", ".") if target.endswith(".py") else target
    if target.endswith(".py"):
        assert name in MODULES, f"{target} is not there"
    if name not in MODULES or (name not in COMMANDS and not hasattr(importlib.import_module(name), "build_parser")):
        return None
    return importlib.import_module(name).build_parser()


def test_written_commands_parse():
    """Every command in README, docs, Makefile and docstrings names a script that is there and flags that it has."""
    complaints = [
        f"{where}: {target} {' '.join(args)}\n  {error}"
        for where, target, args in WRITTEN
        if (error := complaint_about(target, args))
    ]
    assert complaints == []


def complaint_about(target, args) -> str:
    """Complaint of argparse about a command; nothing for a program that is not ours."""
    parser = parser_of(target)
    if parser is None:
        return ""
    if "..." in args or any(re.fullmatch(r"\[.*|.*\]", arg) for arg in args):  # an outline: its flags must exist
        known = set(parser._option_string_actions)
        flags = [arg.strip("[]").partition("=")[0] for arg in args if arg.strip("[]").startswith("--")]
        return " ".join(flag for flag in parser._declared_spelling(flags) if flag not in known)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parser.parse_args([re.sub(r"<[^>]*>", "1", arg) for arg in args])
    except SystemExit as stop:
        return complaint.getvalue() if stop.code else ""
    return ""


def test_commands_are_found():
    """The extraction itself: continuation lines, launchers, variables, pipes, comments, outlines."""
    text = """
    $ PET_MASTER_PORT=1 python3 -m torch.distributed.launch --nproc_per_node=$num_gpus train.py --path $P \\
          --batch 8   # published
    torchrun --nproc_per_node ${N} train.py faces && python generate.py --ckpt "a b.pt" | tee log
    .venv/bin/python -m common.weights list; ls *.py
    make test
    echo python
    """
    assert list(commands_in(text)) == [
        ("train.py", ["--path", "1", "--batch", "8"]),
        ("train.py", ["faces"]),
        ("generate.py", ["--ckpt", "a b.pt"]),
        ("common.weights", ["list"]),
    ]
    makefile = "PY ?= .venv/bin/python\nFLAGS := --size 32 \\\n  --batch 8\ndemo:\n\t@$(PY) train.py $(FLAGS)\n"
    assert list(commands_in(expand_makefile(makefile))) == [("train.py", ["--size", "32", "--batch", "8"])]
    assert {target for where, target, _ in WRITTEN if where == "train.py"} == {"train.py"}


def test_readme_shows_the_published_training_command():
    readme = ROOT / "README.md"
    text = re.sub(r"\\\s*\n\s*", " ", readme.read_text(encoding="utf-8"))
    launch = r"python3? -m torch\.distributed\.launch --nproc_per_node=\S+ "
    assert re.search(launch + r"train\.py --path \S+ --exp_name \S+ --batch 8 --n_sample 64", text)


def test_readme_commands_have_few_flags():
    """At most four, but for the published commands, which stand below the sentence that names them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, after = readme.partition("The published commands of the original")
    assert after, "README names the published commands"
    own = "\n".join(fenced_blocks(before) + fenced_blocks(after)[1:])
    counted = [(target, sum(arg.startswith("--") for arg in args)) for target, args in commands_in(own)]
    assert len(counted) > 10
    assert [command for command in counted if command[1] > 4] == []
