"""Fuzz: whatever a file holds, it is read or refused in one sentence that names it: no traceback, no wait, no gigabyte.

Every kind of file that the scripts read is made whole, then damaged by seed: bytes cut and flipped, entries replaced,
removed and added, arrays of other ranks and types. The schemas are those of docs/formats.md. Stores (LMDB) have no
checksums and may end the process: tests/test_dataset.py damages them in processes of their own.
"""

import copy
import json
import os
import random
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import IMAGES, KINDS, damage, make_files

from common.files import check_shape
from common.runs import peak_bytes

pytestmark = pytest.mark.usefixtures("undrawn")

SECONDS, GIGABYTE = 10, 1 << 30  # of one case, which takes a tenth of a second on an idle core


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "inside"
    folder.mkdir()
    kinds = make_files(folder)
    assert list(kinds) and set(kinds) == {*KINDS, *IMAGES}
    return kinds


@contextmanager
def limits(case):
    """Ends a case that waits, and measures the memory it takes."""

    def stop(*_):
        pytest.fail(f"{case}: still at work after {SECONDS} s")

    handler, before = signal.signal(signal.SIGALRM, stop), peak_bytes()
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert peak_bytes() - before < GIGABYTE, f"{case}: {(peak_bytes() - before) >> 20} MiB"


def read_all(path, readers, case, capsys):
    """Statuses of the readers of a file that may hold anything; each refusal is one line."""
    statuses = []
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as the scripts' are; those of pytest are strict
    for number, reader in enumerate(readers):
        capsys.readouterr()
        with limits(f"{case}, reader {number}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                statuses.append(reader(path))
            except Exception as error:
                raise AssertionError(f"{case}, reader {number}: a traceback") from error
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert statuses[-1] in (0, 1) and len(lines) == statuses[-1], (case, number, statuses, said[-500:])
        assert len(said) < 10_000, (case, len(said))
    return statuses


@pytest.mark.parametrize("kind", KINDS + IMAGES)
def test_damaged_files_are_read_or_refused_in_a_line(files, kind, capsys):
    path, readers = files[kind]
    whole, refused = path.read_bytes(), 0
    base = files["log.jsonl"][0].parents[1]
    try:
        for seed in range(12):
            path.write_bytes(whole)
            path.write_bytes(damage(path, random.Random(f"{kind} {seed}")))
            refused += any(read_all(path, readers, f"{kind}, seed {seed}", capsys))
    finally:
        path.write_bytes(whole)
    assert refused > 0 or kind in ("result.npz", "kept.npz"), "nothing was refused: nothing was damaged"
    assert [path.name for path in base.iterdir()] == ["inside"], "something leads out of the folder"


def hostile_entries(path: Path):
    """Things under a file's name that are no such file."""
    yield "empty", lambda: path.write_bytes(b"")
    yield "page", lambda: path.write_text("<!DOCTYPE html><html>log in</html>")
    yield "pointer", lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    yield "folder", path.mkdir
    yield "link to nothing", lambda: path.symlink_to("/nowhere")
    if hasattr(os, "mkfifo"):
        yield "pipe", lambda: os.mkfifo(path)
        yield "device", lambda: path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", KINDS + IMAGES[:1])
def test_what_is_no_file_is_refused_in_a_line(files, kind, capsys):
    path, readers = files[kind]
    path.rename(kept := path.with_name(f"kept {path.name}"))
    try:
        for name, make in hostile_entries(path):
            make()
            read_all(path, readers, f"{kind}, {name}", capsys)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    finally:
        kept.replace(path)


def documented_schemas() -> dict:
    """{file, or file: entry of it: schema} from docs/formats.md."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    block = text.partition("## Schemas")[2].partition("```text")[2].partition("```")[0]
    types = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "object": object}
    return eval(block, {"__builtins__": {}, **types})


def entries(schema, value, path=()):
    """(place, its schema, whether it must be there) of all entries of a schema that `value` has."""
    for alternative in schema if isinstance(schema, tuple) else (schema,):
        if isinstance(alternative, list) and isinstance(value, list) and value:
            yield (*path, 0), alternative[0], False
            yield from entries(alternative[0], value[0], (*path, 0))
        elif isinstance(alternative, dict) and isinstance(value, dict):
            for name, inner in (
                alternative.items() if str not in alternative else [(next(iter(value)), alternative[str])]
            ):
                key = name.removesuffix("?")
                yield (*path, key), inner, not name.endswith("?") and str not in alternative
                yield from entries(inner, value.get(key), (*path, key))


def fits(value, schema) -> bool:
    try:
        check_shape(value, schema)
    except ValueError:
        return False
    return True


def read_entry(path: Path, entry: str):
    if path.suffix == ".npz":
        return json.loads(str(np.load(path)[entry]))
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)[entry]
    return json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())


def write_entry(path: Path, whole: bytes, entry: str, value) -> None:
    """The file `whole` with another JSON value in it."""
    path.write_bytes(whole)
    if path.suffix == ".npz":
        np.savez(path, **dict(np.load(path)) | {entry: np.array(json.dumps(value))})
    elif path.suffix == ".pt":
        torch.save(torch.load(path, weights_only=True) | {entry: value}, path)
    else:
        lines = whole.decode().splitlines()[1:] if path.suffix == ".jsonl" else []
        path.write_text("\n".join([json.dumps(value), *lines, ""]))


@pytest.mark.parametrize("name", documented_schemas())
def test_the_documented_schema_is_the_one_that_is_checked(files, name, capsys):
    schema, (kind, _, entry) = documented_schemas()[name], name.partition(": ")
    path, readers = files[kind]
    whole, value = path.read_bytes(), read_entry(path, entry)
    check_shape(value, schema)
    try:
        for place, inner, required in entries(schema, value):
            words = [item for item in place if isinstance(item, str)]
            wrong = [item for item in (7.5, "x", None, [], {}, True) if not fits(item, inner)][:2]
            for bad in wrong:
                holder = copy.deepcopy(value)
                target = holder
                for key in place[:-1]:
                    target = target[key]
                target[place[-1]] = bad
                write_entry(path, whole, entry, holder)
                refused_by_name(path, readers, words[-1:], f"{name} {place} = {bad!r}", capsys)
            if required:
                holder = copy.deepcopy(value)
                target = holder
                for key in place[:-1]:
                    target = target[key]
                del target[place[-1]]
                write_entry(path, whole, entry, holder)
                refused_by_name(path, readers, words[-1:], f"{name} without {place}", capsys)
        write_entry(path, whole, entry, value | {"\u00fcnknown": {} if str in schema else [[1]]})
        read_all(path, readers, f"{name} with another entry", capsys)
    finally:
        path.write_bytes(whole)


def refused_by_name(path, readers, words, case, capsys):
    """A reader refuses the file in a line that has its name and that of the entry."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statuses = [reader(path) for reader in readers[:1]]
    said = capsys.readouterr().err
    assert statuses == [1] and all(word in said for word in (path.name, *words)), (case, statuses, said[-300:])
