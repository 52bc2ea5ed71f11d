"""Modules and scripts of the repository, for the tests of its shape and of the commands written in it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"tests", "docs", "checkpoints", "demo", "runs"}  # folders without modules of the toolkit


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
