"""prepare_data.py's store: its size, full disks, two runs at once, and real faces."""

import subprocess
import sys

import pytest
from preparing import ROOT, command, contents

from common import lmdb_build
from common.lmdb_build import StoreWriter
from dataset import MultiResolutionDataset

# -- the store -----------------------------------------------------------------------------------------------------


def test_the_map_grows(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_build, "FIRST_MAP_SIZE", 1 << 16)
    monkeypatch.setattr(lmdb_build, "CHUNK", 2)
    assert command("--out", tmp_path / "small", "--n_worker", 1, "--size", "64,96", photos) == 0
    monkeypatch.undo()
    assert command("--out", tmp_path / "large", "--n_worker", 1, "--size", "64,96", photos) == 0
    assert contents(tmp_path / "small") == contents(tmp_path / "large")
    assert (tmp_path / "small" / "data.mdb").stat().st_size > 1 << 17


def test_the_file_is_no_larger_than_its_content(photos, tmp_path):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "64,96", photos) == 0
    n_bytes = sum(len(value) for value in contents(tmp_path / "out").values())
    assert (tmp_path / "out" / "data.mdb").stat().st_size < n_bytes + (1 << 20)


@pytest.mark.parametrize(("free", "message"), [(1 << 20, "the disk is full: 0.0 GB"), (200 << 20, "needs about")])
def test_a_full_disk_stops_early_in_one_sentence(tmp_path, monkeypatch, free, message):
    sources = [[f"{i}.png", 1, 1] for i in range(1000)]
    usage = type("usage", (), {"free": free})
    monkeypatch.setattr(lmdb_build.shutil, "disk_usage", lambda _: usage)
    with StoreWriter(tmp_path, {"sizes": [8]}, sources) as writer:
        with pytest.raises(OSError, match=f"{message}.*{tmp_path}"):
            for _ in range(2):
                writer.write([([bytes(4 << 20)], (8, 8))] * 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [40_000, 200_000])
def test_a_full_disk_of_the_system_is_an_error(photos, tmp_path, limit):
    program = f"""
import resource, sys
import prepare_data
from common.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.exit(run(prepare_data.main, prepare_data.build_parser(), sys.argv[1:]))
"""
    args = ["--out", tmp_path / "out", "--n_worker", 1, "--size", "64,96", photos]
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "out" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "data.mdb").exists()


def test_runs_from_another_folder(photos, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), "--out", "out", "--size", "8", "photos"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("out: 9 images at 8 px")


def test_workers_start_without_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import common.lmdb_build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)]).returncode == 0


def test_real_faces(real_faces, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for path in sorted(real_faces.glob("*.jpg"))[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "32,64", folder) == 0
    data = MultiResolutionDataset(tmp_path / "out", 64)
    assert len(data) == 12 and data[0].float().std() > 10
