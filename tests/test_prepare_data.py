"""prepare_data.py: what is written, in which order, what is left out, and that a killed run loses nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

import common.store
import prepare_data
from common.cli import run
from common.images import fit_image, read_image
from common.store import DatasetError, StoreWriter, open_store
from dataset import MultiResolutionDataset

ROOT = Path(prepare_data.__file__).parent


def noise(seed, width=40, height=40):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Nine readable pictures in a tree, of several shapes and names."""
    folder = tmp_path / "photos"
    names = ["b.png", "a/ü 中文 .png", "a/c.PNG", "a/b/d.png", "z.png", "e.png", "f.png", "g.png", "h.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i, 40 + 4 * i, 40).save(folder / name)
    return folder


def command(*args):
    return run(prepare_data.main, prepare_data.build_parser(), [str(arg) for arg in args])


def contents(folder):
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def decoded(folder, size, index):
    return np.asarray(read_image(contents(folder)[f"{size}-{index:05d}".encode()]))


def manifest(folder):
    return json.loads(contents(folder)[b"manifest"])


def test_writes_every_picture_at_every_size_in_order(photos, tmp_path, capsys):
    out = tmp_path / "ü.lmdb"
    assert command("--out", out, "--n_worker", 1, "--size", "16,8", photos) == 0
    assert "9 images at 8, 16 px (png, lanczos, crop)" in capsys.readouterr().out
    names = manifest(out)["names"]
    assert names == ["a/b/d.png", "a/c.PNG", "a/ü 中文 .png", "b.png", "e.png", "f.png", "g.png", "h.png", "z.png"]
    assert manifest(out)["source_sizes"][0] == [52, 40]
    items = contents(out)
    assert items.pop(b"length") == b"9" and items.pop(b"manifest")
    assert sorted(items) == sorted(f"{s}-{i:05d}".encode() for s in (8, 16) for i in range(9))
    for index, name in enumerate(names):
        for size in (8, 16):
            expected = np.asarray(fit_image(read_image(photos / name), size))
            assert np.array_equal(decoded(out, size, index), expected)  # lossless
    assert sorted(p.name for p in out.iterdir()) == ["data.mdb", "skipped.csv"]
    data = MultiResolutionDataset(out, 16)
    assert len(data) == 9 and data.names == names


@pytest.mark.parametrize("spelling", [["--n_worker", "3"], ["--n-worker", "2"]])
def test_workers_do_not_change_the_result(photos, tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(prepare_data, "CHUNK", 2)
    (photos / "bad.png").write_text("no image")
    assert command("--out", tmp_path / "one", "--n_worker", 1, "--size", 8, "--path", photos, "--max_bad", 1) == 0
    assert command("--out", tmp_path / "many", *spelling, "--size", 8, "--path", photos, "--max-bad", 1) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_unreadable_files_leave_no_hole_and_are_listed(photos, tmp_path, capsys):
    (photos / "a" / "zz, bad.png").write_text("no image")
    (photos / "empty.png").write_bytes(b"")
    cut = (photos / "b.png").read_bytes()
    (photos / "cut.png").write_bytes(cut[: len(cut) // 2])
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos, "--max_bad", 3) == 0
    assert "9 images" in capsys.readouterr().out
    assert len(MultiResolutionDataset(out, 8)) == 9
    with (out / "skipped.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"] and [row[0] for row in rows[1:]] == ["a/zz, bad.png", "cut.png", "empty.png"]
    assert "not in a known image format" in rows[1][1] and "empty" in rows[3][1]
    assert manifest(out)["skipped"] == rows[1:]
    assert np.array_equal(decoded(out, 8, 4), np.asarray(fit_image(read_image(photos / "e.png"), 8)))


@pytest.mark.parametrize(("max_bad", "status"), [("0", 1), ("1", 1), ("2", 0), ("0.1", 1), ("0.5", 0), ("1.0", 0)])
def test_max_bad(photos, tmp_path, capsys, max_bad, status):
    (photos / "bad.png").write_text("no image")
    (photos / "worse.png").write_text("no image")
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos, "--max_bad", max_bad) == status
    assert (out / "skipped.csv").exists()
    if status:
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: 2 of 11") and "skipped.csv" in message and f"--max_bad {max_bad}" in message
        with pytest.raises(DatasetError, match="unfinished"):
            open_store(out)
        # nothing is encoded twice when the limit is raised
        assert command("--out", out, "--n_worker", 4, "--size", 8, photos, "--max_bad", "0.9") == 0
        assert len(MultiResolutionDataset(out, 8)) == 9


def test_nothing_readable(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert command("--out", tmp_path / "out", tmp_path / "photos") == 1
    assert "holds no images" in capsys.readouterr().err
    (tmp_path / "photos" / "a.png").write_text("no")
    assert command("--out", tmp_path / "out", "--max_bad", "1.0", tmp_path / "photos") == 1
    assert "none of the 1 image files" in capsys.readouterr().err
    assert command("--out", tmp_path / "out", tmp_path / "nowhere") == 1
    error = capsys.readouterr().err
    assert "nowhere does not exist" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [
        [], ["a", "--path", "b"], ["a", "--size", "x"], ["a", "--size", "0"], ["a", "--background", "1,2"],
        ["a", "--background", "1,2,300"], ["a", "--quality", "90"], ["a", "--format", "jpeg", "--quality", "101"],
        ["a", "--compat", "--format", "jpeg"], ["a", "--compat", "--fit", "pad"], ["a", "--n_worker", "0"],
        ["a", "--max_bad", "-1"], ["a", "--max_bad", "1.5"], ["a", "--max_bad", "few"], ["a", "--fit", "stretch"],
        ["a", "--resample", "sharp"], ["a", "--siz", "8"],
    ],
    ids=lambda args: " ".join(args) or "none",
)  # fmt: skip
def test_misuse(tmp_path, capsys, args):
    assert command("--out", tmp_path / "out", *args) == 2
    assert capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_fit_resample_background_are_applied_and_recorded(photos, tmp_path):
    out = tmp_path / "out"
    args = ["--fit", "pad", "--resample", "box", "--background", "10,20,30", "--size", 20]
    assert command("--out", out, "--n_worker", 1, *args, photos) == 0
    found = manifest(out)
    assert (found["fit"], found["resample"], found["background"]) == ("pad", "box", [10, 20, 30])
    image = read_image(photos / found["names"][0])
    expected = fit_image(image, 20, fit="pad", resample="box", background=(10, 20, 30))
    assert np.array_equal(decoded(out, 20, 0), np.asarray(expected))
    assert decoded(out, 20, 0)[0, 0].tolist() == [10, 20, 30]


def test_enlarging_is_said(photos, tmp_path, capsys):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "8,64", photos) == 0
    assert "note: 9 images are smaller than 64 px" in capsys.readouterr().err


def test_jpeg_keeps_the_colour_resolution(photos, tmp_path):
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", 16, "--format", "jpeg", photos) == 0
    encoded = contents(tmp_path / "out")[b"16-00000"]
    (tmp_path / "item.jpg").write_bytes(encoded)
    with Image.open(tmp_path / "item.jpg") as image:
        assert image.format == "JPEG" and all(layer[1:3] == (1, 1) for layer in image.layer)
    assert (manifest(tmp_path / "out")["quality"], manifest(tmp_path / "out")["subsampling"]) == (95, "4:4:4")


def test_webp_is_lossless_unless_a_quality_is_given(photos, tmp_path):
    for name, quality in [("lossless", []), ("lossy", ["--quality", 80])]:
        args = ["--n_worker", 1, "--size", 16, "--format", "webp", *quality]
        assert command("--out", tmp_path / name, *args, photos) == 0
    expected = np.asarray(fit_image(read_image(photos / manifest(tmp_path / "lossless")["names"][0]), 16))
    assert np.array_equal(decoded(tmp_path / "lossless", 16, 0), expected)
    assert not np.array_equal(decoded(tmp_path / "lossy", 16, 0), expected)


@pytest.mark.parametrize("filter_name", ["lanczos", "bilinear"])
def test_compat_gives_rosinalitys_bytes(tmp_path, filter_name):
    functional = pytest.importorskip("torchvision.transforms.functional", reason="compared with torchvision")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(51, 40), (40, 53), (33, 33), (16, 16), (15, 20)]):
        noise(i, *size).save(folder / f"{i}.png")
    noise(9, 30, 40).convert("L").save(folder / "9.jpg", comment=b"hello")
    assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", "16,24", "--compat",
                   "--resample", filter_name, folder) == 0  # fmt: skip
    items = contents(tmp_path / "out")
    for index, path in enumerate(sorted(folder.iterdir())):
        for size in (16, 24):
            # the sequence of calls in rosinality/stylegan2-pytorch, prepare_data.py
            image = functional.resize(Image.open(path).convert("RGB"), size, functional.InterpolationMode(filter_name))
            functional.center_crop(image, size).save(tmp_path / "item", format="jpeg", quality=100)
            assert items[f"{size}-{index:05d}".encode()] == (tmp_path / "item").read_bytes()
    assert manifest(tmp_path / "out")["compat"] is True
    assert len(MultiResolutionDataset(tmp_path / "out", 16)) == 6


def test_metadata_does_not_get_in(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    noise(1).save(tmp_path / "photos" / "a.jpg", exif=exif, comment=b"where I live")
    for image_format in ("png", "jpeg", "webp"):
        out = tmp_path / image_format
        assert command("--out", out, "--n_worker", 1, "--size", 8, "--format", image_format, tmp_path / "photos") == 0
        assert b"where I live" not in contents(out)[b"8-00000"]


# -- again, and going on -------------------------------------------------------------------------------------------


def test_up_to_date_ends_at_once(photos, tmp_path, monkeypatch, capsys):
    args = ["--out", tmp_path / "out", "--n_worker", 1, "--size", 8, photos]
    assert command(*args) == 0
    before = (tmp_path / "out" / "data.mdb").stat()
    monkeypatch.setattr(prepare_data, "encode_all", None)  # must not be called
    assert command(*args) == 0
    captured = capsys.readouterr()
    assert "up to date" in captured.err and captured.out.count("9 images") == 2
    after = (tmp_path / "out" / "data.mdb").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_finished_lmdb_is_not_replaced_unasked(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 0
    assert command("--out", out, "--n_worker", 1, "--size", 16, photos) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "sizes [8], now [16]" in error and "--overwrite" in error
    noise(50).save(photos / "new.png")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 1
    assert "made from other files" in capsys.readouterr().err
    assert len(MultiResolutionDataset(out, 8)) == 9
    assert command("--out", out, "--n_worker", 1, "--size", 16, "--overwrite", photos) == 0
    assert len(MultiResolutionDataset(out, 16)) == 10


def test_another_tools_finished_and_unfinished_lmdb(photos, tmp_path, capsys):
    out = tmp_path / "out"
    with lmdb.open(str(out), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.put(b"8-00000", b"x")
        transaction.put(b"length", b"1")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 1
    assert "by another tool" in capsys.readouterr().err
    with lmdb.open(str(out), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.delete(b"length")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 0
    assert len(MultiResolutionDataset(out, 8)) == 9


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common.store, prepare_data
from common.cli import run
prepare_data.BATCH_FILES, prepare_data.CHUNK = 2, 1
{patch}
if __name__ == "__main__":
    sys.exit(run(prepare_data.main, prepare_data.build_parser(), sys.argv[1:]))
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
PATCHES = {
    "before the third transaction": (
        "write = common.store.StoreWriter.write\n"
        "def die(self, items):\n"
        f"    if len(self.records) >= 4: {DIE}\n"
        "    write(self, items)\n"
        "common.store.StoreWriter.write = die"
    ),
    "inside the third transaction": (
        "put = common.store.StoreWriter._put\n"
        "def die(self, transaction, items):\n"
        "    put(self, transaction, items)\n"
        f"    if len(self.records) >= 4: {DIE}\n"
        "common.store.StoreWriter._put = die"
    ),
    "before the manifest": f"common.store.StoreWriter._conclude = lambda *args: {DIE}",
    "before the rename": f"os.replace = lambda *args: {DIE}",
}


def killed(tmp_path, patch, *args, **options):
    script = tmp_path / "killed.py"
    script.write_text(KILL.format(root=str(ROOT), patch=patch), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], stderr=subprocess.DEVNULL, **options)


@pytest.mark.parametrize("moment", PATCHES)
def test_a_killed_run_goes_on_to_the_same_result(photos, tmp_path, monkeypatch, moment):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this platform has no SIGKILL")
    (photos / "bad.png").write_text("no image")
    args = ["--n_worker", 1, "--size", "8,16", "--max_bad", 1, photos]
    out = tmp_path / "out"
    assert killed(tmp_path, PATCHES[moment], "--out", out, *args).wait() == -signal.SIGKILL
    with pytest.raises(DatasetError, match="unfinished.*continues"):
        MultiResolutionDataset(out, 8)

    encoded = []
    encode_file = prepare_data.encode_file

    def counted(path, settings):
        encoded.append(path)
        return encode_file(path, settings)

    monkeypatch.setattr(prepare_data, "encode_file", counted)
    assert command("--out", out, *args) == 0
    assert len(encoded) == (6 if "third" in moment else 0)  # 10 files, 4 of them done
    assert command("--out", tmp_path / "whole", *args) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == ["data.mdb", "skipped.csv"]
    assert (out / "skipped.csv").read_bytes() == (tmp_path / "whole" / "skipped.csv").read_bytes()


def test_workers_end_with_a_killed_parent(photos, tmp_path):
    if not hasattr(os, "killpg"):
        pytest.skip("this platform has no process groups")
    process = killed(tmp_path, PATCHES["before the third transaction"], "--out", tmp_path / "out", "--n_worker", 2,
                     "--size", 8, photos, start_new_session=True)  # fmt: skip
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is still alive 10 s after its parent was killed")


@pytest.mark.parametrize("change", ["settings", "files", "damage"])
def test_a_store_in_the_making_of_something_else_is_made_anew(photos, tmp_path, change):
    out = tmp_path / "out"
    assert killed(tmp_path, PATCHES["before the third transaction"], "--out", out, "--n_worker", 1, "--size", 8,
                  photos).wait() < 0  # fmt: skip
    if change == "files":
        noise(60).save(photos / "a" / "a.png")
    if change == "damage":
        building = out / "building.mdb"
        building.write_bytes(building.read_bytes()[:9000])
    size = 16 if change == "settings" else 8
    assert command("--out", out, "--n_worker", 1, "--size", size, photos) == 0
    assert command("--out", tmp_path / "whole", "--n_worker", 1, "--size", size, photos) == 0
    assert contents(out) == contents(tmp_path / "whole")


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
        monkeypatch.setattr(common.store.shutil, "disk_usage", lambda _: usage)
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
        cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
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
