"""References that no import finds: files that the documentation names, and names that shell scripts import."""

import importlib
import os
import re
import subprocess

import pytest
from modules import ROOT


def test_files_that_are_named_are_tracked():
    """Links, and the first word in backticks: a path from the root or from the page, or a bare name. docs/log.md speaks
    of what was; docs/formats.md names what the scripts write, so that only its sources count."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no git, or no repository: {error}")
    tracked, missing, n_named = {*files, *map(os.path.basename, files)}, [], 0
    for page in files:
        if not re.fullmatch(r"(docs/|checkpoints/)?\w+\.md", page) or page == "docs/log.md":
            continue
        suffixes = "py|sh|md" + "|json|npz|safetensors|pt|onnx|jpg|png" * (page != "docs/formats.md")
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(rf"(?:`|\]\()([\w./-]+\.(?:{suffixes}))(?=[`\s)])", text):
            n_named += 1
            if not {os.path.normpath(name), os.path.normpath(os.path.join(os.path.dirname(page), name))} & tracked:
                missing.append(f"{page}: {name}")
    assert n_named > 200 and not missing


def test_what_shell_scripts_import_is_there():
    scripts = [*ROOT.glob("checkpoints/**/*.sh"), *ROOT.glob("benchmarks/*.sh")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    found = re.findall(r"(?:^|[\"; ])from ([\w.]+) import ([\w, ]+?) *(?:[;\"]|$)", text, re.MULTILINE)
    missing = [
        f"{module}.{name}"
        for module, names in found
        for name in names.split(", ")
        if not hasattr(importlib.import_module(module), name)
    ]
    assert len(found) >= 7 and not missing
