"""Every command written in the README, the docs, the Makefile and the docstrings is one that the scripts understand."""

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex

import pytest
from modules import COMMANDS, MODULES, ROOT, SCRIPTS


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


def test_seeds_are_those_that_numpy_and_pytorch_take():
    """Every --seed refuses what a library would refuse after minutes of work."""
    checked = 0
    for name in SCRIPTS:
        for action in importlib.import_module(name).build_parser()._actions:
            if action.dest.endswith("seed"):
                for text in ("-1", str(2**32)) if action.dest != "noise_seed" else ("-1",):
                    with pytest.raises(argparse.ArgumentTypeError):
                        action.type(text)
                checked += 1
    assert checked >= 12


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
