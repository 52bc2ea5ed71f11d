"""common/files.py: whole files or none, regular files only, JSON in its shape only."""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import files
from common.cli import UserError
from common.files import atomic_write, open_regular, read_json

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- writing -------------------------------------------------------------------------------------------------------


def test_other_errors_pass_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"new")
        raise KeyError("ours")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "b.txt"):
        open(tmp_path / "absent")
    assert caught.value.filename == str(tmp_path / "absent")


def test_many_writers_of_one_name_never_show_a_torn_file(tmp_path):
    path, errors, done = tmp_path / "cache.bin", [], threading.Event()

    def write(letter):
        try:
            for _ in range(40):
                with atomic_write(path, sync=False) as file:
                    for _ in range(8):
                        file.write(letter * 5000)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))
    done.set()
    assert errors == [] and seen <= {(40000, 1)}
    assert path.exists() and names(tmp_path) == ["cache.bin"]


def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    program = (
        "import sys, time; from common.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n    path.write_text('half')\n    print(path.name, flush=True)\n"
        "    time.sleep(60)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.pt")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    left = writer.stdout.readline().strip()
    assert left.endswith(".pt") and names(tmp_path) == [left]
    see = f"from common.files import atomic_write\nwith atomic_write({str(tmp_path / 'b.txt')!r}): pass"
    subprocess.run([sys.executable, "-c", see], cwd=ROOT, check=True)
    assert names(tmp_path) == [left, "b.txt"]
    writer.kill()
    writer.wait()
    subprocess.run([sys.executable, "-c", see], cwd=ROOT, check=True)
    assert names(tmp_path) == ["b.txt"]


def test_the_longest_name_a_folder_can_hold(tmp_path):
    name = "ü" * 125 + ".json"
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("writes", ["file.write(bytes(10**6))", "[file.write(bytes(100)) for _ in range(10**4)]"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, writes):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = f"""
import resource
from common.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, {resource.RLIM_INFINITY}))
try:
    with atomic_write({str(path)!r}) as file:
        {writes}
except OSError as error:
    print(error.filename, error.strerror, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{path}|could not be written: File too large\n", done.stderr
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


# -- reading -------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    for name in ("pipe", "zero"):
        with pytest.raises(UserError, match=f"{name} is a device or a pipe: a file is expected"):
            open_regular(tmp_path / name)
    with pytest.raises(UserError, match="is a folder: a file is expected"):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a link to gone, which does not exist.*nowhere"):
        open_regular(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"


SHAPE = {
    "version": int,
    "size": float,
    "names": [str],
    "faces": [{"quad": [[float]], "score": (float, None), "box?": ([float], None)}],
    "settings?": {str: (float, str, bool, None)},
}
GOOD = {
    "version": 1,
    "size": 2,
    "names": ["ü"],
    "faces": [{"quad": [[1, 2.5]], "score": None}],
    "settings": {"a": 1.5, "b": True},
    "other": [{}],
}


def test_json_of_the_right_shape(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "a.json", SHAPE, what="result") == GOOD


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "1"}, "`version` is a text, not a whole number"),
        ({"version": True}, "`version` is true or false, not a whole number"),
        ({"version": 1.5}, "`version` is a number, not a whole number"),
        ({"size": None}, "`size` is null, not a number"),
        ({"names": {"a": 1}}, "`names` is an object, not a list"),
        ({"names": ["a", 1]}, r"`names\[1\]` is a whole number, not a text"),
        ({"faces": [{"score": 1}]}, r"`faces\[0\]\.quad` is absent"),
        ({"faces": [{"quad": [1], "score": 1}]}, r"`faces\[0\]\.quad\[0\]` is a whole number, not a list"),
        ({"faces": [{"quad": [], "score": "x"}]}, "`.*score` is a text, not a number or null"),
        ({"faces": [{"quad": [], "score": 1, "box": ["x"]}]}, r"`.*box\[0\]` is a text, not a number"),
        ({"settings": {"a": []}}, r"`settings\['a'\]` is a list, not"),
        ({"settings": [1]}, "`settings` is a list, not an object"),
    ],
)
def test_json_of_another_shape_names_the_place(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError, match=f"{path} is no result: {message}"):
        read_json(path, SHAPE, what="result")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("null", "it is null, not an object"),
        ("[1]", "it is a list, not an object"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        (f'{{"version": {"9" * 400}}}', "the number 9{20}... has more than 64 bits"),
        (f'{{"version": {"9" * 5000}}}', "the number 9{20}... has more than 64 bits"),
        ('{"version": NaN}', "the number NaN is not finite"),
        ('{"version": 1e999}', "the number 1e999 is not finite"),
        ('{"version": -Infinity}', "the number -Infinity is not finite"),
        (b"\xff\xfe\x00", "decode"),
        (b"\x80abc", "decode"),
    ],
)
def test_json_that_would_break_a_reader(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{path} is no result: .*{message}"):
        read_json(path, SHAPE, what="result")


def test_json_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (2 << 20) + b"{}")
    monkeypatch.setattr(files, "MAX_JSON", 1 << 20)
    with pytest.raises(UserError, match="more than 1 MiB"):
        read_json(path, {}, what="result")
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="a device or a pipe"):
        read_json(path, {}, what="result")
