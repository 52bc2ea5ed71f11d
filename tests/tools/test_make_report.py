"""tools/make_report.py: the page shows what is there, leaves out what is not, and refuses a folder without results."""

import pytest
from PIL import Image

import tools.make_report
from common.cli import run


def command(folder):
    return run(tools.make_report.main, tools.make_report.build_parser(), ["--folder", str(folder)])


@pytest.fixture
def results(tmp_path):
    for name in ("1-faces.png", "inverted/sheet_0.png", "edits/age/strips/origin_0 ü.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "edits/age/edits.csv").write_text(
        "\ufeffimage,origin,age,identity,frame\na,0,20.5,,x.png\nb,1,60,,y.png\n", encoding="utf-8"
    )
    return tmp_path


def test_the_page_shows_what_is_there(results, capsys):
    assert command(results) == 0 and "report.html" in capsys.readouterr().out
    page = (results / "report.html").read_text(encoding="utf-8")
    assert '<img src="1-faces.png"' in page and "edits/age/strips/origin_0%20%C3%BC.png" in page
    assert "<h2>Age</h2>" in page and "<h2>Smile</h2>" not in page
    assert "<td>20.5</td>" in page and "<td>40.2</td>" in page and "<td>60</td>" in page, "smallest, mean, largest"
    assert "identity" not in page, "a blank column has no numbers"
    assert "http" not in page, "nothing from outside the folder"


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert command(tmp_path) == 1 and "holds no results" in capsys.readouterr().err
    assert command(tmp_path / "absent") == 1 and "no folder" in capsys.readouterr().err
