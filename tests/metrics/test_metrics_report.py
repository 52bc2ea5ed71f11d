"""metrics.protocol and metrics.report: the stamp, what may be compared, and table, curve and sweep from run folders."""

import copy
import csv
import json
import re

import pytest
from PIL import Image

from common.cli import run
from metrics import report
from metrics import runs as metric_runs
from metrics.extractors import metric_name
from metrics.protocol import PROTOCOLS, append_records, make_record, read_records, require_alike, unlike

EXTRACTOR = {"name": "squeeze", "sha256": "ab" * 32, "size": 128, "dim": 512}
REAL = {"kind": "lmdb", "path": "faces.lmdb", "n": 500, "size": 32, "filter": "lanczos", "codec": "png", "digest": "d1"}
PROTOCOL = {"name": "tf-compat", "quantised": True, "resize": "bilinear-tf1", "antialias": False}


def record(metric="fid", value=10.0, *, step=100, truncation=1.0, fingerprint="f0", n=500, **details):
    fake = {
        "kind": "checkpoint",
        "path": "x",
        "n": n,
        "step": step,
        "images": step * 16,
        "truncation": truncation,
        "seed": 0,
        "ema": True,
        "size": 32,
        "fingerprint": fingerprint + str(step),
        "space": "w++",
    }
    return make_record(
        metric_name(metric, "squeeze"), value, real=REAL, fake=fake, protocol=PROTOCOL, extractor=EXTRACTOR, **details
    )


def write_run(folder, curve, space="w++", **options):
    """A run folder with FID, precision and recall at (step, fid)."""
    records = []
    for step, value in curve:
        for metric, number in (("fid", value), ("precision", 0.5 + step / 1e4), ("recall", 0.4)):
            one = record(metric, number, step=step, fingerprint=folder.name, **options)
            one["fake"]["space"] = space
            records.append(one)
    append_records(folder / "metrics.jsonl", records)
    return folder


@pytest.fixture
def runs(tmp_path):
    w = write_run(tmp_path / "w ü", [(1000, 300.0), (2000, 120.0), (3000, 130.0)], space="w")
    return [f"W={w}", f"W++={write_run(tmp_path / 'wpp', [(1000, 280.0), (2000, 110.0), (3000, 95.5)])}"]


@pytest.fixture
def command(capfd):
    def command(*flags):
        status = run(report.main, report.build_parser(), list(map(str, flags)))
        return status, *capfd.readouterr()

    return command


# -- stamp and comparison ------------------------------------------------------------------------------------------


def test_a_record_says_everything(tmp_path):
    append_records(tmp_path / "deep" / "metrics.jsonl", [record(std=0.1, notes=["few samples"])])
    append_records(tmp_path / "deep" / "metrics.jsonl", [record(value=float("nan"))])
    first, second = read_records(tmp_path / "deep" / "metrics.jsonl")
    assert (first["metric"], first["value"], first["n_real"], first["n_fake"], first["step"]) == (
        "fid-squeeze",
        10.0,
        500,
        500,
        100,
    )
    assert first["extractor"] == EXTRACTOR and first["protocol"]["antialias"] is False and first["notes"]
    assert {"filter", "codec", "size", "digest"} <= set(first["real"])
    assert {"truncation", "seed", "ema", "fingerprint"} <= set(first["fake"])
    assert {"git", "torch", "torch-fidelity"} <= set(first["code"]) and first["time"]
    assert second["value"] is None  # JSON has no NaN


def test_lines_that_are_none(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(record()) + "\nnot json\n", encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is no result of metrics/"):
        read_records(file)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"value": "10"}, "`value` is a text, not a number or null"),
        ({"metric": None}, "`metric` is null, not a text"),
        ({"fake": None}, "`fake` is null, not an object"),
        ({"fake": {"images": "many"}}, "`fake.images` is a text"),
        ({"fake": {"fingerprint": []}}, "`fake.fingerprint` is a list"),
        ({"real": {"digest": {}}}, "`real.digest` is an object"),
        ({"real": [1]}, "`real` is a list"),
        ({"n_fake": 1e400}, "is not finite"),
    ],
)
def test_results_of_the_wrong_shape(change, sentence, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(record() | change).replace("Infinity", "1e400") + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"metrics.jsonl, line 1 is no result of metrics/: .*{sentence}"):
        read_records(file)


@pytest.mark.parametrize(
    "path, value, text",
    [
        ("n_fake", 400, "n_fake 500 against 400"),
        ("extractor.sha256", "cd", "extractor.sha256 ab.* against cd"),
        ("protocol.antialias", True, "protocol.antialias False against True"),
        ("protocol.name", "clean", "protocol.name tf-compat against clean"),
        ("real.filter", None, "real.filter lanczos against unknown"),
        ("real.codec", "jpeg", "real.codec png against jpeg"),
        ("real.digest", "d2", "real.digest d1 against d2"),
        ("fake.truncation", 0.7, "fake.truncation 1.0 against 0.7"),
        ("fake.ema", False, "fake.ema True against False"),
    ],
)
def test_unlike_results_are_refused(path, value, text):
    one, other = record(), copy.deepcopy(record(value=8.0))
    *parents, name = path.split(".")
    target = other
    for parent in parents:
        target = target[parent]
    target[name] = value
    with pytest.raises(ValueError, match=f"fid-squeeze: these numbers were not computed alike .*{text}.*allow_unlike"):
        require_alike([one, other])
    assert len(require_alike([one, other], allow=True)) == 1
    assert unlike(one, other, vary=[path]) == []


def test_what_is_compared_may_differ():
    one, other = record(), record(value=3.0, step=900, fingerprint="other")
    other["fake"] |= {"space": "w", "path": "elsewhere", "seed": 3}
    other["time"], other["code"]["git"] = "later", "another"
    assert unlike(one, other) == []


def test_protocols_are_three():
    assert list(PROTOCOLS) == ["paper", "tf-compat", "clean"]


# -- report --------------------------------------------------------------------------------------------------------


def test_table_of_w_against_wpp(command, runs, tmp_path):
    status, out, err = command(*runs, "--csv", tmp_path / "t.csv")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["step", "k", "images", "fid-squeeze", "precision-squeeze", "recall-squeeze"]
    assert lines[2].split() == ["W", "2000", "32.0", "120.0", "0.700", "0.400"]
    assert lines[3].split() == ["W++", "3000", "48.0", "95.5", "0.800", "0.400"]
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["name", "step"] and rows[2] == ["W++", "3000", "48.0", "95.5", "0.8", "0.4"]


def test_curve(command, runs, tmp_path):
    png, points = tmp_path / "c.png", tmp_path / "c.csv"
    status, _, err = command(*runs, "--png", png, "--curve_csv", points)
    assert status == 0, err
    with Image.open(png) as image:
        image.load()
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 10
    with open(points, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "images", "fid-squeeze"] and rows[1] == ["W", "16.0", "300.0"] and len(rows) == 7
    assert command(*runs, "--png", png, "--metric", "kid")[0] == 1


def test_values_that_are_not_finite(command, tmp_path):
    """`null` in metrics.jsonl: never the best, no point of the curve, a dash in the table."""
    folder = write_run(tmp_path / "run", [(1000, 90.0), (2000, float("nan")), (3000, 95.0)])
    files = {name: tmp_path / f"t.{name}" for name in ("csv", "png", "curve_csv")}
    flags = [part for name, file in files.items() for part in (f"--{name}", file)]
    status, out, err = command(folder, *flags)
    assert status == 0, err
    assert out.splitlines()[2].split()[1] == "1000"
    assert [line.split(",")[1] for line in files["curve_csv"].read_text().splitlines()[1:]] == ["16.0", "48.0"]
    alone = write_run(tmp_path / "alone", [(1000, float("nan"))])
    status, out, err = command(alone, folder)
    assert status == 0 and out.splitlines()[2].split() == ["alone", "1000", "16.0", "-", "0.600", "0.400"], err
    status, _, err = command(alone, "--png", files["png"])
    assert status == 1 and "no finite fid-squeeze at a known images" in err


def test_sweep(command, tmp_path):
    file = tmp_path / "sweep.jsonl"
    append_records(file, [record("recall", psi / 2, truncation=psi) for psi in (0.5, 1.0, 0.7)])
    status, _, err = command(file)
    assert status == 1 and "fake.truncation 0.5 against 1.0" in err
    points = tmp_path / "s.csv"
    status, out, _ = command(file, "--against", "truncation", "--curve_csv", points)
    assert status == 0 and [" ".join(line.split()) for line in out.splitlines()[2:]] == [
        "sweep, psi 0.5 100 1.600 0.250",
        "sweep, psi 0.7 100 1.600 0.350",
        "sweep, psi 1 100 1.600 0.500",
    ]
    assert points.read_text().splitlines()[1:] == ["sweep,0.5,0.25", "sweep,0.7,0.35", "sweep,1.0,0.5"]


def test_unlike_runs_only_when_told(command, runs, tmp_path):
    other = write_run(tmp_path / "other", [(1000, 50.0)], n=600)
    status, _, err = command(*runs, f"C={other}")
    assert status == 1 and "n_fake 500 against 600" in err and err.count("error: ") == 1
    status, out, err = command(*runs, f"C={other}", "--allow_unlike")
    assert status == 0 and "warning: not computed alike: fid-squeeze: n_fake 500 against 600" in err and "\nC " in out


def test_one_checkpoint_against_two_real_sets_is_refused(command, tmp_path):
    """The later result must not push the earlier one out of sight."""
    other = record(value=20.0)
    other["real"] = {**REAL, "digest": "d2"}
    append_records(tmp_path / "metrics.jsonl", [record(), other])
    status, _, err = command(tmp_path / "metrics.jsonl")
    assert status == 1 and "were not computed alike" in err


def test_the_last_of_repeated_results_counts(command, tmp_path):
    folder = write_run(tmp_path / "run", [(1000, 90.0)])
    append_records(folder / "metrics.jsonl", [record("fid", 70.0, step=1000, fingerprint="run")])
    assert " 70.0" in command(folder)[1]


def test_latents_of_one_generator_are_results_of_their_own(command, tmp_path):
    """The table has the precision of the latents with the best FID."""
    for digest, fid, precision in (("d1", 70.0, 0.25), ("d2", 90.0, 0.75)):
        results = [record("fid", fid), record("precision", precision)]
        for one in results:
            one["fake"] |= {"kind": "latents", "digest": digest}
        append_records(tmp_path / "metrics.jsonl", results)
    assert re.search(r" 70.0 +0.250", command(tmp_path / "metrics.jsonl")[1])


def test_mistakes(command, runs, tmp_path):
    status, _, err = command(tmp_path / "none")
    assert status == 1 and "none does not exist" in err
    status, _, err = command(runs[0], runs[0])
    assert status == 1 and "two runs are called W" in err


def test_metrics_of_one_checkpoint_make_one_row(command, tmp_path):
    """Path length takes other numbers of samples than FID, and has no real images: still the same row."""
    folder = write_run(tmp_path / "run", [(1000, 90.0), (2000, 80.0)])
    lengths = record("fid", 55.0, step=2000, fingerprint="run", n=9)
    lengths |= {"metric": "ppl-w++-squeeze", "n_real": None, "real": {}}
    append_records(folder / "metrics.jsonl", [lengths])
    status, out, err = command(folder)
    assert status == 0, err
    assert out.splitlines()[0].split()[-1] == "ppl-w++-squeeze"
    assert out.splitlines()[2].split() == ["run", "2000", "32.0", "80.0", "0.700", "0.400", "55.0"]


def test_committed_curve_falls(root):
    """docs/metrics-32: the log beside the curve is read, was computed alike, and is what the table of points says."""
    folder = root / "docs" / "metrics-32"
    records = read_records(folder / "metrics.jsonl")
    curve = [r for r in records if r["metric"] == "fid-squeeze"]
    require_alike(curve)
    points = metric_runs.build_curve(curve, "fid-squeeze", "images")
    assert len(points) >= 5 and points[0][0] == 0
    assert points[-1][1] < 0.5 * points[0][1]
    with open(folder / "curve.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [(float(x), float(value)) for _, x, value in rows[1:]] == points
    for side in ("real", "fake"):  # where things lay on the machine is nobody's business
        assert not any(str(r[side]["path"]).startswith("/") for r in records)
