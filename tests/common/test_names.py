"""Names of files: whatever they say, the path stays in its folder, can be written, and is told in tables and JSON."""

import json
import os

import pytest
import torch

from common.checkpoint import load_safetensors, save_safetensors
from common.files import safe_name, safe_path
from common.latents import load_latents, save_latents
from common.tables import write_skipped, write_table
from metrics.protocol import append_records

HOSTILE = (
    "../evil",
    "/etc/passwd",
    "..",
    "",
    ".",
    "a\0b",
    "C:\\x",
    "\\\\host\\share",
    "con",
    "x" * 999,
    "ü" * 999,
    " . ",
    "\ud800",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_become_one_part_of_a_path(tmp_path, text):
    name = safe_name(text)
    path = tmp_path / f"boundary-{name}.npz"
    path.write_bytes(b"")
    assert path.resolve().parent == tmp_path.resolve() and [p.name for p in tmp_path.iterdir()] == [path.name]
    inner = tmp_path / "out" / f"{safe_path(text)}.png"
    assert inner.resolve().is_relative_to((tmp_path / "out").resolve())


def test_ordinary_names_stay():
    for name in ("age", "mouth_open", "ü 中文", "two  spaces", "a.b", "smile+3"):
        assert safe_name(name) == safe_path(name) == name
    assert safe_path("people/ü 1") == "people/ü 1" and safe_name("people/ü 1") == "people_ü 1"
    assert safe_path("../../a/./b") == "a/b" and safe_name("") == "unnamed"


def test_a_name_that_is_no_utf_8_is_told_in_every_table(tmp_path):
    name = os.fsdecode(b"\xff.jpg")
    write_skipped(tmp_path, {name: "no image"})
    write_table(tmp_path / "report.csv", [{"file": name}])
    for table in ("skipped.csv", "report.csv"):
        assert b"\xff.jpg" in (tmp_path / table).read_bytes()
    append_records(tmp_path / "metrics.jsonl", [{"path": name}])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"path": name}
    save_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"path": name})
    assert load_safetensors(tmp_path / "a.safetensors")[1] == {"path": name}
    details = {"names": ["a"], "space": "w++", "size": 8, "alignment": [{"source": name}]}
    save_latents(tmp_path, torch.zeros(1, 4, 2), **details)
    assert load_latents(tmp_path).alignment == details["alignment"]
