"""common/files.py: whatever a file says, the path stays in its folder and can be written."""

import pytest

from common.files import safe_name, safe_path

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
