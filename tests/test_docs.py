"""Documentation: the files that it names are in the repository."""

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
