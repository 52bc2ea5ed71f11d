"""The shape of the repository: who may import whom, what importing costs and does, how scripts start."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from modules import COMMANDS, MODULES, ROOT, SCRIPTS

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


BARE = re.compile(r"(Of|As|What|How|Why|Which|From|The same)\b")


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
