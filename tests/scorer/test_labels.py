"""scorer/labels.py: labels read, weighed, split and refused."""

import shutil

import numpy as np
import pytest
from scorers import write_csv

from scorer.labels import present_faces, read_labels


def test_labels_of_the_known_columns(tmp_path):
    path = write_csv(
        tmp_path / "l.csv",
        ["file", "age", "gender", "narrow_eyes", "age_src", "expression_src", "identity"],
        ["ü 1.jpg", "30", "M", "0.2", "aaf", "farl-pred", "a"],
        ["2.jpg", "", "F", "", "deepface-pred", "", ""],
        ["3.jpg", "140", "", "1", "deepface-pred", "azure-dcgm", "a"],
    )
    table = read_labels(path)
    assert [a.name for a in table.attributes] == ["age", "gender", "eyes_open"]
    assert table.names == ("ü 1.jpg", "2.jpg", "3.jpg") and table.identities == ("a", "2.jpg", "a")
    expected = np.array([[30, 1, 0.8], [np.nan, 0, np.nan], [100, np.nan, 0]], np.float32)
    np.testing.assert_allclose(table.values, expected)  # eyes_open is one minus narrow_eyes; ages end at 100
    np.testing.assert_allclose(table.weights, [[1, 1, 1], [0, 1, 0], [0.1, 0, 0.7]])
    assert [a.name for a in read_labels(path, "all").attributes] == ["age", "gender", "eyes_open"]


def test_labels_of_other_columns(tmp_path):
    path = write_csv(
        tmp_path / "l.csv",
        ["image_id", "Smiling", "Hat", "Yaw", "note"],
        ["1.jpg", "-1", "yes", "12.5", "x"],
        ["2.jpg", "1", "no", "-30", "y"],
    )
    table = read_labels(path, "smile,hat,Yaw")
    assert [(a.name, a.kind) for a in table.attributes] == [
        ("smile", "probability"),
        ("hat", "probability"),
        ("Yaw", "value"),
    ]
    assert table.values.tolist() == [[0, 1, 12.5], [1, 0, -30]]
    assert table.attributes[2].mean == pytest.approx(-8.75)
    assert [a.name for a in read_labels(path, "all").attributes] == ["smile", "hat", "yaw"]  # `note` is no number


@pytest.mark.parametrize(
    "column, others, expected",
    [
        (["-1", "-1", "-1"], ["1", "-1", "1"], [0, 0, 0]),  # women only: `Male` is -1 throughout
        (["-1", "-1", "-1"], ["x", "y", "z"], [0, 0, 0]),
        (["1", "1", ""], ["1", "-1", "1"], [1, 1, np.nan]),
        (["-1", "0", "1"], ["1", "-1", "1"], [0, np.nan, 1]),  # CelebA's convention: 0 is not known
        (["-1", "0", "1"], ["1", "0", "1"], [np.nan, 0, 1]),  # a file of 0 and 1: -1 is not known
        (["-1", "0", "0"], ["1", "0", "1"], [np.nan, 0, 0]),
        (["-1", "1", "-1"], ["1", "0", "1"], [0, 1, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Male", "Hat"])  # one of the known attributes, and any other
def test_minus_one_is_read_by_the_convention_of_the_file(tmp_path, column, others, expected, name):
    rows = [[f"{i}.jpg", *cells] for i, cells in enumerate(zip(column, others, strict=True))]
    path = write_csv(tmp_path / "l.csv", ["image_id", name, "Other"], *rows)
    table = read_labels(path, "gender" if name == "Male" else "Hat")
    assert table.attributes[0].kind == "probability"
    np.testing.assert_array_equal(table.values[:, 0], np.array(expected, np.float32))


def test_minus_one_that_could_be_either_is_said(tmp_path):
    rows = [["1.jpg", "-1", "3"], ["2.jpg", "0", "4"], ["3.jpg", "1", "5"]]
    path = write_csv(tmp_path / "l.csv", ["file", "smile", "x"], *rows)
    with pytest.raises(ValueError, match="column 'smile' holds -1 and 0, and no other column tells"):
        read_labels(path)
    path = write_csv(tmp_path / "m.csv", ["file", "hat", "x"], *rows)
    with pytest.warns(UserWarning, match="column 'hat' holds -1 and 0.*is left out"):
        assert [a.name for a in read_labels(path, "all").attributes] == ["x"]  # nobody asked for the hat


def test_a_column_of_one_value_is_warned_of(tmp_path):
    path = write_csv(tmp_path / "l.csv", ["file", "Male"], ["1.jpg", "-1"], ["2.jpg", "-1"])
    with pytest.warns(UserWarning, match="column 'Male' has one value for all 2 labels"):
        table = read_labels(path)
    assert table.values.tolist() == [[0], [0]] and table.attributes[0].name == "gender"


@pytest.mark.parametrize(
    "header, row, attributes, message",
    [
        (["file", "beard"], ["1.jpg", "1"], "auto", "has no labels for any of age, gender"),
        (["file", "age"], ["1.jpg", "30"], "hat", "no column for the attribute 'hat'"),
        (["file", "age"], ["1.jpg", ""], "age", "no row has a label for 'age'"),
        (["file", "age"], ["1.jpg", ""], "auto", "has no labels for any"),
        (["face", "age"], ["1.jpg", "30"], "auto", "no column of file names"),
        (["file", "age"], ["1.jpg", "old"], "auto", "line 2: 'old' in column 'age'"),
        (["file", "age"], ["1.jpg", "-3"], "auto", "line 2: -3 in column 'age' is outside"),
        (["file", "smile"], ["1.jpg", "2"], "auto", "line 2: 2 in column 'smile' is outside 0..1"),
        (["file", "age"], ["1.jpg", "30"], " , ", "names nothing"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, header, row, attributes, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write_csv(tmp_path / "l.csv", header, row), attributes)


@pytest.mark.parametrize("cell, message", [("old", "'old' in column 'age'"), ("-3", "-3 in column 'age'")])
def test_the_line_named_is_the_files(tmp_path, cell, message):
    path = tmp_path / "l.csv"
    path.write_text(f'file,note,age\n\n1.jpg,"of\ntwo lines",30\n\n2.jpg,,{cell}\n')  # blank lines are no rows
    with pytest.raises(ValueError, match=f"line 6: {message}"):
        read_labels(path)


def test_files_that_are_no_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such CSV"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="holds no labels"):
        read_labels(write_csv(tmp_path / "l.csv", ["file", "age"]))
    (tmp_path / "l.csv").write_bytes("file,age\nä,1".encode("utf-16"))
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_labels(tmp_path / "l.csv")


def test_nobody_is_on_both_sides_of_the_split(tmp_path):
    rows = [[f"{i}.jpg", "30", f"person {i // 3}"] for i in range(300)]
    table = read_labels(write_csv(tmp_path / "l.csv", ["file", "age", "identity"], *rows))
    training, held = table.split(0.2, seed=1)
    assert not set(training.identities) & set(held.identities)
    assert len(training) + len(held) == 300 and 30 < len(held) < 90
    shuffled = table.select(np.random.RandomState(0).permutation(300)).split(0.2, seed=1)[1]
    assert sorted(shuffled.names) == sorted(held.names)
    assert sorted(table.split(0.2, seed=2)[1].names) != sorted(held.names)
    with pytest.raises(ValueError, match="leaves no validation"):
        table.split(1e-9)


def test_faces_that_are_absent_or_damaged_are_left_out(planted, tmp_path):
    rows = [["000 ü.png", 1], ["gone.png", 1], ["bad.png", 0], ["001 ü.png", ""]]
    (tmp_path / "bad.png").write_bytes(b"no image")
    for name in ("000 ü.png", "001 ü.png"):
        shutil.copy(planted / name, tmp_path)
    table = read_labels(write_csv(tmp_path / "l.csv", ["file", "smile"], *rows))
    with pytest.warns(UserWarning, match=r"2 of 4 faces are left out: gone.png \(absent\), bad.png \("):
        left = present_faces(table, tmp_path)
    assert left.names == ("000 ü.png",)  # 001 has no label
    with pytest.raises(FileNotFoundError, match="has none of the 4 faces"):
        present_faces(table, tmp_path / "elsewhere")
