"""prepare_data.py's store: its size, full disks, two runs at once, and real faces."""

import subprocess
import sys

import pytest
from preparing import ROOT, command, contents

import common.lmdb_store
import prepare_data
from common.lmdb_store import StoreWriter
from dataset import MultiResolutionDataset

# -- the store -----------------------------------------------------------------------------------------------------


def test_the_map_grows(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(common.store, "FIRST_MAP_SIZE", 1 << 16)
    monkeypatch.setattr(prepare_data, "BATCH_FILES", 2)
    assert command("--out", tmp_path / "small", "--n_worker", 1, "--size", "64,96", photos) == 0
    monkeypatch.undo()
    assert command("--out", tmp_path / "large", "--n_worker", 1, "--size", "64,96", photos) == 0
    assert contents(tmp_path / "small") == contents(tmp_path / "large")
    assert (tmp_path / "small" / "data.mdb").stat().st_size > 1 << 17


def test_the_file_is_no_larger_than_its_content(photos, tmp_path):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "64,96", photos) == 0
    n_bytes = sum(len(value) for value in contents(tmp_path / "out").values())
    assert (tmp_path / "out" / "data.mdb").stat().st_size < n_bytes + (1 << 20)


def test_wasteful_store_is_compacted(tmp_path, monkeypatch):
    monkeypatch.setattr(common.store, "COMPACT_ABOVE", -1e9)
    records = [[f"{i}.png", 1, 1] for i in range(3)]
    with StoreWriter(tmp_path, {"sizes": [8]}, records) as writer:
        writer.write([([*record, 8, 8], [bytes([i]) * 9000]) for i, record in enumerate(records)])
        writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["data.mdb"]
    assert contents(tmp_path)[b"8-00002"] == b"\2" * 9000


@pytest.mark.parametrize(("free", "message"), [(1 << 20, "is full"), (200 << 20, "needs about")])
def test_full_disk_stops_in_one_sentence_and_goes_on_later(tmp_path, monkeypatch, free, message):
    records = [[f"{i}.png", 1, 1] for i in range(1000)]
    settings = {"sizes": [8]}
    usage = type("usage", (), {"free": free})
    with StoreWriter(tmp_path, settings, records) as writer:
        monkeypatch.setattr(common.lmdb_store.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match=message):
            writer.write([([*record, 8, 8], [bytes(4 << 20)]) for record in records[:4]])
    monkeypatch.undo()
    with StoreWriter(tmp_path, settings, records) as writer:
        assert len(writer.records) == (0 if message == "is full" else 4)
        writer.write([([*record, 8, 8], [b"x"]) for record in records[len(writer.records) :]])
        assert writer.finish()["length"] == 1000


def test_two_runs_on_one_folder_are_told(tmp_path):
    records = [["0.png", 1, 1], ["1.png", 1, 1]]
    with StoreWriter(tmp_path, {"sizes": [8]}, records) as writer:
        with writer.env.begin(write=True) as transaction:  # as the other process would
            transaction.put(b"batch-0000000000", b"[]")
        with pytest.raises(ValueError, match="another prepare_data.py"):
            writer.write([([*records[0], 8, 8], [b"x"])])


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


def test_starts_without_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)]).returncode == 0


def test_real_faces(real_faces, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for path in sorted(real_faces.glob("*.jpg"))[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "32,64", folder) == 0
    data = MultiResolutionDataset(tmp_path / "out", 64)
    assert len(data) == 12 and data[0].float().std() > 10
