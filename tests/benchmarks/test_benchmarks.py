"""Benchmarks of inversion, editing and data at toy sizes: rows, and the last line of JSON."""

import json

import pytest

from benchmarks import bench_curve, bench_data, bench_edit, bench_invert
from common.cli import run


@pytest.fixture
def bench(capsys, forks):
    """(what a benchmark prints, the last line as JSON)"""

    def bench(module, *flags):
        assert run(module.main, module.build_parser(), [str(flag) for flag in flags]) == 0
        shown = capsys.readouterr().out
        return shown, json.loads(shown.splitlines()[-1])

    return bench


def test_inversion(bench):
    flags = ("--size", 8, "--channel_max", 4, "--steps", 2, "--shorter", 1, "--perceptual", "random", "--threads", 1)
    shown, found = bench(bench_invert, *flags, "--device", "cpu")
    assert [(row["name"], row["steps"]) for row in found["rows"]] == [("original", 2), ("ours", 2), ("ours, faster", 1)]
    assert all(row["images_per_minute"] > 0 and 0 < row["mse"] < 4 for row in found["rows"])
    ours, original = (found["rows"][i]["images_per_minute"] for i in (1, 0))
    assert found["ratio_same_steps"][0] == pytest.approx(ours / original) and "same settings" in shown


def test_curve(bench, face_folder):
    flags = ("--dataset", face_folder, "--images", 1, "--project", 1, "--tune", 1, 4, "--lpips", "scorer:face-scorer")
    shown, found = bench(bench_curve, *flags, "--threads", 1, "--device", "cpu")
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["encoder", "projector, 1", "tuned, 1", "tuned, 4"] and "tuned, 4" in shown
    assert rows["tuned, 4"]["mse"] < rows["tuned, 1"]["mse"] and rows["tuned, 4"]["s"] > rows["encoder"]["s"] > 0


def test_editing(bench):
    flags = ("--parts", "svm", "sweep", "--num_sample", 1000, "--width", 64, "--ratio", 0.1, "--size", 8, "--frames", 3)
    flags += ("--channel_max", 4, "--repeats", 1, "--threads", 1, "--device", "cpu")
    shown, found = bench(bench_edit, *flags)
    assert found["svm"]["cosine"] > 0.9 and found["svm"]["svm"]["accuracy"] > 0.8
    assert found["sweep"]["largest_difference"] <= 1, "the original's arithmetic draws the same pictures"
    seconds = found["sweep"]["original, one by one"], found["sweep"]["ours, in blocks"]
    assert found["sweep"]["ratio"] == pytest.approx(seconds[0] / seconds[1]) and "for 3 frames" in shown


def test_data(bench, tmp_path):
    flags = ("--parts", "store", "loader", "--photos", 12, "--photo_size", 24, "--sizes", "8,16", "--n_worker", 1)
    flags += ("--workers", 0, "--batch", 4, "--repeats", 1, "--folder", tmp_path)
    shown, found = bench(bench_data, *flags)
    results = found["results"]
    assert results["store, ratio"] == pytest.approx(
        results["store, ours, puts/s"] / results["store, commit per image, puts/s"]
    )
    assert results["loader 8 px, 0 workers, images/s"] > 0 and "loader 8 px" in shown
